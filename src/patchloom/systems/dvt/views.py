"""Views of an image: crops, where in the image their tokens look, and their features.

Yang et al. 2024, "Denoising Vision Transformers" (arXiv 2401.02957): the same part of an image stands at other
positions of the grid in other views, which is what tells the image from the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.data.pixels import Box, random_box
from patchloom.encoders import Encoder
from patchloom.encoders.denoised import encoder_features

Coordinates = Literal["edges", "centers"]
RATIO = (3 / 4, 4 / 3)


class View(NamedTuple):
    """A crop of an image, which is then resized to the size of the whole."""

    box: Box
    """(top, left, height, width) in pixels."""
    flipped: bool
    """Whether it is mirrored, left to right."""


def draw_views(
    count: int, size: tuple[int, int], scale: tuple[float, float], flip: float, generator: torch.Generator
) -> list[View]:
    """Return so many random views of an image, and the whole image as the last of all.

    Args:
        count: Crops.
        size: (height, width) of the image.
        scale: Least and most share of the area a crop takes.
        flip: Probability that it is mirrored.
        generator: Where draws come from.
    """
    views = []
    for _ in range(count):
        box = random_box(*size, scale, RATIO, generator)
        views.append(View(box, bool(torch.rand((), generator=generator) < flip)))
    return [*views, View((0, 0, *size), flipped=False)]


def view_coords(view: View, size: tuple[int, int], grid: tuple[int, int], rule: Coordinates = "edges") -> Tensor:
    """Return where in the image the tokens of a view look: (H, W, 2), x and y in [0, 1].

    Args:
        view: The view.
        size: (height, width) of the image.
        grid: (H, W), tokens of a view.
        rule: `edges` puts the first and last token on the edges of the crop, as the published code does; `centers` puts
            each on the middle of its patch.
    """
    top, left, height, width = view.box
    y = _line(top / size[0], (top + height) / size[0], grid[0], rule)
    x = _line(left / size[1], (left + width) / size[1], grid[1], rule)
    if view.flipped:
        x = x.max() - x + x.min()
    return torch.stack(torch.broadcast_tensors(x.unsqueeze(0), y.unsqueeze(1)), dim=-1).clamp(0, 1)


def _line(low: float, high: float, count: int, rule: Coordinates) -> Tensor:
    if rule == "edges":
        return torch.linspace(low, high, count)
    return low + (torch.arange(count) + 0.5) * ((high - low) / count)


def view_images(image: Tensor, views: Sequence[View]) -> Tensor:
    """Return views (n, C, height, width) of an image (C, height, width), normalised, resized to its own size."""
    size = list(image.shape[-2:])
    made = []
    for (top, left, height, width), flipped in views:
        crop = image[:, top : top + height, left : left + width]
        if crop.shape != image.shape:
            crop = F.resize(crop, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        made.append(crop.flip(-1) if flipped else crop)
    return torch.stack(made)


@torch.no_grad()
def view_features(
    encoder: Encoder,
    image: Tensor,
    views: Sequence[View],
    layer: int | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Return the features of views (n, H, W, C), on the encoder's device.

    Args:
        encoder: Set up for the image's size.
        image: (C, height, width), normalised.
        views: Its views.
        layer: Block, from 0; default: the last.
        batch_size: Views at a time.
    """
    found = []
    for first in range(0, len(views), batch_size):
        batch = view_images(image, views[first : first + batch_size])
        found.append(encoder_features(encoder, batch, layer)[0])
    return torch.cat(found)
