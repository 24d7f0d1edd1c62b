"""Pyramidal TIFFs made in the test: glass, a patch of stained tissue, and where asked a darker kind in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from skimage.data import immunohistochemistry

GLASS = 236


def tissue_texture(height: int, width: int) -> np.ndarray:
    """Return stained tissue (height, width, 3) uint8, repeated from a real photograph."""
    photo = immunohistochemistry()
    tiled = np.tile(photo, (-(-height // 512), -(-width // 512), 1))
    return tiled[:height, :width]


def slide_pixels(size: tuple[int, int], tissue: tuple[int, int, int, int] | None, seed: int = 0) -> np.ndarray:
    """Return a slide of a width and height with tissue in a box (left, top, right, bottom)."""
    width, height = size
    noise = np.random.default_rng(seed).integers(-3, 4, (height, width, 1))
    pixels = np.clip(GLASS + noise, 0, 255).repeat(3, 2).astype(np.uint8)
    if tissue is not None:
        left, top, right, bottom = tissue
        pixels[top:bottom, left:right] = tissue_texture(bottom - top, right - left)
    return pixels


def write_slide(path: Path, pixels: np.ndarray, mpp: float | None = 0.5, levels: int = 3) -> Path:
    """Write a tiled TIFF pyramid; without mpp it says no scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            arguments = {"subfiletype": 1} if level else {}
            if mpp is not None:
                per_centimetre = 1e4 / (mpp * 2**level)
                arguments |= {"resolution": (per_centimetre, per_centimetre), "resolutionunit": "CENTIMETER"}
            small = np.ascontiguousarray(pixels[:: 2**level, :: 2**level])
            file.write(small, tile=(128, 128), photometric="rgb", compression="deflate", metadata=None, **arguments)
    return path
