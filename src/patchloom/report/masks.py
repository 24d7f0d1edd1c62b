"""Segmentations to look at: image, truth and prediction side by side, with the colours named below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.report.page import Figure
from patchloom.report.tiles import INK, WIDEST, enlarged, ground, labelled, pixels_of, png, stack, strip

UNKNOWN_COLOURS = (0, 0, 0), (224, 224, 192)
SWATCH, LINE = 12, 20
Colours = Sequence[tuple[int, int, int]]


def segmentation_figure(
    images: Sequence[Tensor],
    masks: Mapping[str, Sequence[Tensor]],
    palette: Colours,
    class_names: Sequence[str],
    *,
    caption: str = "",
    side: int = 300,
) -> Figure:
    """Return a row per image: the image, then each kind of mask; the legend names the classes that occur.

    Args:
        images: (C, H, W) in [0, 1] each, sizes may differ.
        masks: Name of a column to masks (h, w) of integers, one per image, 255 where unknown (see
            `unknown_colour`).
        palette: (R, G, B) by class.
        class_names: Names by class.
        caption: What to look for.
        side: Longer side of a picture in pixels.

    Raises:
        UsageError: Nothing to draw, or other numbers of masks than images.
    """
    if not images or not masks or any(len(column) != len(images) for column in masks.values()):
        raise UsageError("a picture of segmentations needs at least one image, and a mask of each kind for every image")
    side = min(side, (WIDEST - 4 * len(masks)) // (1 + len(masks)))
    rows, present, unknown = [], set(), False
    for number, image in enumerate(images):
        tiles = [("image", enlarged(pixels_of(image), side))]
        for name, column in masks.items():
            values = np.asarray(column[number].cpu(), dtype=np.uint8)
            classes = np.unique(values)
            unknown |= bool((classes == 255).any())
            present |= {int(value) for value in classes if value != 255}
            tiles.append((name, _at(painted(values, palette), tiles[0][1].shape)))
        rows.append(strip([labelled(name, tile) if number == 0 else tile for name, tile in tiles]))
    entries = [(class_names[value], palette[value]) for value in sorted(present)]
    entries += [("unknown", unknown_colour(palette))] if unknown else []
    picture = stack([*rows, legend(entries, max(row.shape[1] for row in rows))])
    return Figure(png(picture), f"Images with {', '.join(masks)} as coloured masks", caption)


def painted(mask: np.ndarray, palette: Colours) -> np.ndarray:
    """Return a mask (h, w) as colours (h, w, 4) uint8; 255 is of no class."""
    table = np.zeros((256, 4), np.uint8)
    table[:, 3] = 255
    table[: len(palette), :3] = np.asarray(palette, np.uint8)[:256]
    table[255, :3] = unknown_colour(palette)
    return table[mask]


def unknown_colour(palette: Colours) -> tuple[int, int, int]:
    """Return the colour of pixels of no class: black, or where that is a class's (background) the pale one of VOC."""
    black, pale = UNKNOWN_COLOURS
    return pale if black in {tuple(colour) for colour in palette} else black


def legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> np.ndarray:
    """Return swatches with their names, in as many lines as the width asks for, (height, width, 4) uint8."""
    font = ImageFont.load_default(size=13)
    places, x, line = [], 0, 0
    for name, _ in entries:
        needed = SWATCH + 6 + int(font.getlength(name)) + 16
        if x and x + needed > width:
            x, line = 0, line + 1
        places.append((x, line * LINE))
        x += needed
    out = ground((line + 1) * LINE, width)
    letters = Image.new("L", (width, out.shape[0]))
    draw = ImageDraw.Draw(letters)
    for (name, _), (left, top) in zip(entries, places, strict=True):
        draw.text((left + SWATCH + 6, top + 1), name, fill=255, font=font)
    strength = np.asarray(letters)
    out[strength > 0, :3] = INK
    out[..., 3] = strength
    for (_, colour), (left, top) in zip(entries, places, strict=True):
        out[top + 4 : top + 4 + SWATCH, left : left + SWATCH] = (*colour, 255)
    return out


def _at(pixels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return a painted mask at the size of its image: classes have no colours in between."""
    size = (int(shape[1]), int(shape[0]))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))
