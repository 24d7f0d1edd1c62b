"""Patches and images of the photographs inside scikit-image and scikit-learn, for benchmarks without a download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff"}


def photographs(least_side: int = 200) -> list[Tensor]:
    """Return the installed photographs as uint8 (3, H, W), those with both sides of at least `least_side` pixels."""
    folders = [Path(str(files("skimage"))) / "data", Path(str(files("sklearn"))) / "datasets" / "images"]
    found = []
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.suffix in _SUFFIXES):
        try:
            with Image.open(path) as opened:
                if min(opened.size) >= least_side:
                    found.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).contiguous())
        except UnidentifiedImageError:  # a TIFF of a kind Pillow does not know
            continue
    return found


def crops(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Return (count, 3 * size * size) uint8: square crops at random places of random photographs, flattened."""
    rng = np.random.default_rng(seed)
    sources = [photograph.numpy() for photograph in photographs(max(size, 200))]
    out = np.empty((count, 3 * size * size), np.uint8)
    for row in out:
        source = sources[rng.integers(len(sources))]
        y, x = rng.integers(source.shape[1] - size + 1), rng.integers(source.shape[2] - size + 1)
        row[:] = source[:, y : y + size, x : x + size].reshape(-1)
    return out


def images(count: int, size: int = 224, seed: int = 0) -> Tensor:
    """Return (count, 3, size, size) uint8 crops."""
    return torch.from_numpy(crops(count, size, seed)).view(count, 3, size, size)
