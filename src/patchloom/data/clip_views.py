"""What an encoder is shown of a clip, measured and trained: the same view of every frame.

>>> clip = torch.randint(0, 256, (3, 16, 60, 80), dtype=torch.uint8)
>>> eval_view("crop", (16, 32, 32))(clip)["clip"].shape
torch.Size([3, 16, 32, 32])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from patchloom.base.choices import View
from patchloom.base.ranges import PositiveInt, Probability, Shares, checked
from patchloom.base.sizes import Size, pair
from patchloom.data.pixels import INTERPOLATIONS, jitter_colors, random_box, resize, shaped, stretched
from patchloom.data.transforms import FinetuneTransform
from patchloom.data.transforms import eval_view as image_view

PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)),
)
"""Where a crop may lie: quarters of the room there is, from the top and from the left."""


class ClipView:
    """The view of that name, of every frame alike.

    Args:
        view: `crop` or `whole`; the latter stretches each channel of the clip, not of each frame, to its full range, so
            that frames stay as bright as they were beside one another.
        size: Side of the frames, or (height, width), pixels.

    Raises:
        UsageError: There is no such view, or a size below 1.
    """

    def __init__(self, view: View, size: Size) -> None:
        self.whole, self.size = view == "whole", pair(size)
        self.frame_view = image_view(view, size)

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"clip": (C, T, *size)} of a clip (C, T, H, W), of its type; the generator is not used."""
        if self.whole:
            seen = torch.stack([resize(frame, self.size) for frame in clip.unbind(1)], 1)
            return {"clip": stretched(seen.flatten(1, 2)).unflatten(1, seen.shape[1:3])}
        return {"clip": torch.stack([self.frame_view(frame)["image"] for frame in clip.unbind(1)], 1)}

    def __repr__(self) -> str:
        """Name the view of the frames."""
        return f"ClipView({self.frame_view!r})"


def eval_view(view: View, size: int | Sequence[int]) -> ClipView:
    """Return the view of that name at a side, (H, W) or (T, H, W); how many frames there are is the source's."""
    return ClipView(view, _frame_size(size))


