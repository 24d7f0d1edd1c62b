"""What is cut out of an image, and what hint is left in its place.

Park et al. 2023, arXiv 2310.04010: a single mask from what stands out, the same in training and testing, so that the
same image always gets the same mask and score; in it a mosaic of the image, which hides a defect and still tells the
network what belongs there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.errors import UsageError, unknown_name
from patchloom.systems.ear.losses import msgms_map

Hint = Literal["mosaic", "empty", "blur"]
Scope = Literal["image", "batch"]
CELLS = (4, 8, 16, 32)
QUANTILE = 0.85
RANDOM_CELLS, RANDOM_SETS = (2, 4, 8, 16), 3
FLAT = 1e-6
"""A map whose greatest and least value are nearer than this says nothing."""


def excise(
    images: Tensor,
    saliency: Tensor,
    quantile: float = QUANTILE,
    scope: Scope = "image",
    *,
    threshold: float | None = None,
    deviations: float | None = None,
) -> Tensor:
    """Return the mask of what is excised: 1 where saliency reaches its threshold, (B, 1, H, W) of the images' type.

    The mask of an image whose saliency is flat is empty.

    Args:
        images: (B, C, H, W).
        saliency: (B, 1, H, W) in [0, 1].
        quantile: The threshold is this quantile of the saliency, linearly interpolated (0.85: 15 % of the area).
        scope: Quantile of each image, or of the whole `batch`, by which the mask depends on what else is in it: for
            ablations.
        threshold: A fixed threshold instead.
        deviations: The mean and this many standard deviations (of the population) of each image instead.

    Raises:
        UsageError: A value outside its range, two rules at once, or shapes that do not belong together.
    """
    if saliency.shape != (images.shape[0], 1, *images.shape[-2:]):
        raise UsageError(
            f"saliency of shape {tuple(saliency.shape)} does not belong to images of shape {tuple(images.shape)}; it "
            f"is (B, 1, H, W)"
        )
    if scope not in get_args(Scope):
        raise unknown_name("scope", scope, get_args(Scope))
    if not 0 <= quantile <= 1:
        raise UsageError(f"quantile is {quantile}; it must be in [0, 1]")
    if threshold is not None and deviations is not None:
        raise UsageError("threshold and deviations are two rules; give one of them")
    rows = saliency.flatten(1)
    if threshold is not None:
        limit = torch.full_like(rows[:, :1], threshold)
    elif deviations is not None:
        limit = rows.mean(1, keepdim=True) + deviations * rows.std(1, correction=0, keepdim=True)
    else:
        drawn_from = rows if scope == "image" else rows.reshape(1, -1)
        limit = row_quantile(drawn_from, quantile)
    flat = rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True) < FLAT
    return ((rows >= limit) & ~flat).view_as(saliency).to(images.dtype)


def row_quantile(rows: Tensor, quantile: float) -> Tensor:
    """Return the quantile of each row (B, N) -> (B, 1), as `torch.quantile`, of any length and fit for ONNX."""
    ordered = rows.sort(1).values
    place = quantile * (rows.shape[1] - 1)
    below = math.floor(place)
    low, high = ordered[:, below : below + 1], ordered[:, math.ceil(place) : math.ceil(place) + 1]
    return low + (high - low) * (place - below)


def mosaic(images: Tensor, cell: int) -> Tensor:
    """Return images (B, C, H, W) in which each cell of `cell` x `cell` pixels has its mean colour.

    Raises:
        UsageError: The side of a cell is below 1.
    """
    height, width = images.shape[-2:]
    tiles = F.interpolate(cell_means(images, cell), scale_factor=float(cell), mode="nearest")
    return tiles[..., :height, :width]


def cell_means(images: Tensor, cell: int) -> Tensor:
    """Return the mean of each cell, (B, C, ⌈H / cell⌉, ⌈W / cell⌉); of the last ones, over the pixels there are.

    Raises:
        UsageError: The side of a cell is below 1.
    """
    if cell < 1:
        raise UsageError(f"the cell of a mosaic is {cell}; its side is at least 1 pixel")
    height, width = images.shape[-2:]
    missing = (0, -width % cell, 0, -height % cell)
    inside = F.pad(torch.ones_like(images[:1, :1]), missing)
    return F.avg_pool2d(F.pad(images, missing), cell) / F.avg_pool2d(inside, cell)


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Return images (B, C, H, W) blurred by a Gaussian, the border reflected where there is room and repeated beyond.

    Args:
        images: The images.
        deviation: Standard deviation in pixels.
    """
    from torchvision.transforms.v2 import functional as TF

    side = 2 * math.ceil(3 * deviation) + 1
    most = 2 * min(images.shape[-2:]) - 1
    return TF.gaussian_blur(images, [min(side, most)] * 2, [deviation] * 2)


