"""Random crops of volumes for training: around what is there, turned, mirrored, brighter or darker.

The crops of a volume are those of Hi-End-MAE (Tan et al. 2025, arXiv 2502.08347), whose code takes them from MONAI: the
centres of most lie in the foreground, axes are mirrored, planes turned by quarters. A crop is taken at the voxels of
the file and brought to the wanted spacing by itself, so that a large scan is never resampled whole.

>>> crops = VolumeCrops((8, 16, 16), crops=4)
>>> crops(torch.rand(1, 40, 60, 60), torch.Generator(), spacing=torch.tensor([5.0, 1.0, 1.0]))["volume"].shape
torch.Size([4, 1, 8, 16, 16])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.ranges import NonNegative, PositiveInt, Probability, Shares, checked
from patchloom.data.pixels import unit
from patchloom.data.volume_views import resampled
from patchloom.errors import UsageError

UNKNOWN = 255
TRIES = 4096
"""Voxels looked at before all are, to find one of the foreground."""


class VolumeCrops:
    """Crops of one size, several from each volume, with their masks where these are wanted.

    Args:
        size: (D, H, W) of a crop, voxels.
        crops: Crops from a volume.
        foreground: Share of the crops whose centre lies in the foreground: in a class other than 0, or without masks
            where the volume is not 0; the centres of the others do not.
        flip: Probability of the mirror image along each axis.
        rotate: Probability of one to three quarter turns in the plane of the last two axes.
        jitter: Largest change of contrast (a factor) and brightness (added), either way.
        jitter_prob: Probability of each of the two.
        spacing: Distance of voxels along D, H and W in mm that crops are brought to; None: as stored.
        masks: Give the masks of the crops, too.
        trim: Take crops from the box around what is not 0 only.
    """

    @checked
    def __init__(
        self,
        size: tuple[int, ...],
        crops: PositiveInt = 8,
        foreground: Probability = 0.75,
        flip: Probability = 0.5,
        rotate: Probability = 0.3,
        jitter: NonNegative = 0.1,
        jitter_prob: Probability = 0.1,
        spacing: tuple[float, ...] | None = None,
        masks: bool = False,
        trim: bool = False,
    ) -> None:
        self.size, self.crops, self.foreground = tuple(size), crops, foreground
        self.flip, self.rotate, self.jitter, self.jitter_prob = flip, rotate, jitter, jitter_prob
        self.spacing, self.masks, self.trim = spacing, masks, trim
        self.reads = ("spacing", "mask") if masks else ("spacing",)

    def __call__(
        self, volume: Tensor, generator: torch.Generator, *, spacing: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"volume": (n, C, *size) float32} and, of masks, "mask": (n, *size) uint8, 255 outside the volume.

        Args:
            volume: (C, D, H, W) in [0, 1], or uint8.
            generator: Where draws come from.
            spacing: (3,) distance of voxels along D, H and W, in mm.
            mask: (D, H, W) uint8.
        """
        there = volume.amax(0) > 0 if mask is None else (mask > 0) & (mask != UNKNOWN)
        box = _box_of(volume.amax(0) > 0) if self.trim else [(0, side) for side in volume.shape[1:]]
        extent = self._extent(spacing)
        wanted = round(self.crops * self.foreground)
        found = []
        for number in range(self.crops):
            centre = _draw_voxel(there, number < wanted, box, generator)
            found.append(self._crop(volume, mask, centre, extent, box, generator))
        batch = {"volume": torch.stack([crop for crop, _ in found])}
        if self.masks:
            batch["mask"] = torch.stack([part for _, part in found if part is not None])
        return batch

    def _extent(self, spacing: Tensor) -> list[int]:
        """Return how many voxels of the file a crop covers along each axis."""
        if self.spacing is None:
            return list(self.size)
        return [
            max(1, round(side * wanted / have))
            for side, wanted, have in zip(self.size, self.spacing, spacing.tolist(), strict=True)
        ]

    def _crop(
        self,
        volume: Tensor,
        mask: Tensor | None,
        centre: list[int],
        extent: list[int],
        box: list[tuple[int, int]],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor | None]:
        starts = [
            min(max(middle - side // 2, low), max(low, high - side))
            for middle, side, (low, high) in zip(centre, extent, box, strict=True)
        ]
        spans = [
            slice(start, min(start + side, high)) for start, side, (_, high) in zip(starts, extent, box, strict=True)
        ]
        short = [side - (span.stop - span.start) for side, span in zip(extent, spans, strict=True)]
        pads = [part for missing in reversed(short) for part in (missing // 2, missing - missing // 2)]
        crop = resampled(F.pad(unit(volume[(slice(None), *spans)]), pads), self.size)
        part = None
        if self.masks and mask is not None:
            labels = F.pad(mask[tuple(spans)], pads, value=UNKNOWN)[None, None].float()
            part = F.interpolate(labels, size=list(self.size), mode="nearest-exact")[0, 0].to(torch.uint8)
        return self._changed(crop, part, generator)

    def _changed(self, crop: Tensor, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return a crop and its mask, mirrored and turned alike; the crop brighter or darker."""
        draws = torch.rand(9, generator=generator).tolist()
        axes = [axis for axis in range(3) if draws[axis] < self.flip]
        turns = 1 + int(draws[4] * 3) if draws[3] < self.rotate else 0
        if self.size[1] != self.size[2]:
            turns = turns // 2 * 2  # others would change the shape
        crop = crop.flip([1 + axis for axis in axes]).rot90(turns, (2, 3))
        mask = None if mask is None else mask.flip(axes).rot90(turns, (1, 2)).contiguous()
        if draws[5] < self.jitter_prob:
            crop = crop * (1 + (2 * draws[6] - 1) * self.jitter)
        if draws[7] < self.jitter_prob:
            crop = crop + (2 * draws[8] - 1) * self.jitter
        return crop.contiguous(), mask


class VolumeTraining:
    """One random part of a volume, in proportion, and its mirror image: plain training views of volumes.

    Args:
        size: (D, H, W) of the result, voxels.
        scale: Share of what the middle view covers that a part covers, lowest and highest, in (0, 1].
        flip: Probability of the mirror image along the last axis, left and right.
        color_jitter: Largest change of contrast and brightness, either way.
    """

    reads = ("spacing",)

    @checked
    def __init__(
        self,
        size: tuple[int, ...],
        scale: Shares = (0.2, 1.0),
        flip: Probability = 0.5,
        color_jitter: NonNegative = 0.0,
    ) -> None:
        if len(size) != 3 or min(size) < 1:
            raise UsageError(f"the size {tuple(size)} is none of volumes; depth, height and width are at least 1")
        self.size, self.scale, self.flip, self.color_jitter = tuple(size), scale, flip, color_jitter

    def __call__(self, volume: Tensor, generator: torch.Generator, *, spacing: Tensor) -> dict[str, Tensor]:
        """Return {"volume": (C, *size) float32} of a volume (C, D, H, W); `spacing` (3,) is that of its voxels."""
        draws = torch.rand(8, generator=generator).tolist()
        extents = [count * apart for count, apart in zip(volume.shape[1:], spacing.tolist(), strict=True)]
        pitch = min(length / side for length, side in zip(extents, self.size, strict=True))
        share = (self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])) ** (1 / 3)
        spans = []
        for count, apart, side, draw in zip(volume.shape[1:], spacing.tolist(), self.size, draws[1:4], strict=True):
            taken = min(count, max(1, round(side * pitch * share / apart)))
            start = min(int(draw * (count - taken + 1)), count - taken)
            spans.append(slice(start, start + taken))
        crop = resampled(unit(volume[(slice(None), *spans)]), self.size)
        if draws[4] < self.flip:
            crop = crop.flip(-1)
        if self.color_jitter:
            middle = crop.mean()
            crop = (crop - middle) * (1 + (2 * draws[5] - 1) * self.color_jitter) + middle
            crop = crop * (1 + (2 * draws[6] - 1) * self.color_jitter)
        return {"volume": crop.contiguous()}


class VolumeRecipe:
    """The same for training classifiers: normalised, with a box of noise in some of them.

    Args:
        size: (D, H, W) of the result, voxels.
        mean: Per channel.
        std: Per channel.
        erasing: Probability that a box of a tenth of the volume becomes noise.
        auto_augment: Changes of grey levels by timm's name; of volumes, contrast and brightness by up to a fifth where
            there is one.
        padding: None: the only value that volumes have.
        **views: Arguments of `VolumeTraining`.

    Raises:
        UsageError: A padding.
    """

    normalized = True
    reads = ("spacing",)

    def __init__(
        self,
        size: tuple[int, ...],
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        erasing: float = 0.0,
        auto_augment: str | None = None,
        padding: int | None = None,
        **views: Any,
    ) -> None:
        if padding is not None:
            raise UsageError(f"crop_padding is {padding}, and crops of volumes are not padded; leave it out")
        jitter = max(float(views.pop("color_jitter", 0.0) or 0.0), 0.2 if auto_augment else 0.0)
        self.view = VolumeTraining(size, color_jitter=jitter, **views)
        self.mean, self.std, self.erasing = torch.tensor(mean), torch.tensor(std), erasing

    def __call__(self, volume: Tensor, generator: torch.Generator, *, spacing: Tensor) -> dict[str, Tensor]:
        """Return {"volume": (C, *size) float32, normalised} of a volume (C, D, H, W)."""
        crop = self.view(volume, generator, spacing=spacing)["volume"]
        same = len(self.mean) == len(crop)
        mean, std = (x if same else x.mean().expand(len(crop)) for x in (self.mean, self.std))
        crop = (crop - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
        if float(torch.rand((), generator=generator)) < self.erasing:
            draws = torch.rand(3, generator=generator).tolist()
            sides = [max(1, round(side * 0.46)) for side in crop.shape[1:]]  # 0.46³ is a tenth
            starts = [
                int(draw * (have - side + 1)) for draw, have, side in zip(draws, crop.shape[1:], sides, strict=True)
            ]
            place = (slice(None), *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))
            crop = crop.clone()
            crop[place] = torch.randn(crop[place].shape, generator=generator)
        return {"volume": crop}


def _draw_voxel(there: Tensor, wanted: bool, box: list[tuple[int, int]], generator: torch.Generator) -> list[int]:
    """Return a voxel (d, h, w) of the foreground, or of what is none; of any kind where there is none of it."""
    low = torch.tensor([start for start, _ in box])
    sides = torch.tensor([end - start for start, end in box])
    drawn = (torch.rand(TRIES, 3, generator=generator) * sides).long().minimum(sides - 1) + low
    fits = (there[drawn[:, 0], drawn[:, 1], drawn[:, 2]] == wanted).nonzero()
    found: list[int]
    if len(fits):
        found = drawn[int(fits[0, 0])].tolist()
        return found
    inside = there[tuple(slice(start, end) for start, end in box)]
    places = (inside == wanted).nonzero()
    if not len(places):
        found = drawn[0].tolist()
        return found
    chosen = min(int(torch.rand((), generator=generator) * len(places)), len(places) - 1)
    found = (places[chosen] + low).tolist()
    return found


def _box_of(there: Tensor) -> list[tuple[int, int]]:
    """Return the box around what is there: (start, end) along each axis; all where nothing is."""
    box = []
    for axis, side in enumerate(there.shape):
        filled = there.flatten(1).any(1) if axis == 0 else there.amax(tuple(a for a in range(3) if a != axis))
        places = filled.nonzero()
        box.append((int(places[0]), int(places[-1]) + 1) if len(places) else (0, side))
    return box
