"""A trained VIM on disk, with the tokenizer it belongs to: what draws images.

>>> import patchloom as pl
>>> model = pl.load("runs/vim")  # doctest: +SKIP
>>> model.sample(4, class_id=2, temperature=0.9, top_k=100).shape  # doctest: +SKIP
torch.Size([4, 3, 32, 32])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patchloom.base.stored import read_tensors
from patchloom.base.version import __version__
from patchloom.errors import UsageError
from patchloom.io import make_folder, write_json, written_whole
from patchloom.models.bundle import LINEAGE
from patchloom.models.published import fill
from patchloom.systems.vim.model import ImageGPT
from patchloom.tokenizers.tokenizer import Tokenizer, keep_tokenizer, open_tokenizer

WEIGHTS, ABOUT = "vim.safetensors", "vim.json"
FORMAT = 1


class VIM(nn.Module):
    """A tokenizer, and the transformer over its tokens.

    Args:
        transformer: The transformer.
        tokenizer: What its tokens are of.
        grid: Tokens of an image, (h, w).
        class_names: Names of the classes it makes images of; None: of none.

    Raises:
        UsageError: The transformer is for another vocabulary or another number of tokens.
    """

    def __init__(
        self,
        transformer: ImageGPT,
        tokenizer: Tokenizer,
        grid: tuple[int, int],
        class_names: list[str] | None = None,
        reading: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_tokens(transformer, tokenizer, grid)
        self.transformer, self.tokenizer, self.grid, self.class_names = transformer, tokenizer, grid, class_names
        self.reading = dict(reading or {})

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.tokenizer.image_size(self.grid)

    def class_number(self, named: str | int) -> int:
        """Return the number of a class by its name or number.

        Raises:
            UsageError: There is no such class, or the model makes images of none.
        """
        names = self.class_names
        if names is None:
            raise UsageError("this model makes images of no class; leave the class out, or train with conditional=true")
        if str(named) in names:
            return names.index(str(named))
        if str(named).isdigit() and int(named) < len(names):
            return int(named)
        listed = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
        raise UsageError(f"there is no class {named!r} in this model; it has {listed}, or 0 to {len(names) - 1}")

    @torch.no_grad()
    def sample(
        self,
        count: int,
        class_id: str | int | None = None,
        *,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw images.

        Args:
            count: How many.
            class_id: Name or number of their class; None: of all classes in turn, or of none where there are none.
            seed: Of the draws.
            progress: Told the number of tokens done.
            **sampling: `temperature`, `top_k`, `top_p` and `use_cache` of `ImageGPT.generate`.

        Returns:
            (count, C, H, W) float32 in [0, 1].

        Raises:
            UsageError: There is no such class, or settings of sampling make no sense.
        """
        cond = self.conditions(count, class_id)
        device = self.transformer.code_pos.device
        generator = torch.Generator(device).manual_seed(seed)
        ids = self.transformer.generate(cond, count=count, generator=generator, progress=progress, **sampling)
        return self.tokenizer.decode(ids.view(-1, *self.grid)).clamp(0, 1)

    def conditions(self, count: int, class_id: str | int | None = None) -> Tensor | None:
        """Return the conditions (count, 1) of images of a class, or of all in turn; None where there are no classes."""
        if class_id is not None:
            return torch.full((count, 1), self.class_number(class_id))
        if self.class_names is None:
            return None
        return (torch.arange(count) % len(self.class_names))[:, None]

    @torch.no_grad()
    def features(self, images: Tensor, layers: Collection[int] | None = None) -> dict[int, Tensor]:
        """Return what blocks hold of images, the mean over their tokens.

        Args:
            images: (B, C, H, W) in [0, 1] of the model's size.
            layers: Numbers of blocks from 1, 0 for the embedding; None: all.

        Returns:
            Number to (B, D) float32.

        Raises:
            UsageError: A model of classes, images of another size, or a block there is not.
        """
        if self.transformer.conditional:
            raise UsageError(
                "this model was trained with classes, and features are read from a model of no class, since what "
                "it is told would be in them; train one with --conditional false"
            )
        ids = self.tokenizer.encode(images)
        if tuple(ids.shape[1:]) != self.grid:
            raise UsageError(f"images of {tuple(images.shape[2:])} pixels; this model is for {self.image_size}")
        found = self.transformer.features(ids.flatten(1), None, layers)
        return {number: x.float().mean(1) for number, x in found.items()}


def check_tokens(transformer: ImageGPT, tokenizer: Tokenizer, grid: tuple[int, int]) -> None:
    """Refuse a transformer that is not for a tokenizer's tokens.

    Raises:
        UsageError: Names both vocabularies or both grids.
    """
    if transformer.vocab != tokenizer.num_codes:
        raise UsageError(
            f"the transformer is for {transformer.vocab} codes, the tokenizer has {tokenizer.num_codes}; they must be "
            f"of one run"
        )
    if transformer.num_tokens != grid[0] * grid[1]:
        raise UsageError(
            f"the transformer is for {transformer.num_tokens} tokens an image, and a grid of {grid[0]}x{grid[1]} has "
            f"{grid[0] * grid[1]}"
        )


def save_vim(model: VIM, path: Path, lineage: dict[str, Any] | None = None) -> Path:
    """Write a model to a folder, in place of one that is there, its tokenizer beside it."""
    folder = make_folder(path)
    state = {name: value.detach().cpu().contiguous() for name, value in model.transformer.state_dict().items()}
    versions = {"patchloom": __version__, "torch": torch.__version__, "timm": timm.__version__}
    keep_tokenizer(model.tokenizer, folder)
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
    write_json(folder / LINEAGE, {"lineage": lineage or {}, "versions": versions}, default=str)
    about = {
        "format": FORMAT,
        "transformer": model.transformer.arguments(),
        "grid": list(model.grid),
        "class_names": model.class_names,
        "reading": model.reading,
        "tokenizer": model.tokenizer.fingerprint(),
        "versions": versions,
    }
    write_json(folder / ABOUT, about)
    return folder


def load_vim(path: str | Path) -> VIM:
    """Return a model of a run of `patchloom generate vim`, or its `model/`, in eval mode.

    Raises:
        UsageError: There is none, it is damaged, or its tokenizer is another than it was trained on.
    """
    folder = next((place for place in (Path(path), Path(path) / "model") if (place / ABOUT).exists()), None)
    if folder is None:
        raise UsageError(f"{path} holds no model that makes images; train one: patchloom generate vim")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        transformer = ImageGPT(**about["transformer"])
        height, width = about["grid"]
        names, wanted, reading = about["class_names"], about["tokenizer"], about.get("reading")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"{folder / ABOUT} is damaged ({reason}); train it again") from error
    fill(transformer, read_tensors(folder / WEIGHTS, "train it again"))
    tokenizer = open_tokenizer(folder)
    if (found := tokenizer.fingerprint()) != wanted:
        raise UsageError(f"{folder} was trained on tokens of {wanted}, and its tokenizer is {found}; train it again")
    return VIM(transformer, tokenizer, (int(height), int(width)), names, reading).eval()
