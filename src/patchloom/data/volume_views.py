"""What an encoder is shown of a volume when it is measured: resampled to one size, in proportion or not.

>>> view = eval_view("crop", (16, 32, 32))
>>> volume = torch.rand(1, 20, 90, 100)
>>> view(volume, spacing=torch.tensor([5.0, 1.0, 1.0]))["volume"].shape
torch.Size([1, 16, 32, 32])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.choices import View
from patchloom.data.pixels import stretched, unit
from patchloom.errors import UsageError, unknown_name


class VolumeView:
    """The middle of a volume with voxels of one pitch along all axes, or all of it out of proportion.

    The middle covers the size with as little as can be: the body keeps its shape, whatever the distance of the slices.
    Axes that become shorter are averaged, others interpolated linearly.

    Args:
        view: `crop` or `whole`; the latter stretches each channel to its full range.
        size: (D, H, W) of the result, voxels.

    Raises:
        UsageError: There is no such view, or no such size.
    """

    reads = ("spacing",)

    def __init__(self, view: View, size: Sequence[int]) -> None:
        if view not in get_args(View):
            raise unknown_name("view", view, get_args(View))
        if len(size) != 3 or min(size) < 1:
            raise UsageError(f"the size {tuple(size)} is none of volumes; depth, height and width are at least 1")
        self.whole, self.size = view == "whole", tuple(int(side) for side in size)

    def __call__(
        self, volume: Tensor, generator: torch.Generator | None = None, *, spacing: Tensor
    ) -> dict[str, Tensor]:
        """Return {"volume": (C, *size) float32} of a volume (C, D, H, W); the generator is not used.

        Args:
            volume: (C, D, H, W) in [0, 1], or uint8.
            generator: Not used.
            spacing: (3,) distance of voxels along D, H and W, in one unit.
        """
        volume = unit(volume)
        if self.whole:
            resized = resampled(volume, self.size)
            return {"volume": stretched(resized.flatten(1, 2)).unflatten(1, resized.shape[1:3])}
        if tuple(volume.shape[1:]) == self.size:
            return {"volume": volume.contiguous()}
        extent = [count * apart for count, apart in zip(volume.shape[1:], spacing.tolist(), strict=True)]
        pitch = min(length / side for length, side in zip(extent, self.size, strict=True))
        sides = [max(side, round(length / pitch)) for length, side in zip(extent, self.size, strict=True)]
        resized = resampled(volume, sides)
        for axis, (have, side) in enumerate(zip(sides, self.size, strict=True), start=1):
            resized = resized.narrow(axis, (have - side) // 2, side)
        return {"volume": resized.contiguous()}


def resampled(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Return a volume (C, D, H, W) float at another (D, H, W): shorter axes averaged, longer ones interpolated."""
    depth, height, width = (min(have, side) for have, side in zip(volume.shape[1:], size, strict=True))
    fewer = depth, height, width
    reduced = F.adaptive_avg_pool3d(volume, fewer) if fewer != tuple(volume.shape[1:]) else volume
    if fewer == tuple(size):
        return reduced
    enlarged: Tensor = F.interpolate(reduced[None], size=list(size), mode="trilinear", align_corners=False)[0]
    return enlarged


def eval_view(view: View, size: int | Sequence[int]) -> VolumeView:
    """Return the view of that name at a size: a side, or (D, H, W)."""
    return VolumeView(view, (size,) * 3 if isinstance(size, int) else tuple(size))
