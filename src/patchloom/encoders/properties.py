"""What the rest of the library asks of an encoder, so that nothing asks for its class.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> embed_dim(encoder), depth(encoder), patch_size(encoder), grid_size(encoder), num_prefix_tokens(encoder)
(192, 12, 16, (14, 14), 1)
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from patchloom.patches import patch_grid

Encoder: TypeAlias = Any
"""A timm `VisionTransformer`, `Beit` or `Eva`. Their attributes are not declared on `nn.Module`, hence `Any`."""


def embed_dim(encoder: Encoder) -> int:
    """Return the width D of the tokens."""
    return int(encoder.embed_dim)


def depth(encoder: Encoder) -> int:
    """Return the number of blocks."""
    return len(encoder.blocks)


def patch_size(encoder: Encoder) -> int:
    """Return the side of a patch in pixels."""
    return int(encoder.patch_embed.feat_ratio())  # behind a convolutional stem, its strides count too


def num_prefix_tokens(encoder: Encoder) -> int:
    """Return the number of class and register tokens in front of the patch tokens."""
    return int(encoder.num_prefix_tokens)


def image_size(encoder: Encoder) -> tuple[int, int]:
    """Return the (H, W) in pixels the encoder is set up for."""
    height, width = encoder.patch_embed.img_size
    return int(height), int(width)


def grid_size(encoder: Encoder, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the number of patches (down, across) of an image of `size` (default: the encoder's own)."""
    if size is None or tuple(size) == image_size(encoder):
        # As built: an encoder made for a size that patches do not fill leaves out the rest.
        height, width = encoder.patch_embed.grid_size
        return int(height), int(width)
    return patch_grid(size, patch_size(encoder))


def in_chans(encoder: Encoder) -> int:
    """Return the number of channels of the images the encoder takes."""
    # Behind a convolutional stem, `proj` takes the stem's channels.
    return int(getattr(encoder, "in_chans", encoder.patch_embed.proj.weight.shape[1]))


def normalize(images: Tensor, encoder: Encoder) -> Tensor:
    """Return images in [0, 1] normalised by the encoder's own mean and standard deviation.

    Args:
        images: (B, C, H, W) float in [0, 1].
        encoder: Its `pretrained_cfg` gives mean and standard deviation per RGB channel; other numbers of channels
            take their average.
    """
    config = encoder.pretrained_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    if len(mean) != images.shape[1]:
        mean, std = mean.mean().expand(images.shape[1]), std.mean().expand(images.shape[1])
    mean, std = (value.to(images).view(1, -1, 1, 1) for value in (mean, std))
    return (images - mean) / std
