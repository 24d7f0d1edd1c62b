"""Images small enough for tests, and encoders of their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CLASSIFIERS = ["knn", "linear"]
QUICK = {"num_workers": 0, "device": "cpu"}


def write_images(
    folder: Path, per_class: int, classes: tuple[str, ...] = ("blue", "green", "red"), seed: int = 0
) -> Path:
    """Write noisy images that lean towards the colour their folder is named after."""
    rng = np.random.default_rng(seed)
    channel = {"red": 0, "green": 1, "blue": 2}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 200, (16, 16, 3))
            pixels[..., channel[name]] += rng.integers(0, 55)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder
