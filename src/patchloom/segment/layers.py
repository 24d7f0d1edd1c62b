"""What decoders are built of: convolution with norm and ReLU, resizing, and the classifier every head ends in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.ranges import Fraction, PositiveInt, checked
from patchloom.errors import UsageError

T = TypeVar("T")


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm (eps 1e-5, momentum 0.1) and ReLU; keys `conv.weight`, `bn.*`.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Side of the kernel; odd, padded so that the size of the map stays.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, H, W) of (B, in_channels, H, W)."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise UsageError(
                "batch normalisation of a 1x1 map needs at least two images per batch in training; raise batch_size"
            )
        out: Tensor = F.relu(self.bn(self.conv(x)))
        return out


class Head(nn.Module):
    """Base of the heads: dropout of whole channels, then the classifier `conv_seg`, a 1x1 convolution with bias.

    Args:
        channels: Channels in front of the classifier.
        num_classes: Classes.
        dropout: Probability of dropping a channel, in [0, 1).
    """

    @checked
    def __init__(self, channels: int, num_classes: PositiveInt, dropout: Fraction) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.get_parameter("bias"))

    def classify(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, h, w) of features (B, channels, h, w)."""
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits

    if TYPE_CHECKING:

        def __call__(self, maps: Sequence[Tensor]) -> Tensor:
            """Return logits (B, num_classes, h, w) at the head's own resolution."""
            ...


def resize(x: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Return (B, C, h, w) resampled to `size`, corners not aligned, without antialiasing; itself where it fits."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    corners = None if mode in ("area", "nearest") else False
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=corners)


def resized_concat(maps: Sequence[Tensor | Sequence[Tensor]], factors: Sequence[float] | None = None) -> Tensor:
    """Return maps side by side on the channels, all at the size of the first.

    Args:
        maps: (B, C_i, h_i, w_i), or (B, C_i) class tokens, which are spread over the map; lists among them are
            taken apart.
        factors: For each map a factor its size is changed by first: bilinear from 1 on, by area below.

    Raises:
        UsageError: Another number of factors than maps.
    """
    flat = [x for item in maps for x in ([item] if isinstance(item, Tensor) else item)]
    flat = [x[:, :, None, None] if x.ndim == 2 else x for x in flat]
    if factors is not None:
        if len(factors) != len(flat):
            raise UsageError(f"{len(factors)} resize factors do not belong to {len(flat)} maps")
        flat = [
            F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
            if factor >= 1
            else F.interpolate(x, scale_factor=factor, mode="area")
            for x, factor in zip(flat, factors, strict=True)
        ]
    return torch.cat([resize(x, flat[0].shape[-2:]) for x in flat], dim=1)


def select_maps(maps: Sequence[T], in_index: int | Sequence[int] | None) -> list[T]:
    """Return the maps that a head takes: one, several in the order named, or with None all.

    Raises:
        UsageError: There is no such map.
    """
    if in_index is None:
        return list(maps)
    for index in (indices := [in_index] if isinstance(in_index, int) else in_index):
        if not -len(maps) <= index < len(maps):
            raise UsageError(f"in_index is {in_index} and there are {len(maps)} maps; choose among them")
    return [maps[index] for index in indices]


def check_channels(x: Tensor, expected: int, head: str) -> None:
    """Refuse a map of another width than a head was made for.

    Raises:
        UsageError: Names both.
    """
    if x.shape[1] != expected:
        raise UsageError(f"{head} was made for {expected} channels and the maps have {x.shape[1]}")
