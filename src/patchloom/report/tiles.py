"""Pictures laid side by side and one below the other, as arrays of (height, width, 4) uint8.

The ground is transparent and labels are of a middling grey, to be read on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 4
INK, GROUND = (125, 131, 141), (255, 255, 255, 0)
LABEL_HEIGHT, MIN_LABEL_WIDTH = 20, 34
WIDEST = 1060
"""Width of the page's content, in pixels."""


def tile_side(count: int, side: int) -> int:
    """Return the side of a tile: whole multiples of small images, as many to a row as the page is wide."""
    room = (WIDEST - GAP * (count - 1)) // count
    return max(24, min(room, side * max(1, min(room, 128) // side) if side < 128 else 160))


def pixels_of(image: Tensor) -> np.ndarray:
    """Return (C, H, W) in [0, 1] as opaque (H, W, 4) uint8."""
    pixels = as_colour(finite(image.detach().float().cpu())[None])[0].clamp(0, 1)
    opaque = torch.cat([pixels, torch.ones_like(pixels[:1])])
    return (opaque.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


_SHOWN: ContextVar[tuple[int, ...] | None] = ContextVar("shown channels", default=None)


@contextmanager
def shown_channels(channels: Sequence[int] | None) -> Iterator[None]:
    """Let pictures of more than three channels show these as red, green and blue, or one of them as grey."""
    before = _SHOWN.set(None if channels is None else tuple(channels))
    try:
        yield
    finally:
        _SHOWN.reset(before)


def as_colour(images: Tensor) -> Tensor:
    """Return (n, C, H, W) with three channels: the first three, or the first as grey where there are fewer.

    Of more than three channels those that `shown_channels` names are shown.
    """
    chosen = _SHOWN.get()
    if chosen is not None and images.shape[1] > 3:
        images = images[:, [number for number in chosen if number < images.shape[1]]]
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def finite(values: Tensor) -> Tensor:
    """Return values on the CPU with zeros for what is not finite: a diverged run needs its report most of all."""
    return torch.nan_to_num(values.detach().cpu(), nan=0.0, posinf=0.0, neginf=0.0)


def ground(height: int, width: int) -> np.ndarray:
    """Return an empty picture, (height, width, 4) uint8."""
    return np.full((height, width, 4), GROUND, np.uint8)


def enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image whose longer side is `side`; enlarged without smoothing, reduced with it."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return pixels
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize(size, filter_))


def strip(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Return tiles side by side."""
    height = max(tile.shape[0] for tile in tiles)
    parts: list[np.ndarray] = []
    for tile in tiles:
        parts += [_padded(tile, height, tile.shape[1]), ground(height, GAP)]
    return np.concatenate(parts[:-1], axis=1)


def stack(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Return strips one below the other."""
    width = max(strip.shape[1] for strip in strips)
    parts: list[np.ndarray] = []
    for strip in strips:
        parts += [_padded(strip, strip.shape[0], width), ground(GAP, width)]
    return np.concatenate(parts[:-1], axis=0)


def _padded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    out = ground(height, width)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def labelled(text: str, pixels: np.ndarray) -> np.ndarray:
    """Return a picture below its label, which is cut where it would be wider than the picture."""
    font = ImageFont.load_default(size=13)
    width = max(pixels.shape[1], MIN_LABEL_WIDTH)
    if font.getlength(text) > width - 2:
        while text and font.getlength(text + "…") > width - 2:
            text = text[:-1].rstrip()
        text += "…"
    label = Image.new("L", (width, LABEL_HEIGHT))
    ImageDraw.Draw(label).text((1, 2), text, fill=255, font=font)
    strength = np.asarray(label)
    out = ground(LABEL_HEIGHT + pixels.shape[0], width)
    # The letters' soft edges go into the opacity alone: mixed with the ground they would shine on a dark page.
    out[:LABEL_HEIGHT][strength > 0, :3] = INK
    out[:LABEL_HEIGHT, :, 3] = strength
    out[LABEL_HEIGHT:, : pixels.shape[1]] = pixels
    return out


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
