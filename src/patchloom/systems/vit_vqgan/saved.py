"""A trained ViT-VQGAN on disk, and as a tokenizer.

>>> from patchloom.tokenizers import open_tokenizer
>>> tokenizer = open_tokenizer("runs/tokens")  # doctest: +SKIP
>>> tokenizer.encode(images).shape  # doctest: +SKIP
torch.Size([8, 32, 32])
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
from patchloom.systems.vit_vqgan.model import ViTVQGAN
from patchloom.systems.vit_vqgan.quantizer import check_levels
from patchloom.tokenizers.nearest import as_float
from patchloom.tokenizers.tokenizer import ABOUT, Tokenizer, find_learned, read_about

KIND = "vit_vqgan"
WEIGHTS = "tokenizer.safetensors"
FORMAT = 1
_IMAGES_AT_ONCE = 64
Made = TypeVar("Made", bound=nn.Module)


class LearnedTokenizer(Tokenizer):
    """A ViT-VQGAN as a tokenizer, without what it was trained by.

    Images of another size than it was trained at are taken, as long as patches divide them: positions are made anew.

    Args:
        network: The auto-encoder, one token a patch.
        facts: How it was made.

    Raises:
        UsageError: The network has several tokens a patch.
    """

    def __init__(self, network: ViTVQGAN, facts: dict[str, Any] | None = None) -> None:
        super().__init__()
        check_levels(network.quantizer.num_residual)
        self.network = network.eval()
        self.patch_size, self.in_chans = network.patch_size, network.in_chans
        self.facts = {"image_size": list(network.image_size), **(facts or {})}

    @property
    def num_codes(self) -> int:
        """K, the size of the vocabulary."""
        return self.network.quantizer.num_codes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return every patch's token in float32, see `Tokenizer.encode`."""
        self.check_images(images)
        grid = self.grid_size((images.shape[2], images.shape[3]))
        with torch.autocast(self.device.type, enabled=False):
            ids = [
                self.network.encode_ids(as_float(part).to(self.device))
                for part in images.split(_IMAGES_AT_ONCE)
                if len(part)
            ]
        return torch.cat(ids).view(-1, *grid) if ids else torch.empty(0, *grid, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Return the images tokens stand for, in [0, 1], see `Tokenizer.decode`."""
        self.check_ids(ids)
        grid = (ids.shape[1], ids.shape[2])
        with torch.autocast(self.device.type, enabled=False):
            made = [
                self.network.pictures(self.network.decode_ids(part.flatten(1).to(self.device), grid))
                for part in ids.split(_IMAGES_AT_ONCE)
            ]
        return torch.cat(made)

    def fingerprint(self) -> str:
        """Return a hash of settings and weights."""
        return hash_of(self.network)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write `tokenizer.json` and the weights to a folder."""
        return save_network(self.network, Path(path), facts=self.facts, overwrite=overwrite)


class Network(Protocol):
    """The network of a learned tokenizer, which plain values make anew."""

    def arguments(self) -> dict[str, Any]:
        """Return these values."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return its tensors."""


def hash_of(network: Network) -> str:
    """Return a hash of a network's settings and weights, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(network.arguments(), sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_network(
    network: Network,
    path: Path,
    *,
    kind: str = KIND,
    facts: dict[str, Any],
    lineage: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network to a folder.

    Args:
        network: What makes tokens.
        path: The folder.
        kind: What it is, a name of `registry.TOKENIZERS`.
        facts: How it was made (plain values).
        lineage: What made it.
        overwrite: Replace one that is there.

    Raises:
        UsageError: There is something else, or a tokenizer and `overwrite` is not set.
    """
    if path.exists() and not (path.is_dir() and (overwrite or not any(path.iterdir()))):
        raise UsageError(f"{path} exists; give another place or overwrite=True")
    folder = make_folder(path)
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    versions = {"patchloom": __version__, "torch": torch.__version__, "timm": timm.__version__}
    try:
        with written_whole(folder / WEIGHTS) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)
        write_json(folder / LINEAGE, {"lineage": lineage or {}, "versions": versions}, default=str)
        about = {"kind": kind, "format": FORMAT, "network": network.arguments(), "facts": facts, "versions": versions}
        write_json(folder / ABOUT, about, default=str)  # last: it says that all is there
    except BaseException:
        if not (folder / ABOUT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def load_network(path: str | Path) -> tuple[ViTVQGAN, dict[str, Any]]:
    """Return the network of a run of `patchloom tokenize train vit_vqgan` or its model, in eval mode, and its facts.

    Raises:
        UsageError: There is none, it is damaged, or a tokenizer of another kind.
    """
    return read_network(path, KIND, ViTVQGAN.from_arguments)


def read_network(path: str | Path, kind: str, build: Callable[[Any], Made]) -> tuple[Made, dict[str, Any]]:
    """Return what `save_network` wrote, in eval mode, and its facts.

    Args:
        path: Run of `patchloom tokenize train`, or its model.
        kind: What it has to be.
        build: Makes the network of its arguments.

    Raises:
        UsageError: There is none, it is damaged, or a tokenizer of another kind.
    """
    folder = find_learned(path)
    if folder is None:
        raise UsageError(f"there is no learned tokenizer at {path}; train one: patchloom tokenize train {kind}")
    about = read_about(folder)
    if about["kind"] != kind:
        raise UsageError(f"{path} holds a tokenizer of kind {about['kind']}, not {kind}")
    try:
        network = build(about["network"])
        facts = dict(about["facts"])
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"{folder / ABOUT} is damaged ({reason}); train the tokenizer again") from error
    fill(network, read_tensors(folder / WEIGHTS, "train the tokenizer again"))
    return network.eval(), facts


def load_tokenizer(path: str | Path) -> LearnedTokenizer:
    """Return the tokenizer in a folder, see `load_network`."""
    return LearnedTokenizer(*load_network(path))