def apply_hint(images: Tensor, mask: Tensor, hint: Hint = "mosaic", cell: int = 16) -> Tensor:
    """Return images in which the excised part is replaced by a hint of what was there.

    Args:
        images: (B, C, H, W) in [0, 1].
        mask: (B, 1, H, W), 1 where excised.
        hint: `mosaic` of cells, `empty` (zeros; the ablation the paper finds worse), or `blur`, a Gaussian whose
            deviation is half a cell.
        cell: Side of a cell in pixels.

    Raises:
        UsageError: An unknown hint, or a cell below 1 pixel.
    """
    if hint not in get_args(Hint):
        raise unknown_name("hint", hint, get_args(Hint))
    kept = images * (1 - mask)
    if hint == "empty":
        return kept
    return kept + mask * (mosaic(images, cell) if hint == "mosaic" else blurred(images, cell / 2))


def random_sets(size: tuple[int, int], cell: int, sets: int, generator: torch.Generator | None = None) -> Tensor:
    """Return masks of cells that fall into disjoint sets at random, (sets, 1, H, W): the random-mask baseline's.

    Each cell is in one set, and the sets have as many cells as one another, or one more.

    Args:
        size: (H, W).
        cell: Side of a cell in pixels.
        sets: How many sets.
        generator: Draws them.
    """
    high, wide = (math.ceil(side / cell) for side in size)
    numbers = torch.randperm(high * wide, generator=generator) % sets
    own_set = (numbers.view(1, high, wide) == torch.arange(sets).view(-1, 1, 1)).float()
    pixels = own_set.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return pixels[:, None, : size[0], : size[1]]


def detail_lost(images: Tensor, mask: Tensor, cell: int) -> float:
    """Return how much detail a mosaic takes: 1 - MSGMS between images and their mosaics, the mean inside the masks."""
    lost = (1 - msgms_map(images, mosaic(images, cell))).mean(1, keepdim=True)
    return float((lost * mask).sum() / mask.sum().clamp(min=1))


def estimate_mosaic_scale(
    batches: Iterable[tuple[Tensor, Tensor]], candidates: Sequence[int] = CELLS
) -> tuple[int, dict[int, float]]:
    """Return the largest cell that costs less than half the detail that the coarsest does, and what each costs.

    Where none does, the smallest. The paper chooses a cell for each product; how it does could not be read, so the
    rule is ours.

    Args:
        batches: Pairs of good images (B, C, H, W) in [0, 1] and their masks (B, 1, H, W).
        candidates: Sides of cells in pixels.

    Raises:
        UsageError: No image, or no candidate.
    """
    cells = sorted(set(candidates))
    if not cells:
        raise UsageError("there is no cell to choose among; name at least one")
    sums, count = dict.fromkeys(cells, 0.0), 0
    for images, mask in batches:
        count += len(images)
        for cell in cells:
            sums[cell] += detail_lost(images, mask, cell) * len(images)
    if not count:
        raise UsageError("the cell of the mosaic is estimated on good images, and there is none")
    costs = {cell: total / count for cell, total in sums.items()}
    fitting = [cell for cell in cells if costs[cell] < 0.5 * costs[cells[-1]]]
    return (fitting[-1] if fitting else cells[0]), costs
