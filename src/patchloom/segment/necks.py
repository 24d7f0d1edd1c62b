"""From the maps of a plain ViT, all of one stride, to a pyramid of strides 4, 8, 16, 32.

mmsegmentation's MultiLevelNeck, BEiT's and MAE's neck (arXiv 2106.08254), ViTDet's simple feature pyramid (arXiv
2203.16527). Parameters bear the published names.

>>> pyramid = ViTNeck("beit", 16)([torch.randn(1, 16, 4, 4)] * 4)
>>> [tuple(level.shape[-2:]) for level in pyramid]
[(16, 16), (8, 8), (4, 4), (2, 2)]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.errors import UsageError, unknown_name


class _Conv(nn.Module):
    """A convolution with bias and nothing else, under the name `conv`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class MultiLevelNeck(nn.Module):
    """One map per level: 1x1 convolution, change of size, 3x3 convolution; no norm, no activation.

    Args:
        in_channels: Channels of the maps.
        out_channels: Channels of every level.
        scales: Change of size of each level; the maps have stride 16.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        if len(in_channels) not in (1, len(scales)):
            raise UsageError(f"{len(in_channels)} maps make no {len(scales)} levels; give one per level, or one")
        self.scales = tuple(scales)
        self.lateral_convs = nn.ModuleList(_Conv(width, out_channels, 1) for width in in_channels)
        self.convs = nn.ModuleList(_Conv(out_channels, out_channels, 3) for _ in scales)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return (B, out_channels, h * scale, w * scale) per level; a single map serves all levels."""
        _check_count(maps, len(self.lateral_convs), "MultiLevelNeck")
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        levels = levels * len(self.scales) if len(levels) == 1 else levels
        return [
            conv(F.interpolate(x, scale_factor=float(scale), mode="bilinear", align_corners=False))
            for conv, x, scale in zip(self.convs, levels, self.scales, strict=True)
        ]


class ViTNeck(nn.Module):
    """The neck of BEiT and MAE: transposed convolutions for the finer levels, pooling for the coarser.

    Args:
        kind: `beit`; there is no other.
        embed_dim: Channels of the maps and of all levels.
        stride: Of the maps: 16, or 8, from which one convolution less leads to stride 4.

    Raises:
        UsageError: Another kind or stride.
    """

    def __init__(self, kind: str = "beit", embed_dim: int = 768, stride: int = 16) -> None:
        super().__init__()
        if kind != "beit":
            raise unknown_name("neck", kind, ("beit",))
        if stride not in (8, 16):
            raise UsageError(f"maps of stride {stride} have no neck of BEiT's; it is made for strides 8 and 16")
        if stride == 8:
            self.fpn1 = nn.Sequential(nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2))
            self.fpn2: nn.Module = nn.Identity()
            self.fpn3: nn.Module = nn.MaxPool2d(2, 2)
            self.fpn4 = nn.MaxPool2d(4, 4)
            return
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2),
            nn.BatchNorm2d(embed_dim),
            nn.GELU(),
            nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2, 2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return levels of strides 4, 8, 16 and 32 of four maps: (B, D, 4 h, 4 w) to (B, D, h // 2, w // 2) of 16."""
        _check_count(maps, 4, "the neck")
        return [level(x) for level, x in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps, strict=True)]


class _NormedConv(nn.Conv2d):
    """A convolution without bias and a norm over channels, in one module as detectron2 has it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = self.norm(super().forward(input))
        return normed


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid, made of the last map alone.

    Args:
        embed_dim: Channels of the map, of stride 16.
        out_channels: Channels of every level.
        top: Add a level of stride 64.
    """

    def __init__(self, embed_dim: int, out_channels: int = 256, top: bool = False) -> None:
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4

        def mixed(width: int) -> list[nn.Module]:
            return [_NormedConv(width, out_channels, 1), _NormedConv(out_channels, out_channels, 3)]

        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(embed_dim, half, 2, 2),
            LayerNorm2d(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            *mixed(quarter),
        )
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(embed_dim, half, 2, 2), *mixed(half))
        self.simfp_4 = nn.Sequential(*mixed(embed_dim))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, 2), *mixed(embed_dim))
        self.top = top

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return (B, out_channels, …) at strides 4, 8, 16, 32 (and 64 with `top`)."""
        levels = [stage(maps[-1]) for stage in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        return [*levels, F.max_pool2d(levels[-1], 1, 2)] if self.top else levels


def pyramid_maps(tokens: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Return patch tokens (B, N, D) as maps (B, D, h, w), row-major.

    Raises:
        UsageError: The grid has another number of patches.
    """
    for x in tokens:
        if x.shape[1] != grid[0] * grid[1]:
            raise UsageError(f"a grid of {grid[0]} x {grid[1]} does not hold {x.shape[1]} patches")
    return [torch.unflatten(x.transpose(1, 2), 2, grid).contiguous() for x in tokens]


def _check_count(maps: Sequence[Tensor], expected: int, neck: str) -> None:
    if len(maps) != expected:
        raise UsageError(f"{neck} was made for {expected} maps and gets {len(maps)}")
