"""Boxes to look at: true and found ones on their images, in the colours of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.report.masks import legend
from patchloom.report.page import Figure
from patchloom.report.tiles import WIDEST, enlarged, labelled, pixels_of, png, stack, strip

COLOURS = (
    *((230, 57, 70), (29, 114, 184), (42, 157, 80), (244, 140, 6), (131, 56, 170), (0, 160, 170), (214, 51, 132)),
    *((120, 94, 40), (90, 90, 90), (160, 180, 20)),
)
Drawn = tuple[Tensor, Tensor, Tensor | None]
"""Boxes (n, 4), left, top, right, bottom in pixels of the image; classes (n,) from 0; scores (n,) or None."""


def boxes_figure(
    rows: Sequence[tuple[Tensor, Mapping[str, Drawn]]],
    class_names: Sequence[str],
    *,
    caption: str = "",
    side: int = 420,
) -> Figure:
    """Return a row per image: the image once for each kind of boxes, with these on it.

    Args:
        rows: Images (C, H, W) in [0, 1], sizes may differ, each with its boxes by kind, such as truth and found.
        class_names: Names by class; the legend names those that occur.
        caption: What to look for.
        side: Longer side of a picture in pixels.

    Raises:
        UsageError: Nothing to draw.
    """
    if not rows:
        raise UsageError("a picture of boxes needs at least one image")
    kinds = list(rows[0][1])
    side = min(side, (WIDEST - 4 * len(kinds)) // len(kinds))
    strips, present = [], set()
    for number, (image, drawn) in enumerate(rows):
        tiles = []
        for kind in kinds:
            boxes, classes, scores = drawn[kind]
            pixels = enlarged(pixels_of(image[:3] if image.shape[0] >= 3 else image[:1]), side)
            factor = pixels.shape[0] / image.shape[-2]
            tile = with_boxes(pixels, boxes * factor, classes, scores)
            present |= set(classes.tolist())
            tiles.append(labelled(kind, tile) if number == 0 else tile)
        strips.append(strip(tiles))
    entries = [(class_names[c], colour_of(c)) for c in sorted(present)] or [("nothing", (90, 90, 90))]
    picture = stack([*strips, legend(entries, max(row.shape[1] for row in strips))])
    return Figure(png(picture), f"Images with {' and '.join(kinds)} boxes", caption)


def with_boxes(pixels: np.ndarray, boxes: Tensor, classes: Tensor, scores: Tensor | None = None) -> np.ndarray:
    """Return pixels (h, w, 3 or 4) uint8 with boxes drawn on them, and their scores in percent."""
    picture = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for number, (box, label) in enumerate(zip(boxes.tolist(), classes.tolist(), strict=True)):
        colour: Any = colour_of(label)
        left, top, right, bottom = box
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        if scores is not None:
            text = f"{float(scores[number]):.0%}"
            place = (left + 3, top + 2)
            draw.rectangle((left, top, left + 6 + font.getlength(text), top + 15), fill=colour)
            draw.text(place, text, fill=(255, 255, 255), font=font)
    return np.asarray(picture)


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the colour of a class."""
    return COLOURS[label % len(COLOURS)]
