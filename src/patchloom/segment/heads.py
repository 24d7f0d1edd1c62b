"""Decoders on maps of an encoder: linear, BatchNorm-linear, fully convolutional, SETR's.

The heads of mmsegmentation 0.x, SETR's (Zheng et al. 2020, arXiv 2012.15840) and DINOv2's BNHead (arXiv 2304.07193).
All take a list of maps (B, C, h, w) and return logits at their own resolution; parameters bear the published names.

>>> head = BNHead([32, 32], num_classes=5).eval()
>>> head([torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8)]).shape
torch.Size([2, 5, 8, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.segment.layers import ConvBN, Head, check_channels, resized_concat, select_maps


class LinearHead(Head):
    """One 1x1 convolution on one map, or on several side by side.

    Args:
        in_channels: Channels of the maps, together or one by one.
        num_classes: Classes.
        dropout: Probability of dropping a channel.
        norm: `bn` for BatchNorm, `ln` for LayerNorm over channels, `none`.
        dropout_first: Drop channels before the norm instead of after it, as DINOv3 does.
        in_index: Which of the maps; default: all.

    Raises:
        UsageError: Unknown norm.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        dropout: float = 0.0,
        norm: Literal["none", "bn", "ln"] = "none",
        dropout_first: bool = False,
        in_index: int | Sequence[int] | None = None,
    ) -> None:
        self.in_channels = _total(in_channels)
        super().__init__(self.in_channels, num_classes, dropout)
        if norm not in ("none", "bn", "ln"):
            raise unknown_name("norm", norm, ("none", "bn", "ln"))
        self.norm: nn.Module = nn.Identity()
        if norm != "none":
            self.norm = nn.BatchNorm2d(self.in_channels) if norm == "bn" else LayerNorm2d(self.in_channels)
        self.dropout_first = dropout_first
        self.in_index = in_index

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h, w) at the size of the first map."""
        x = resized_concat(select_maps(maps, self.in_index))
        check_channels(x, self.in_channels, "the linear head")
        if self.dropout_first:
            logits: Tensor = self.conv_seg(self.norm(self.dropout(x)))
            return logits
        return self.classify(self.norm(x))


class BNHead(Head):
    """DINOv2's linear evaluation: BatchNorm over the maps side by side, then a 1x1 convolution. No ReLU.

    Args:
        in_channels: Channels of the maps, together or one by one.
        num_classes: Classes.
        dropout: Probability of dropping a channel; published: 0.
        resize_factors: A factor for the size of each map; default: none.
        in_index: Which of the maps; default: all.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        dropout: float = 0.0,
        resize_factors: Sequence[float] | None = None,
        in_index: int | Sequence[int] | None = None,
    ) -> None:
        self.in_channels = _total(in_channels)
        super().__init__(self.in_channels, num_classes, dropout)
        self.bn = nn.BatchNorm2d(self.in_channels)
        self.resize_factors = resize_factors
        self.in_index = in_index

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h, w) at the size of the first map."""
        x = resized_concat(select_maps(maps, self.in_index), self.resize_factors)
        check_channels(x, self.in_channels, "the BatchNorm head")
        return self.classify(self.bn(x))


class FCNHead(Head):
    """Convolutions on one map: the auxiliary head of UPerNet.

    Args:
        in_channels: Channels of the map; of several side by side, their sum.
        num_classes: Classes.
        channels: Width.
        num_convs: Convolutions; 0 for none.
        concat_input: Join the map to what the convolutions made of it, by one more convolution.
        in_index: Which of the maps; several are put side by side.
        dropout: Probability of dropping a channel.
        kernel_size: Side of the kernels.

    Raises:
        UsageError: Without convolutions, the width has to be that of the map.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        num_convs: int = 1,
        concat_input: bool = False,
        in_index: int | Sequence[int] = 2,
        dropout: float = 0.1,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        if num_convs == 0 and channels != in_channels:
            raise UsageError(f"without convolutions, channels {channels} must equal in_channels {in_channels}")
        self.in_index = in_index
        self.in_channels = in_channels
        widths = [in_channels, *[channels] * num_convs]
        self.convs = nn.Sequential(*(ConvBN(a, b, kernel_size) for a, b in pairwise(widths)))
        self.conv_cat = ConvBN(in_channels + channels, channels, kernel_size) if concat_input else None

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h, w) at the size of its map."""
        x = resized_concat(select_maps(maps, self.in_index))
        check_channels(x, self.in_channels, "the convolutional head")
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.classify(out)


class SETRUPHead(Head):
    """SETR's progressive upsampling: LayerNorm, then convolutions, each followed by an enlargement.

    `num_convs=4, up_scale=2` is the main head of SETR-PUP (full resolution from stride 16), `num_convs=1,
    up_scale=4` its auxiliary heads, and with `kernel_size=1` SETR-Naive.

    Args:
        in_channels: Channels of the map.
        num_classes: Classes.
        channels: Width.
        num_convs: Stages.
        up_scale: Enlargement of each stage.
        kernel_size: Side of the kernels.
        in_index: Which of the maps.
        dropout: Probability of dropping a channel.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        num_convs: int = 4,
        up_scale: int = 2,
        kernel_size: int = 3,
        in_index: int = -1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.in_index = in_index
        self.in_channels = in_channels
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        widths = [in_channels, *[channels] * num_convs]
        self.up_convs = nn.ModuleList(
            nn.Sequential(
                ConvBN(a, b, kernel_size), nn.Upsample(scale_factor=up_scale, mode="bilinear", align_corners=False)
            )
            for a, b in pairwise(widths)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h * s, w * s), s = up_scale ** num_convs."""
        x = resized_concat(select_maps(maps, self.in_index))
        check_channels(x, self.in_channels, "SETR's head")
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for stage in self.up_convs:
            x = stage(x)
        return self.classify(x)


def _total(in_channels: int | Sequence[int]) -> int:
    return in_channels if isinstance(in_channels, int) else sum(in_channels)
