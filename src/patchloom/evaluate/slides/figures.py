"""Pictures of slides: where tissue and tiles are, where a model looks, and the tiles it looks at most."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from patchloom.evaluate.slides.tissue import THUMBNAIL_MPP, Tiles
from patchloom.report.page import Figure
from patchloom.report.tiles import GAP, ground, labelled, strip

SIDE = 640
"""Longer side of a slide's picture, in pixels."""
GRID, COLOURS = (0, 130, 110), 128


def thumbnail_picture(tiles: Tiles) -> tuple[bytes, float]:
    """Return the slide as a small PNG, and the micrometres per pixel of it."""
    height, width = tiles.thumbnail.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return _small_png(Image.fromarray(tiles.thumbnail).resize(size)), THUMBNAIL_MPP * width / size[0]


def overview(tiles: Tiles, name: str) -> Figure:
    """Return the slide with what is no tissue greyed out, and the tiles drawn over it."""
    height, width = tiles.thumbnail.shape[:2]
    scale = SIDE / max(height, width)
    # Small slides are drawn larger, so that the grid has room.
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = tiles.thumbnail.astype(np.float32)
    grey = pixels.mean(2, keepdims=True) * 0.45 + 110
    shown = Image.fromarray(np.where(tiles.mask[..., None], pixels, grey).astype(np.uint8)).resize(size)
    draw, side = ImageDraw.Draw(shown), tiles.side_on_thumbnail * scale
    for column, row in tiles.places.tolist():
        draw.rectangle([column * side, row * side, (column + 1) * side, (row + 1) * side], outline=GRID)
    caption = f"{name}: {len(tiles)} tiles of {tiles.size} pixels at {tiles.mpp:.2g} um/px; grey is no tissue."
    return Figure(_small_png(shown), f"Slide {name} with its tiles", caption, half=True)


def heat_map(
    thumbnail: Path | bytes, mpp: float, places: np.ndarray, scores: np.ndarray, side: float, caption: str = ""
) -> Figure:
    """Return a slide in grey with its tiles coloured by score, dark violet for the lowest to yellow for the highest.

    Args:
        thumbnail: PNG of the slide.
        mpp: Micrometres per pixel of it.
        places: (n, 2) column and row of the tiles.
        scores: (n,) of them.
        side: Side of a tile in micrometres.
        caption: What to look for.
    """
    image = Image.open(io.BytesIO(thumbnail) if isinstance(thumbnail, bytes) else thumbnail).convert("L")
    scale = SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pixels = np.repeat(np.asarray(image, np.float32)[..., None], 3, 2) * 0.6 + 90
    step = side / mpp * scale
    heat = _spread(scores)
    for (column, row), strength, colour in zip(places.tolist(), heat, heat_colours(heat), strict=True):
        top, left = round(row * step), round(column * step)
        part = pixels[top : round((row + 1) * step), left : round((column + 1) * step)]
        opacity = 0.35 + 0.5 * strength
        part[...] = (1 - opacity) * part + opacity * colour
    shown = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Figure(_small_png(shown), "Slide with its tiles coloured by score", caption, half=True)


def tile_strip(tiles: Sequence[np.ndarray], labels: Sequence[str], caption: str = "", side: int = 118) -> Figure:
    """Return tiles side by side under their labels.

    Args:
        tiles: (H, W, 3) uint8 each.
        labels: What stands over each.
        caption: What to look for.
        side: Side on the page in pixels.
    """
    shown = []
    for tile, label in zip(tiles, labels, strict=True):
        small = np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS))
        opaque = np.concatenate([small, np.full((side, side, 1), 255, np.uint8)], 2)
        shown.append(labelled(label, opaque))
    return Figure(_png(strip(shown)), "Tiles: " + ", ".join(labels), caption)


def side_by_side(figures: Sequence[Figure], alt: str, caption: str = "") -> Figure:
    """Return pictures in one row, each as high as the first."""
    images = [Image.open(io.BytesIO(figure.png)).convert("RGBA") for figure in figures]
    height = images[0].height
    resized = [image.resize((round(image.width * height / image.height), height)) for image in images]
    parts: list[np.ndarray] = []
    for image in resized:
        parts += [np.asarray(image), ground(height, 3 * GAP)]
    return Figure(_png(np.concatenate(parts[:-1], 1)), alt, caption)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Return (n, 3) float 0 … 255 for values in 0 … 1."""
    from matplotlib import colormaps

    return np.asarray(colormaps["inferno"](values))[:, :3] * 255


def _spread(scores: np.ndarray) -> np.ndarray:
    """Return scores spread over 0 … 1 by their ranks: attention is too uneven to be seen as it is."""
    from scipy.stats import rankdata

    if np.ptp(scores) == 0:
        return np.full(len(scores), 0.5)
    ranks = rankdata(scores)
    spread: np.ndarray = (ranks - ranks.min()) / np.ptp(ranks)
    return spread


def _small_png(image: Image.Image) -> bytes:
    """Return a PNG of few colours, a fifth of the size."""
    buffer = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
