"""A small set of good and defect parts, in MVTec AD's layout: stripes, some with a bright square on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def part(number: int, size: tuple[int, int] = (32, 32), defect: bool = False) -> tuple[Image.Image, Image.Image]:
    """Return an image and its mask."""
    rng = np.random.default_rng(number)
    rows = np.arange(size[0])[:, None] + rng.integers(0, 8)
    pixels = 110 + 40 * np.sin(rows / 8 * 2 * np.pi) + rng.normal(0, 3, size)
    mask = np.zeros(size, np.uint8)
    if defect:
        top, left = rng.integers(4, min(size) - 12, 2)
        mask[top : top + 7, left : left + 7] = 255
        pixels = np.where(mask > 0, 250, pixels)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def make_parts(root: Path, train: int = 24, test: int = 5, size: tuple[int, int] = (32, 32)) -> Path:
    """Write `train` good images to learn from, `test` good and as many defect ones with masks; return the folder."""
    for number in range(train + test):
        folder = root / ("train/good" if number < train else "test/good")
        folder.mkdir(parents=True, exist_ok=True)
        part(number, size)[0].save(folder / f"{number:03}.png")
    for folder in (root / "test/square", root / "ground_truth/square"):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(test):
        image, mask = part(1000 + number, size, defect=True)
        image.save(root / "test/square" / f"{number:03}.png")
        mask.save(root / "ground_truth/square" / f"{number:03}_mask.png")
    return root
