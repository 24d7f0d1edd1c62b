"""Does a map show what the classifier goes by? Take away, or give back, the pixels it calls important and watch.

Deletion replaces the most salient pixels by the mean colour, step by step; insertion starts from a blurred image and
gives them back. The less area it takes until the class's probability moves, the more faithful the map. Petsiuk, Das
and Saenko, arXiv 1806.07421. Prompt-CAM (arXiv 2501.09333) reports both figures without code; steps and blur are ours.

>>> import torch
>>> weight = torch.randn(2, 3 * 8 * 8)
>>> classifier = lambda images: images.flatten(1) @ weight.T
>>> scores = insertion_deletion(classifier, torch.randn(4, 3, 8, 8), torch.rand(4, 2, 2), torch.tensor([0, 1, 0, 1]))
>>> scores.insertion.shape, scores.curves.deletion.shape
(torch.Size([4]), torch.Size([4, 51]))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from patchloom.base.ranges import PositiveInt, checked
from patchloom.errors import UsageError

Unit = Literal["pixels", "patches"]


class Curves(NamedTuple):
    """Probability of the class as area goes or comes."""

    fraction: Tensor
    """(steps + 1,) share of the area changed, 0 to 1."""
    insertion: Tensor
    """(B, steps + 1)."""
    deletion: Tensor
    """(B, steps + 1)."""


class Faithfulness(NamedTuple):
    """Areas under the curves, each in [0, 1]."""

    insertion: Tensor
    """(B,), higher is better."""
    deletion: Tensor
    """(B,), lower is better."""
    curves: Curves


@torch.no_grad()
@checked
def insertion_deletion(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    saliency: Tensor,
    target: Tensor,
    steps: PositiveInt = 50,
    unit: Unit = "pixels",
    batch_size: int = 128,
) -> Faithfulness:
    """Return insertion and deletion scores of maps.

    Args:
        model: Gives logits (B, C) for images.
        images: (B, C, H, W), normalised, so that 0 is the mean colour.
        saliency: (B, h, w), of any size: it is enlarged bilinearly. Equal values go in reading order.
        target: (B,) int64, the class whose probability is followed.
        steps: Equal steps of area; with `unit` patches, one step per entry of the map.
        unit: What is taken away at a time: the next share of pixels, or one entry of the map.
        batch_size: Images at a time.

    Raises:
        UsageError: Maps or targets that do not belong to the images, or no step.
    """
    if saliency.ndim != 3 or len(saliency) != len(images):
        raise UsageError(f"{len(images)} images have maps of shape {tuple(saliency.shape)}; expected (images, h, w)")
    if target.shape != (len(images),):
        raise UsageError(f"{len(images)} images have {tuple(target.shape)} targets; give one class for each image")
    ranks, count = pixel_ranks(saliency, (images.shape[-2], images.shape[-1]), unit)
    steps = count if unit == "patches" else min(steps, count)
    blurred, empty = blurred_start(images), torch.zeros_like(images)
    insertion, deletion = [], []
    for step in range(steps + 1):
        changed = (ranks < round(step * count / steps))[:, None]
        insertion.append(_probability(model, torch.where(changed, images, blurred), target, batch_size))
        deletion.append(_probability(model, torch.where(changed, empty, images), target, batch_size))
    fraction = torch.linspace(0, 1, steps + 1)
    curves = Curves(fraction, torch.stack(insertion, 1), torch.stack(deletion, 1))
    return Faithfulness(_area(curves.insertion, fraction), _area(curves.deletion, fraction), curves)


def pixel_ranks(saliency: Tensor, size: tuple[int, int], unit: Unit = "pixels") -> tuple[Tensor, int]:
    """Return each pixel's place in the order of saliency, (B, H, W) int64 from 0, and the number of places.

    With `unit` patches all pixels of a map's entry share its place.
    """
    maps = torch.nan_to_num(saliency.float())
    if unit == "pixels":
        maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    ranks = places.view_as(maps)
    if unit == "patches":
        ranks = F.interpolate(ranks[:, None].double(), size=size, mode="nearest")[:, 0].long()
    return ranks, order.shape[1]


def blurred_start(images: Tensor) -> Tensor:
    """Return images blurred beyond recognition: kernel 51 and sigma 50 at 224 pixels, scaled with the side."""
    scale = min(images.shape[-2:]) / 224
    kernel = max(3, 2 * round(25 * scale) + 1)
    return gaussian_blur(images, [kernel, kernel], [50 * scale, 50 * scale])


def pointing_game(saliency: Tensor, mask: Tensor) -> Tensor:
    """Return whether the peak of each map lies inside the part known to matter.

    Args:
        saliency: (B, h, w).
        mask: (B, H, W) bool; the maps are enlarged to it bilinearly.

    Returns:
        (B,) bool. Of several equal peaks the first in reading order counts.
    """
    enlarged = _enlarged_to(saliency, mask)
    return mask.flatten(1).gather(1, enlarged.flatten(1).argmax(1, keepdim=True))[:, 0]


def mass_inside(saliency: Tensor, mask: Tensor) -> Tensor:
    """Return the share of each map (B, h, w), non-negative, that lies inside a mask (B, H, W) of bool, (B,)."""
    enlarged = _enlarged_to(saliency, mask).clamp(min=0)
    return (enlarged * mask).sum((1, 2)) / enlarged.sum((1, 2)).clamp(min=1e-12)


def _area(curve: Tensor, fraction: Tensor) -> Tensor:
    return torch.trapezoid(curve.double(), fraction.double(), dim=1).float()


def _enlarged_to(saliency: Tensor, mask: Tensor) -> Tensor:
    if len(saliency) != len(mask):
        raise UsageError(f"{len(saliency)} maps and {len(mask)} masks do not belong together")
    size = (mask.shape[-2], mask.shape[-1])
    return F.interpolate(saliency.float()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _probability(model: Callable[[Tensor], Tensor], images: Tensor, target: Tensor, batch_size: int) -> Tensor:
    parts = [model(part).float().softmax(-1) for part in images.split(batch_size)]
    return torch.cat(parts).gather(1, target[:, None])[:, 0].cpu()
