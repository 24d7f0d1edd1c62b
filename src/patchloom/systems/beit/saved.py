"""A trained VQ-KD on disk, and as a tokenizer.

>>> from patchloom.tokenizers import open_tokenizer
>>> tokenizer = open_tokenizer("runs/tokens")  # doctest: +SKIP
>>> tokenizer.encode(images).shape  # doctest: +SKIP
torch.Size([8, 14, 14])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchloom.base.sizes import Size, pair, size_text
from patchloom.errors import UsageError
from patchloom.systems.beit.vq_kd import VQKD, Distilled
from patchloom.systems.vit_vqgan.saved import hash_of, read_network, save_network
from patchloom.tokenizers.nearest import as_float
from patchloom.tokenizers.tokenizer import Tokenizer

KIND = "vq_kd"
_IMAGES_AT_ONCE = 64


class VQKDTokenizer(Tokenizer):
    """A VQ-KD as a tokenizer: images to tokens, and no images of tokens.

    Args:
        network: The network.
        facts: How it was made.
    """

    decodes: ClassVar[bool] = False

    def __init__(self, network: VQKD, facts: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.network = network.eval()
        self.patch_size, self.in_chans = network.patch_size, network.in_chans
        self.facts = {"image_size": list(network.image_size), **(facts or {})}

    @property
    def num_codes(self) -> int:
        """K, the size of the vocabulary."""
        return self.network.quantize.num_codes

    def forward(self, images: Tensor) -> Distilled:
        """Return tokens, codes and what is said of the teacher's features, of images in [0, 1]."""
        self.check_images(images)
        self.grid_size((images.shape[2], images.shape[3]))
        made: Distilled = self.network(images)
        return made

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return every patch's token in float32, see `Tokenizer.encode`; images of the size of training alone."""
        self.check_images(images)
        grid = self.grid_size((images.shape[2], images.shape[3]))
        parts = images.split(_IMAGES_AT_ONCE) if len(images) else ()
        ids = [self.network.encode_ids(as_float(part).to(self.device)) for part in parts]
        return torch.cat(ids).view(-1, *grid) if ids else torch.empty(0, *grid, dtype=torch.int64, device=self.device)

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        """Return (h, w), the tokens of an image; its positions are for one grid alone.

        Raises:
            UsageError: The image has another.
        """
        h, w = super().grid_size(image_size)
        if (h, w) != self.network.grid:
            own_h, own_w = self.network.grid
            raise UsageError(
                f"this tokenizer makes {own_h}x{own_w} tokens, of images of {size_text(self.network.image_size)} "
                f"pixels, and {h}x{w} are called for, those of images of {size_text(pair(image_size))}; train it at "
                f"that size, or take an encoder with {own_h}x{own_w} patches"
            )
        return h, w

    def fingerprint(self) -> str:
        """Return a hash of settings and weights."""
        return hash_of(self.network)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write `tokenizer.json` and the weights to a folder."""
        return save_network(self.network, Path(path), kind=KIND, facts=self.facts, overwrite=overwrite)


def load_network(path: str | Path) -> tuple[VQKD, dict[str, Any]]:
    """Return the network of a run of `patchloom tokenize train vq_kd` or its model, in eval mode, and its facts.

    Raises:
        UsageError: There is none, it is damaged, or a tokenizer of another kind.
    """
    return read_network(path, KIND, VQKD.from_arguments)


def load_tokenizer(path: str | Path) -> VQKDTokenizer:
    """Return the tokenizer in a folder, see `load_network`."""
    return VQKDTokenizer(*load_network(path))