class ClipCrops:
    """One random crop, mirror image and change of colours for all frames: `PairedViews` of images, in one piece.

    Args:
        size: Side of the result, (H, W) or (T, H, W), pixels; how many frames there are is the source's.
        scale: Share of the area that a crop covers, lowest and highest, in (0, 1].
        flip: Probability of the horizontal flip.
        color_jitter: Strength of brightness, contrast and saturation changes.
        interpolation: "bilinear" (VideoMAE) or "bicubic".

    Raises:
        UsageError: A value lies outside its range.
    """

    @checked
    def __init__(
        self,
        size: int | tuple[int, ...],
        scale: Shares = (0.2, 1.0),
        flip: Probability = 0.5,
        color_jitter: Probability = 0.0,
        interpolation: str = "bilinear",
    ) -> None:
        self.size = pair(_frame_size(size))
        self.scale, self.flip, self.color_jitter = scale, flip, color_jitter
        self.interpolation = interpolation

    def __call__(self, clip: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"clip": (C, T, *size)} of a clip (C, T, H, W), of its type."""
        if self.color_jitter:  # as one tall image: contrast changes around the mean of the clip, not of each frame
            clip = jitter_colors(clip.flatten(1, 2), self.color_jitter, generator).unflatten(1, clip.shape[1:3])
        flipped = float(torch.rand((), generator=generator)) < self.flip
        height, width = clip.shape[-2:]
        top, left, h, w = random_box(height, width, self.scale, shaped((3 / 4, 4 / 3), self.size), generator)
        crop = clip[..., top : top + h, left : left + w]
        return {"clip": resize_frames(crop.flip(-1) if flipped else crop, self.size, self.interpolation)}


class MultiScaleCrops:
    """One crop of a few sizes and places for all frames, without mirroring: VideoMAE's and AdaptFormer's view of clips.

    Height and width of the crop are each the shorter side of the clip times one of some factors, neighbours in their
    list at most; a side within 3 pixels of the result's becomes that. It lies in one of 13 places: corners, middles of
    the sides, centre and between these (Wang et al. 2016, arXiv 1608.00859).

    Args:
        size: Side of the result, (H, W) or (T, H, W), pixels.
        factors: Those factors, falling; VideoMAE: 1, 0.875, 0.75, 0.66.
        flip: Probability of the horizontal flip; VideoMAE: 0.

    Raises:
        UsageError: A value lies outside its range.
    """

    @checked
    def __init__(
        self,
        size: int | tuple[int, ...],
        factors: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66),
        flip: Probability = 0.0,
    ) -> None:
        self.size, self.factors, self.flip = pair(_frame_size(size)), factors, flip

    def __call__(self, clip: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"clip": (C, T, *size)} of a clip (C, T, H, W), of its type."""
        height, width = clip.shape[-2:]
        sizes = self.sizes(height, width)
        h, w = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        down, across = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
        top, left = down * ((height - h) // 4), across * ((width - w) // 4)
        crop = clip[..., top : top + h, left : left + w]
        if self.flip and float(torch.rand((), generator=generator)) < self.flip:
            crop = crop.flip(-1)
        return {"clip": resize_frames(crop, self.size)}

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the (height, width) that a crop of a clip of this size may have."""
        sides = [max(1, int(min(height, width) * factor)) for factor in self.factors]
        heights, widths = ([own if abs(side - own) < 3 else side for side in sides] for own in self.size)
        return [
            (min(h, height), min(w, width))
            for i, h in enumerate(heights)
            for j, w in enumerate(widths)
            if abs(i - j) <= 1
        ]


class SideCrops:
    """Crops along the longer side of each of several clips, for testing: VideoMAE's take 3.

    The shorter side is resized to that of the result. One crop alone is in the middle.

    Args:
        size: Side of the result, (H, W) or (T, H, W), pixels.
        count: Crops of each clip.

    Raises:
        UsageError: A number below 1.
    """

    @checked
    def __init__(self, size: int | tuple[int, ...], count: PositiveInt = 3) -> None:
        self.size, self.count = pair(_frame_size(size)), count

    def __call__(self, clips: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"clip": (V * count, C, T, *size)} of clips (V, C, T, H, W), the crops of a clip together."""
        high, wide = self.size
        height, width = clips.shape[-2:]
        scale = max(high / height, wide / width)
        seen = resize_frames(
            clips.transpose(0, 1).flatten(1, 2), (max(high, round(height * scale)), max(wide, round(width * scale)))
        )
        seen = seen.unflatten(1, (len(clips), -1)).transpose(0, 1)  # (V, C, T, h, w)
        tall, broad = (seen.shape[-2] - high, seen.shape[-1] - wide)
        shares = [0.5] if self.count == 1 else [number / (self.count - 1) for number in range(self.count)]
        crops = [
            seen[..., int(share * tall) : int(share * tall) + high, int(share * broad) : int(share * broad) + wide]
            for share in shares
        ]
        return {"clip": torch.stack(crops, 1).flatten(0, 1).contiguous()}


class ClipRecipe:
    """timm's recipe for training classifiers, with the same draws for every frame: see `FinetuneTransform`.

    Args:
        size: Side of the result, (H, W) or (T, H, W), pixels.
        **recipe: Arguments of `FinetuneTransform`.
    """

    normalized = True

    def __init__(self, size: int | tuple[int, ...], **recipe: Any) -> None:
        self.frame_view = FinetuneTransform(_frame_size(size), **{"interpolation": "bilinear", **recipe})

    def __call__(self, clip: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"clip": (C, T, *size) float32, normalised} of a clip (C, T, H, W)."""
        seed = int(torch.randint(2**62, (), generator=generator))
        frames = [
            self.frame_view(frame, torch.Generator().manual_seed(seed))["image"]  # begins anew at each frame
            for frame in clip.unbind(1)
        ]
        return {"clip": torch.stack(frames, 1)}


def resize_frames(clip: Tensor, size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Resize all frames at once, with antialiasing; values are those of `data.pixels.resize` frame by frame.

    Args:
        clip: (C, T, H, W) uint8, or float in [0, 1].
        size: (height, width) of the result, pixels.
        interpolation: "bilinear" or "bicubic".

    Returns:
        (C, T, *size) of the same type, contiguous.
    """
    if tuple(clip.shape[-2:]) == size:
        return clip.contiguous()
    frames = clip.transpose(0, 1)
    if frames.shape[1] == 3 and frames.dtype == torch.uint8:  # torch's fast path takes interleaved pixels
        frames = frames.contiguous(memory_format=torch.channels_last)
    resized = F.resize(frames, list(size), interpolation=INTERPOLATIONS[interpolation], antialias=True)
    if resized.is_floating_point():
        resized = resized.clamp_(0, 1)
    return resized.transpose(0, 1).contiguous()


def _frame_size(size: int | Sequence[int]) -> Size:
    return size if isinstance(size, int) else (int(size[-2]), int(size[-1]))
