"""What every tokenizer has in common: images in, a grid of token ids out, and back where it can.

Centroids of raw patches and learned tokenizers answer the same questions, so whatever is trained on tokens takes
either. All images are in [0, 1] (or uint8), **not** normalised by mean and standard deviation: what a network within
a tokenizer needs besides, the tokenizer does by itself.

>>> tokenizer = open_tokenizer("runs/tokens")  # doctest: +SKIP
>>> ids = tokenizer.encode(images)  # doctest: +SKIP
>>> tokenizer.decode(ids).shape == images.shape  # doctest: +SKIP
True
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from patchloom import registry
from patchloom.base.sizes import Size, pair
from patchloom.encoders.patches import patch_grid, patchify, unpatchify
from patchloom.errors import UsageError, unknown_name
from patchloom.tokenizers.nearest import as_float

ABOUT = "tokenizer.json"
"""The file in a folder by which a learned tokenizer is known; its entry `kind` is a name of `registry.TOKENIZERS`."""
KEPT = "tokenizer"
"""The folder of a learned tokenizer in a run that keeps it."""
# How far outside [0, 1] a value may lie: resampling and half precision stay within, mean/std normalisation does not.
_RANGE_SLACK = 1e-3
_IMAGES_AT_ONCE = 64


class Tokenizer(nn.Module, ABC):
    """From images to a grid of token ids, and back where `decodes` says so; in eval mode whatever trains around it.

    Attributes:
        patch_size: Side in pixels of the square of an image that one token stands for.
        in_chans: Channels of the images.
        decodes: Whether `decode` makes images of tokens.
        called: The word for it in messages.
        facts: How it was made (plain values; empty when unknown): `reading`, how the images were read; `image_size`, of
            those it was made on. Saved along.
    """

    decodes: ClassVar[bool] = True
    called: ClassVar[str] = "tokenizer"
    patch_size: int
    in_chans: int
    facts: dict[str, Any]

    @property
    @abstractmethod
    def num_codes(self) -> int:
        """K, the size of the vocabulary; ids are 0 to K - 1."""

    @property
    def device(self) -> torch.device:
        """Where tokens are made."""
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return every patch's token.

        Args:
            images: (B, C, H, W) in [0, 1], any float type, or uint8; H and W divisible by the patch size.

        Returns:
            (B, h, w) int64 on the tokenizer's device.

        Raises:
            UsageError: Values outside [0, 1] or NaN, other channels, a side not divisible by the patch size.
        """

    def decode(self, ids: Tensor) -> Tensor:
        """Return the images tokens stand for.

        Args:
            ids: (B, h, w) integers from 0 to K - 1.

        Returns:
            (B, C, h * patch_size, w * patch_size) float32.

        Raises:
            UsageError: An id outside 0 … K - 1, no three dimensions, or a tokenizer whose tokens are no pixels.
        """
        raise UsageError(
            f"a {type(self).__name__} makes tokens of images, and no images of tokens; take centroids or a vit_vqgan"
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when a token of some image may."""

    @abstractmethod
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it to a place that `open_tokenizer` opens.

        Raises:
            UsageError: Something is there and `overwrite` is not set.
        """

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        """Return (h, w), the tokens of an image of a size.

        Raises:
            UsageError: A side is not divisible by the patch size.
        """
        h, w = patch_grid(pair(image_size), self.patch_size)
        return h, w

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W), the size of the images that have so many tokens."""
        return grid[0] * self.patch_size, grid[1] * self.patch_size

    def check_fits(self, patch_size: int, in_chans: int) -> None:
        """Refuse an encoder whose patches this tokenizer's tokens do not line up with.

        Args:
            patch_size: Of the encoder.
            in_chans: Of the encoder.

        Raises:
            UsageError: They differ from the tokenizer's.
        """
        if patch_size != self.patch_size:
            raise UsageError(
                f"the {self.called} is of patch size {self.patch_size}, the encoder of patch size {patch_size}; make a "
                f"{self.called} with patch_size={patch_size} or take an encoder of patch size {self.patch_size}"
            )
        if in_chans != self.in_chans:
            raise UsageError(
                f"the {self.called} is of images with {self.in_chans} channels, the encoder takes {in_chans}; make a "
                f"{self.called} on images with {in_chans} channels"
            )

    @torch.no_grad()
    def replace(self, images: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """Paste over the marked patches what their tokens stand for, as CCViT corrupts images.

        Args:
            images: (B, C, H, W) in [0, 1] or uint8.
            mask: (B, h, w) or (B, h * w) bool, True where to paste.
            ids: (B, h, w) or (B, h * w) tokens of the images where they are known already; else found here.

        Returns:
            (B, C, H, W) float32 in [0, 1] (the input's type if floating), a new tensor.

        Raises:
            UsageError: As `encode`; or mask or ids of another shape than the patch grid.
        """
        self.check_images(images)
        grid = self.grid_size((images.shape[2], images.shape[3]))
        marked = self.on_grid(mask, grid, len(images), "mask")
        if marked.dtype != torch.bool:
            raise UsageError(f"a mask is of type bool, not {marked.dtype}")
        tokens = self.encode(images) if ids is None else self.on_grid(ids, grid, len(images), "ids").view(-1, *grid)
        patches = patchify(as_float(images).to(self.device), self.patch_size)
        patches[marked] = patchify(self.decode(tokens).clamp(0, 1), self.patch_size)[marked].to(patches.dtype)
        pasted = unpatchify(patches, self.patch_size, grid, self.in_chans)
        return pasted.to(images.dtype) if images.is_floating_point() else pasted

    @torch.no_grad()
    def squared_error(self, images: Tensor, ids: Tensor) -> float:
        """Return the sum over values of the squared difference between images and what is decoded (float64 sum)."""
        total = 0.0
        for part, tokens in zip(images.split(_IMAGES_AT_ONCE), ids.split(_IMAGES_AT_ONCE), strict=True):
            decoded = self.decode(tokens).clamp(0, 1)
            total += float((as_float(part).to(decoded) - decoded).double().square().sum())
        return total

    @torch.no_grad()
    def report(self, images: Tensor) -> dict[str, float | int]:
        """Return how well the vocabulary covers images.

        Args:
            images: (B, C, H, W) in [0, 1] or uint8.

        Returns:
            `usage`: share of the K codes that occur, 0 … 1; `perplexity`: exp of the tokens' entropy, 1 … K; where it
            decodes, `psnr` in dB (peak 1) and `mse` per value of the images made of tokens; `dead`: codes that do not
            occur; `tokens`: patches looked at.
        """
        ids = self.encode(images)
        if not ids.numel():
            raise UsageError("a codebook is judged on at least one image")
        counts = torch.bincount(ids.flatten(), minlength=self.num_codes)
        figures: dict[str, float | int] = {**use_of(counts)}
        if self.decodes:
            mse = self.squared_error(images, ids) / images.numel()
            figures |= {"psnr": 10 * math.log10(1 / mse) if mse > 0 else math.inf, "mse": mse}
        return figures | {"tokens": ids.numel()}

    def check_images(self, images: Tensor) -> None:
        """Refuse what is no batch of images in [0, 1].

        Raises:
            UsageError: Other channels, values outside [0, 1], or NaN.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UsageError(
                f"the tokenizer takes images (B, {self.in_chans}, H, W), not a tensor of shape {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8 or not images.numel():
            return
        low, high = (float(value) for value in images.aminmax())
        # written so that NaN fails it
        if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):
            raise UsageError(
                f"the tokenizer takes images in [0, 1], these reach from {low:.4g} to {high:.4g}, which looks "
                "normalised; tokenise before mean/std normalisation"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Refuse ids that are no tokens of this vocabulary.

        Raises:
            UsageError: No (B, h, w), or an id outside 0 … K - 1.
        """
        if ids.ndim != 3:
            raise UsageError(f"token ids are (B, h, w), not of shape {tuple(ids.shape)}")
        self.check_values(ids)

    def check_values(self, ids: Tensor) -> None:
        """Refuse ids outside the vocabulary, whatever their shape."""
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.num_codes):
            raise UsageError(
                f"token ids from {int(ids.min())} to {int(ids.max())}; this codebook has 0 to {self.num_codes - 1}"
            )

    def on_grid(self, values: Tensor, grid: tuple[int, int], batch: int, what: str) -> Tensor:
        """Return mask or ids as (B, h * w) on the tokenizer's device; refuse those of another grid."""
        h, w = grid
        if tuple(values.shape) not in ((batch, h, w), (batch, h * w)):
            raise UsageError(
                f"{what} of shape {tuple(values.shape)} for {batch} images of {h}x{w} patches; ({batch}, {h}, {w}) fits"
            )
        return values.reshape(batch, h * w).to(self.device)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the training around it is in: an image's tokens must not be drawn."""
        return super().train(False)


def use_of(counts: Tensor) -> dict[str, float | int]:
    """Return how much of a vocabulary is in use.

    Args:
        counts: (K,) how often each code occurs, not all 0.

    Returns:
        `usage`, the share of the codes that occur; `perplexity`, exp of the entropy; `dead`, the codes that do not.
    """
    shares = counts[counts > 0].double() / counts.sum()
    dead = int((counts == 0).sum())
    return {
        "usage": 1 - dead / len(counts),
        "perplexity": float(torch.exp(-(shares * shares.log()).sum())),
        "dead": dead,
    }


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer at a place, frozen and in eval mode.

    Args:
        path: A codebook of `tokenize fit` (folder or file), a run of `tokenize train` or its `model/`, or a run that
            keeps its tokenizer (`pretrain ccvit`).

    Raises:
        UsageError: There is none, it is damaged, or of a kind that is not known here.
    """
    if (folder := find_learned(path)) is not None:
        about = read_about(folder)
        kind = str(about.get("kind"))
        if kind not in registry.TOKENIZERS:
            raise unknown_name("kind of tokenizer", kind, registry.TOKENIZERS)
        tokenizer: Tokenizer = registry.load(registry.TOKENIZERS[kind])(folder)  # by its place: systems stand above
    else:
        from patchloom.tokenizers.centroid import CentroidTokenizer

        tokenizer = CentroidTokenizer.load(path)
    return tokenizer.requires_grad_(False).eval()


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder of something else, from where `open_tokenizer(folder)` opens it."""
    from patchloom.tokenizers.codebook_file import CODEBOOK_NAME

    tokenizer.save(folder / (CODEBOOK_NAME if tokenizer.called == "codebook" else KEPT), overwrite=True)


def find_learned(path: str | Path) -> Path | None:
    """Return the folder of the learned tokenizer meant by a path; None where there is none."""
    given = Path(path)
    places = (given, given / "model", given / KEPT)
    return next((place for place in places if (place / ABOUT).is_file()), None)


def read_about(folder: Path) -> dict[str, Any]:
    """Return what a learned tokenizer's folder says of it.

    Raises:
        UsageError: The file is damaged.
    """
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"{folder / ABOUT} is damaged ({reason}); train the tokenizer again") from error
    return about
