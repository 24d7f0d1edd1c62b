"""Maps painted over images, as Prompt-CAM was published: enlarged, smoothed, in colours, half and half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from patchloom.errors import UsageError
from patchloom.report.page import Figure
from patchloom.report.tiles import as_colour, enlarged, finite, labelled, pixels_of, png, stack, strip, tile_side

Tile = tuple[str, Tensor]
"""A label and a picture (3, H, W) in [0, 1]."""


def overlay(image: Tensor, saliency: Tensor, side: int | None = None) -> Tensor:
    """Return an image with a map over it: bicubic, scaled to its own range, blurred, jet colours, half and half.

    The blur is 9 pixels wide at 224 pixels (sigma 1.7) and follows the size.

    Args:
        image: (C, H, W) in [0, 1].
        saliency: (h, w); a constant one is drawn as 0 throughout.
        side: Enlarge the image to this longer side first, so that a map on a small image is smooth.

    Returns:
        (3, H, W) in [0, 1].
    """
    from matplotlib import colormaps

    picture = as_colour(finite(image).float()[None])
    height, width = picture.shape[-2:]
    if side is not None and side > max(height, width):
        scale = side / max(height, width)
        picture = F.interpolate(picture, size=(round(height * scale), round(width * scale)), mode="nearest")
        height, width = picture.shape[-2:]
    heat = F.interpolate(
        finite(saliency).float()[None, None], size=(height, width), mode="bicubic", align_corners=False
    )
    spread = heat.max() - heat.min()
    varies = spread > 1e-6 * heat.abs().max()
    heat = (heat - heat.min()) / spread if varies else torch.zeros_like(heat)
    scale = min(height, width) / 224
    kernel = 2 * round(4 * scale) + 1
    if kernel > 1:
        heat = gaussian_blur(heat, [kernel, kernel], [1.7 * scale, 1.7 * scale])
    colours = torch.from_numpy(colormaps["jet"](heat[0, 0].clamp(0, 1).numpy())[..., :3].astype(np.float32))
    return 0.5 * picture[0] + 0.5 * colours.permute(2, 0, 1)


def render_traits(
    image: Tensor, maps: Tensor, order: Sequence[int] | Tensor, top: int = 4, names: Mapping[int, str] | None = None
) -> Figure:
    """Return one strip: the image, then the maps of the most important heads.

    Args:
        image: (C, H, W) in [0, 1].
        maps: (H, h, w), one per head.
        order: Heads, most important first.
        top: Most heads drawn.
        names: What is written above a head; default: its number.

    Raises:
        UsageError: No head to draw, or one that has no map.
    """
    heads = [int(head) for head in order][:top]
    if not heads:
        raise UsageError(f"top is {top}; draw at least one head")
    if bad := [head for head in heads if not 0 <= head < len(maps)]:
        raise UsageError(f"there is no map of head {bad[0]}; there are {len(maps)}")
    side = side_of(len(heads) + 1, image)
    tiles: list[Tile] = [("image", image)]
    tiles += [((names or {}).get(head, f"head {head}"), overlay(image, maps[head], side)) for head in heads]
    return grid([tiles], alt=f"An image and where heads {', '.join(map(str, heads))} look")


def grid(rows: Sequence[Sequence[Tile]], *, alt: str, caption: str = "", side: int | None = None) -> Figure:
    """Return rows of labelled pictures of one width.

    Raises:
        UsageError: There is nothing to draw.
    """
    if not rows or any(not row for row in rows):
        raise UsageError("there is nothing to draw")
    side = side or side_of(max(map(len, rows)), rows[0][0][1])
    strips = [strip([labelled(label, enlarged(pixels_of(picture), side)) for label, picture in row]) for row in rows]
    return Figure(png(stack(strips)), alt, caption)


def side_of(count: int, image: Tensor) -> int:
    """Return the side of a tile when `count` of them stand side by side."""
    return min(max(tile_side(count, max(image.shape[-2:])), 96), 200)
