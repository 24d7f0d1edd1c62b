"""Points to learn from: drawn in masks, in boxes or among labelled points, a class as often as any other.

Shahabodini et al. 2025 (arXiv 2505.19795). Image and places are cropped, turned and mirrored alike.

>>> sampler = PointSampler(4)
>>> points, classes = sampler.from_mask(torch.tensor([[0, 0, 0, 1]] * 2, dtype=torch.uint8), torch.Generator())
>>> points.shape, sorted(set(classes.tolist()) - {0, 1})
(torch.Size([4, 2]), [])
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.data.mask_transforms import distort_colours
from patchloom.data.mask_values import IGNORED
from patchloom.data.pixels import random_box
from patchloom.errors import UsageError

NO_CLASS = -100
"""Class of points of an image on which nothing is known; they count in no loss."""
RATIO = (3 / 4, 4 / 3)
TRIES = 8
"""Places drawn for each point that is asked for, where some will lie outside the view."""
Size = tuple[int, int]


class PointSampler:
    """Draws points with their classes.

    Args:
        num_points: P.
        class_balanced: Every class that is there comes as often as any other, whatever its area; else every pixel (or
            box) does.
        ignore_index: Value of pixels whose class is unknown.

    Raises:
        UsageError: Fewer points than one.
    """

    def __init__(self, num_points: int, class_balanced: bool = True, ignore_index: int = IGNORED) -> None:
        if num_points < 1:
            raise UsageError(f"num_points is {num_points}; give 1 or more")
        self.num_points, self.class_balanced, self.ignore_index = num_points, class_balanced, ignore_index

    def from_mask(self, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return points (P, 2) in [-1, 1], row and column, and classes (P,), of a mask (H, W) uint8.

        Of a mask in which nothing is known, classes are -100 and places random.
        """
        height, width = mask.shape
        flat = mask.flatten().long()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=256)
        starts = counts.cumsum(0) - counts
        counts[self.ignore_index] = 0
        u = torch.rand(2, self.num_points, generator=generator, dtype=torch.float64)
        if not int(counts.sum()):
            return (u.T * 2 - 1).float(), torch.full((self.num_points,), NO_CLASS)
        present = counts.nonzero()[:, 0]
        if self.class_balanced:
            classes = present[(u[0] * len(present)).long()]
        else:
            shares = counts[present].double().cumsum(0) / counts.sum()
            classes = present[torch.searchsorted(shares, u[0], right=True).clamp(max=len(present) - 1)]
        within = (u[1] * counts[classes]).long()
        pixels = order[starts[classes] + within]
        places = torch.stack([pixels // width, pixels % width], 1)
        return _scaled(places, (height, width)), classes

    def from_places(self, places: Tensor, classes: Tensor, size: Size, generator: torch.Generator) -> Any:
        """Return points (P, 2) in [-1, 1] and classes (P,) of candidates: places (n, 2) in pixels of an image."""
        if not len(places):
            places = torch.rand(self.num_points, 2, generator=generator) * torch.tensor(size)
            return _scaled(places.floor(), size), torch.full((self.num_points,), NO_CLASS)
        chosen = self._chosen(classes, self.num_points, generator)
        return _scaled(places[chosen].floor(), size), classes[chosen]

    def in_boxes(self, boxes: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return places (count, 2), row and column in pixels, drawn in boxes (n, 4), and their classes."""
        if not len(boxes):
            return torch.zeros(0, 2), classes[:0]
        chosen = self._chosen(classes, count, generator)
        left, top, right, bottom = boxes[chosen].unbind(1)
        u = torch.rand(2, count, generator=generator)
        places = torch.stack([top + u[0] * (bottom - top), left + u[1] * (right - left)], 1)
        return places, classes[chosen]

    def _chosen(self, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return numbers of candidates, drawn with replacement."""
        u = torch.rand(2, count, generator=generator, dtype=torch.float64)
        if not self.class_balanced:
            return (u[0] * len(classes)).long()
        order = classes.argsort(stable=True)
        present, counts = classes[order].unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        which = (u[0] * len(present)).long()
        return order[starts[which] + (u[1] * counts[which]).long()]


class PointView:
    """An image at the size of training, cropped, turned and mirrored, with points drawn on it.

    Args:
        size: (height, width) of the view; proportions are not kept.
        sampler: Draws the points.
        reads: What is known of an image: (`mask`,), (`boxes`, `box_classes`) or (`points`, `point_classes`).
        crop_scale: Least and most share of the image's area that a crop takes.
        rotate: Most degrees of rotation, either way.
        flip: Probability of the mirror image.
        colours: Change brightness, contrast, saturation and hue.
        nearest: Resize by the nearest pixel (published) in place of smoothly.
        augment: Without, nothing is changed but the size.
    """

    def __init__(
        self,
        size: Size,
        sampler: PointSampler,
        reads: tuple[str, ...] = ("mask",),
        *,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        rotate: float = 60.0,
        flip: float = 0.5,
        colours: bool = False,
        nearest: bool = True,
        augment: bool = True,
    ) -> None:
        self.size, self.sampler, self.reads = size, sampler, reads
        self.crop_scale, self.rotate, self.flip, self.colours = crop_scale, rotate, flip, colours
        self.nearest, self.augment = nearest, augment

    def __call__(self, image: Tensor, generator: torch.Generator, **known: Tensor) -> dict[str, Tensor]:
        """Return {"image": (C, h, w), "points": (P, 2), "classes": (P,)} of an image (C, H, W) and what is known of it.

        Where nothing known is left in the crop, the whole image is taken as it is, as published.
        """
        box, degrees, mirrored = self._drawn((image.shape[-2], image.shape[-1]), generator)
        mask = known.get("mask")
        if self.augment and not self._is_left(mask, known, box, degrees, mirrored):
            box, degrees, mirrored = (0, 0, image.shape[-2], image.shape[-1]), 0.0, False
        kind = InterpolationMode.NEAREST if self.nearest and self.augment else InterpolationMode.BILINEAR
        pixels = self._moved(image, box, degrees, mirrored, kind, 0)
        pixels = pixels.clamp(0, 1) if pixels.is_floating_point() else pixels
        if self.colours and self.augment and pixels.shape[0] == 3:
            pixels = distort_colours(pixels, generator)
        if mask is not None:
            seen = self._moved(mask[None], box, degrees, mirrored, InterpolationMode.NEAREST, IGNORED)[0]
            points, classes = self.sampler.from_mask(seen, generator)
        else:
            places, labels = self._candidates(known, generator)
            moved, inside = self._placed(places, box, degrees, mirrored)
            points, classes = self.sampler.from_places(moved[inside], labels[inside], self.size, generator)
        return {"image": pixels.contiguous(), "points": points, "classes": classes}

    def _drawn(self, size: Size, generator: torch.Generator) -> tuple[tuple[int, int, int, int], float, bool]:
        if not self.augment:
            return (0, 0, *size), 0.0, False
        box = random_box(*size, self.crop_scale, RATIO, generator)
        u = torch.rand(2, generator=generator).tolist()
        return box, (2 * u[0] - 1) * self.rotate, u[1] < self.flip

    def _is_left(
        self, mask: Tensor | None, known: dict[str, Tensor], box: tuple[int, ...], degrees: float, mirrored: bool
    ) -> bool:
        if mask is None:  # places are drawn often enough, or the image has none
            places, _ = self._candidates(known, torch.Generator().manual_seed(0))
            return bool(self._placed(places, box, degrees, mirrored)[1].any())
        seen = self._moved(mask[None], box, degrees, mirrored, InterpolationMode.NEAREST, IGNORED)
        return bool((seen != self.sampler.ignore_index).any())

    def _candidates(self, known: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return places (n, 2) in pixels of the whole image, and their classes."""
        if "boxes" in known:
            count = TRIES * self.sampler.num_points
            return self.sampler.in_boxes(known["boxes"], known["box_classes"], count, generator)
        return known["points"] + 0.5, known["point_classes"]  # the middle of a pixel

    def _placed(self, places: Tensor, box: tuple[int, ...], degrees: float, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Return where places (n, 2) are in the view, and which of them (n,) are there; what a crop left out is not."""
        moved = moved_places(places, box, self.size, degrees, mirrored)
        first, sides = torch.tensor(box[:2]), torch.tensor(box[2:])
        cropped = (places >= first) & (places < first + sides)
        return moved, (cropped & (moved >= 0) & (moved < torch.tensor(self.size))).all(1)

    def _moved(
        self,
        image: Tensor,
        box: tuple[int, ...],
        degrees: float,
        mirrored: bool,
        kind: InterpolationMode,
        fill: float,
    ) -> Tensor:
        view = F.resized_crop(image, *box, list(self.size), interpolation=kind, antialias=True)
        if degrees:
            view = F.rotate(view, degrees, interpolation=InterpolationMode.NEAREST, fill=fill)
        return F.horizontal_flip(view) if mirrored else view


def moved_places(
    places: Tensor, box: tuple[int, ...], size: Size, degrees: float = 0.0, mirrored: bool = False
) -> Tensor:
    """Return where places (n, 2), row and column in pixels, are in a view of a box, turned and mirrored.

    Args:
        places: Continuous: the first pixel is from 0 to 1.
        box: Top, left, height and width of the crop.
        size: (height, width) it is resized to.
        degrees: It is turned about its centre, against the clock.
        mirrored: Left and right are exchanged then.
    """
    top, left, high, wide = box
    rows = (places[:, 0] - top) * size[0] / high - size[0] / 2
    columns = (places[:, 1] - left) * size[1] / wide - size[1] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows, columns = rows * cos - columns * sin, rows * sin + columns * cos
    columns = -columns if mirrored else columns
    return torch.stack([rows + size[0] / 2, columns + size[1] / 2], 1)


def _scaled(places: Tensor, size: Size) -> Tensor:
    """Return places in pixels as points in [-1, 1], as published: the first row is -1, the last 1 - 2 / H."""
    return places.float() / torch.tensor(size).float() * 2 - 1
