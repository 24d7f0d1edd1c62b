"""The two decoders of the DINOv2 radiology benchmark: linear, and one shaped like the upper half of a U-Net.

Baharoon et al. 2023, arXiv 2312.02366, and its published code. They take patch tokens and their grid.

>>> head = UNetSegHead(32, num_classes=3, patch_size=4).eval()
>>> head([torch.randn(1, 16, 32)] * 5, (4, 4)).shape
torch.Size([1, 3, 16, 16])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.segment.layers import resize
from patchloom.segment.necks import pyramid_maps


class LinearSegHead(nn.Module):
    """1x1 convolution on the last block's patch tokens, then bilinear enlargement of the logits.

    Args:
        embed_dim: Width of the tokens.
        num_classes: Classes.
        patch_size: Side of a patch in pixels.
    """

    num_blocks = 1

    def __init__(self, embed_dim: int, num_classes: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.decoder = nn.Conv2d(embed_dim, num_classes, 1)
        nn.init.normal_(self.decoder.weight, std=0.01)
        nn.init.zeros_(self.decoder.get_parameter("bias"))

    def forward(
        self, tokens: Sequence[Tensor], grid: tuple[int, int], image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return logits (B, num_classes, H, W) of a list of (B, N, D), of which the last counts.

        `image_size` is (H, W); default: the grid times the patch size.
        """
        (last,) = pyramid_maps(tokens[-1:], grid)
        return resize(self.decoder(last), image_size or _image_size(grid, self.patch_size))


class _UpBlock(nn.Module):
    """Twice the size, joined by a skip from a token map."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int, final_relu: bool) -> None:
        super().__init__()
        self.upconv = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)
        self.conv = _conv_norm(2 * out_channels, out_channels, final_relu)
        self.skip_conv = _conv_norm(embed_dim, out_channels, True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upconv(x)
        skip = F.interpolate(self.skip_conv(skip), size=x.shape[-2:], mode="bilinear", align_corners=True)
        out: Tensor = self.conv(torch.cat([x, skip], dim=1))
        return out


class UNetSegHead(nn.Module):
    """Four doublings from the last block's map, each joined by the map of an earlier block.

    Args:
        embed_dim: Width of the tokens, divisible by 8.
        num_classes: Classes.
        patch_size: Side of a patch in pixels.
        final_relu: End in ReLU as released, which leaves no negative logits; without it they are free.

    Raises:
        UsageError: The width is not divisible by 8.
    """

    num_blocks = 5

    def __init__(self, embed_dim: int, num_classes: int, patch_size: int, final_relu: bool = True) -> None:
        super().__init__()
        if embed_dim % 8:
            raise UsageError(f"embed_dim is {embed_dim}; the decoder halves it three times, so it must divide by 8")
        self.patch_size = patch_size
        widths = [embed_dim, embed_dim // 2, embed_dim // 4, embed_dim // 8, num_classes]
        for number, (a, b) in enumerate(pairwise(widths), start=1):
            setattr(self, f"up{number}", _UpBlock(a, b, embed_dim, final_relu or number < 4))

    def forward(
        self, tokens: Sequence[Tensor], grid: tuple[int, int], image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return logits (B, num_classes, H, W) of the tokens (B, N, D) of the last five blocks, last one last."""
        if len(tokens) != self.num_blocks:
            raise UsageError(f"this decoder takes the tokens of the last 5 blocks and gets {len(tokens)}")
        *skips, x = pyramid_maps(tokens, grid)
        for number, skip in enumerate(reversed(skips), start=1):
            x = getattr(self, f"up{number}")(x, skip)
        size = image_size or _image_size(grid, self.patch_size)
        if tuple(x.shape[-2:]) == tuple(size):
            return x
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


def _conv_norm(in_channels: int, out_channels: int, relu: bool) -> nn.Sequential:
    layers = [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def _image_size(grid: tuple[int, int], patch_size: int) -> tuple[int, int]:
    return grid[0] * patch_size, grid[1] * patch_size
