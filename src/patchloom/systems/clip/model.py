"""Two towers that meet in one space (CLIP, Radford et al. 2021, arXiv 2103.00020), with the names open_clip gives them.

>>> import timm, torch, patchloom
>>> trunk = timm.create_model("vitamin_tiny_64", num_classes=0)
>>> model = CLIP(trunk, TextTower(width=64, heads=2, layers=1, output_dim=32))
>>> images, texts, scale = model(torch.zeros(2, 3, 64, 64), tokenize_all(["a cat", "a dog"], 16))
>>> images.shape, texts.shape, round(float(scale), 2)
(torch.Size([2, 32]), torch.Size([2, 32]), 14.29)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchloom.encoders import embed_dim
from patchloom.systems.clip.text import TextTower, tokenize_all, trimmed

__all__ = ["CLIP", "ImageTower", "TextTower", "chunked", "tokenize_all"]


class ImageTower(nn.Module):
    """A model of timm without its classifier, and a linear layer: open_clip's `TimmModel`.

    Args:
        trunk: (B, C, H, W) to pooled features (B, W).
        width: W.
        embed_dim: Width D of the common space.
    """

    def __init__(self, trunk: nn.Module, width: int, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(width, embed_dim, bias=False)))

    @property
    def encoder(self) -> Any:
        """The trunk, which is what a bundle is made of."""
        return self.trunk

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, D) for normalised images (B, C, H, W)."""
        features: Tensor = self.head(self.trunk(images))
        return features


class CLIP(nn.Module):
    """An image tower, a text tower and the factor on their similarities.

    The state dict is that of open_clip's `CustomTextCLIP`: `visual.trunk.…`, `visual.head.proj.weight`, `text.…`,
    `logit_scale`.

    Args:
        trunk: A model of timm without its classifier.
        text: Tokens (B, L) to (B, D).
        temperature: That the similarities are divided by at first.
        tower: Class of the image tower.
    """

    def __init__(
        self, trunk: Any, text: TextTower, temperature: float = 0.07, tower: type[ImageTower] = ImageTower
    ) -> None:
        super().__init__()
        self.visual = tower(trunk, embed_dim(trunk), int(text.output_dim))
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    @property
    def encoder(self) -> Any:
        """The trunk of the image tower, which is what a bundle is made of."""
        return self.visual.trunk

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return (B, D) for images (B, C, H, W) normalised as the trunk takes them; of length 1, float32, if asked."""
        features: Tensor = self.visual(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False, chunk_size: int | None = None) -> Tensor:
        """Return (B, D) for tokens (B, L), likewise; see `chunked`."""
        tokens = trimmed(tokens)
        if chunk_size is None:
            features: Tensor = self.text(tokens)
        else:  # embeddings of all at once: the gradient of the vocabulary is as large for a chunk as for a batch
            features = chunked(self.text, tokens, self.text.token_embedding(tokens), size=chunk_size)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> tuple[Any, Any, Tensor]:
        """Return both features, of length 1 (None of what is not given), and the factor on similarities."""
        return (
            None if images is None else self.encode_image(images, normalize=True),
            None if tokens is None else self.encode_text(tokens, normalize=True),
            self.logit_scale.exp(),
        )

    def clamp_scale(self, most: float = 100.0) -> None:
        """Keep the factor on similarities between 1 and `most`."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(most))


def chunked(encode: Callable[..., Tensor], *inputs: Tensor, size: int | None) -> Tensor:
    """Return what a tower makes of a batch, its activations kept for `size` rows at a time.

    Features of all chunks are there for the loss; in the backward pass each chunk goes through the tower once more, and
    its activations are freed before the next one's. Gradients are those of the whole batch (GradCache, Gao et al. 2021,
    arXiv 2101.06983); draws, such as those of drop path, are repeated.

    Args:
        encode: A tower.
        *inputs: What it takes, (B, …) each.
        size: Rows at a time; None: all, and nothing is computed twice.
    """
    if size is None or size >= len(inputs[0]):
        return encode(*inputs)
    parts = zip(*(each.split(size) for each in inputs), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([encode(*part) for part in parts])
    return torch.cat([checkpoint(encode, *part, use_reentrant=False) for part in parts])
