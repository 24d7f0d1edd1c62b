"""Images whose class-defining part is known because they are composed: a patch of texture on a photograph.

A photograph of things is the ground. On it, at random places that do not overlap, lie two patches: one of a texture,
which is the class, and one of another photograph of things, which means nothing. Everything comes from the embedded
photographs; test images come from parts of them that no training image shows.

    images, labels, masks = composed(100, "test", seed=0)   # uint8 (n, 3, 32, 32), int64 (n,), bool (n, 32, 32)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from patchloom.data.embedded import PHOTOS, PhotosSource

TEXTURES = {"brick": 7, "coins": 5, "flower": 5, "galaxies": 4, "grass": 3, "tissue": 5}
"""The classes, and how far each photograph is reduced so that its texture shows in a patch."""
THINGS = ("astronaut", "camera", "cat", "clock", "coffee", "motorcycle", "rocket", "temple")
SIDE, PATCH, REDUCTION = 32, 12, 3


def composed(count: int, split: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `count` images, their classes (numbers of `TEXTURES`, in turn), and where the texture lies."""
    crops = PhotosSource(split, crop_size=SIDE * REDUCTION, crops=1)
    regions = dict(zip(PHOTOS, crops._regions, strict=True))
    generator = np.random.default_rng((seed, split == "test"))
    images, masks = (
        torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8),
        torch.zeros(count, SIDE, SIDE, dtype=torch.bool),
    )
    names, labels = list(TEXTURES), torch.arange(count) % len(TEXTURES)
    for number in range(count):
        ground, other = generator.choice(len(THINGS), 2, replace=False)
        image = _crop(regions[THINGS[ground]], SIDE, generator)
        (top, left), (top2, left2) = _places(generator)
        image[:, top2 : top2 + PATCH, left2 : left2 + PATCH] = _crop(regions[THINGS[other]], PATCH, generator)
        name = names[int(labels[number])]
        image[:, top : top + PATCH, left : left + PATCH] = _crop(regions[name], PATCH, generator, TEXTURES[name])
        images[number] = image
        masks[number, top : top + PATCH, left : left + PATCH] = True
    return images, labels, masks


def pieces(count: int, split: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return plain pieces of all photographs, reduced one to seven times, and which each is of (in turn)."""
    regions = PhotosSource(split, crop_size=SIDE * REDUCTION, crops=1)._regions
    generator = np.random.default_rng((seed, split == "test", 1))
    labels = torch.arange(count) % len(regions)
    images = []
    for label in labels.tolist():
        most = min(7, min(regions[label].shape[-2:]) // SIDE)
        images.append(_crop(regions[label], SIDE, generator, int(generator.integers(1, most + 1))))
    return torch.stack(images), labels


def write_folder(folder: Path, images: Tensor, labels: Tensor, names: Sequence[str]) -> Path:
    """Write images as PNG files, a folder per class (once), and return the folder."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            place = partial / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:05d}.png")
        partial.rename(folder)
    return folder


def _crop(region: Tensor, side: int, generator: np.random.Generator, reduction: int = REDUCTION) -> Tensor:
    """Return a random square of a photograph, reduced to `side` pixels."""
    large = side * reduction
    top, left = (int(generator.integers(length - large + 1)) for length in region.shape[-2:])
    crop = region[:, top : top + large, left : left + large]
    return F.resize(crop, [side, side], antialias=True).clone()


def _places(generator: np.random.Generator) -> list[tuple[int, int]]:
    """Return two places for patches that do not overlap."""
    while True:
        first, second = (tuple(int(v) for v in generator.integers(SIDE - PATCH + 1, size=2)) for _ in range(2))
        if abs(first[0] - second[0]) >= PATCH or abs(first[1] - second[1]) >= PATCH:
            return [(first[0], first[1]), (second[0], second[1])]
