"""Which file is the mask of which image of a part, and where it shows a defect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Source
from patchloom.data.fields import MASK_ENDINGS
from patchloom.data.folder import walk_images
from patchloom.data.mask_survey import open_mask
from patchloom.errors import UsageError
from patchloom.io import printable

FEW_VALUES = 16
"""A mask of more values is soft: its defects are what is at least half as bright as its brightest pixel."""
SAME_FOLDER_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")


def find_masks(keys: Sequence[str], folder: Path, *, alone: bool = True) -> list[Path | None]:
    """Return the mask of each image in a folder: a file of its path but for the suffix, with `_mask` at its end or not.

    Args:
        keys: Paths of images.
        folder: Folder of masks.
        alone: Where no mask has an image's path, the name without its folders will do.

    Raises:
        UsageError: An image has two masks, or two images one.
    """
    files = sorted(file for file, _, _ in walk_images(folder))
    stems = {_stem(key, endings=()) for key in keys}
    by_name = alone and not any(_stem(file) in stems for file in files)

    def name_of(stem: str) -> str:
        return stem.rpartition("/")[2] if by_name else stem

    found: dict[str, str] = {}
    for file in files:
        name = name_of(_stem(file))
        if name in found:
            raise UsageError(f"{folder} holds two masks for {name}: {found[name]} and {file}")
        found[name] = file
    names = [name_of(_stem(key, endings=())) for key in keys]
    if by_name and (twice := next((n for n in names if n in found and names.count(n) > 1), None)) is not None:
        raise UsageError(f"the mask {folder / found[twice]} may be of several images called {twice}; use their folders")
    return [folder / found[name] if name in found else None for name in names]


def read_defect(file: Path | bytes, key: str) -> Tensor:
    """Return where a mask shows a defect, (H, W) uint8 of 0 and 1.

    Defects are all that is not 0; in a soft mask what is at least half as bright as its brightest pixel.

    Raises:
        UnreadableImageError: The file is no image.
    """
    with open_mask(file, key) as image:
        values = np.asarray(image if image.mode in ("P", "1", "L") or image.mode[0] == "I" else image.convert("L"))
    soft = len(np.unique(values)) > FEW_VALUES
    return torch.from_numpy((values >= values.max() / 2 if soft else values > 0).astype(np.uint8))


def masks_beside(keys: Sequence[str], root: Path, images: Source) -> list[Path | None]:
    """Return files of each image's name and another suffix that are no images themselves."""
    taken = {images.key(index) for index in range(len(images))}
    others: dict[str, Path] = {}
    for file, _, _ in walk_images(root):
        if printable(file) not in taken and file.lower().endswith(SAME_FOLDER_SUFFIXES):
            others.setdefault(_stem(file), root / file)
    return [others.get(_stem(key, endings=())) for key in keys]


def ending_of_masks(root: Path) -> str | None:
    """Return the ending of masks that lie beside their images, such as `_mask`: not every image has to have one."""
    stems = {_stem(file, endings=()) for file, _, _ in walk_images(root)}
    for ending in MASK_ENDINGS:
        masks = {stem for stem in stems if stem.endswith(ending)}
        if masks and all(mask.removesuffix(ending) in stems for mask in masks):
            return ending
    return None


def suffix_of_masks(root: Path) -> str | None:
    """Return the suffix of masks that lie beside their images: nearly every name is there twice, with two suffixes."""
    suffixes: dict[str, set[str]] = {}
    for file, _, _ in walk_images(root):
        stem, _, suffix = file.rpartition(".")
        suffixes.setdefault(stem, set()).add(f".{suffix.lower()}")
    kinds = {tuple(sorted(found)) for found in suffixes.values() if len(found) > 1}
    pairs = sum(len(found) == 2 for found in suffixes.values())
    if len(kinds) != 1 or pairs < 0.9 * len(suffixes):
        return None
    masks = [suffix for suffix in next(iter(kinds)) if suffix in SAME_FOLDER_SUFFIXES]
    if len(masks) != 1:
        return None
    for stem in sorted(suffixes)[:: max(1, len(suffixes) // FEW_VALUES)]:
        mask = root / f"{stem}{masks[0]}"
        if mask.is_file() and len(np.unique(np.asarray(open_mask(mask, stem)))) > FEW_VALUES:
            return None
    return masks[0]


def _stem(name: str, endings: Sequence[str] = MASK_ENDINGS) -> str:
    stem = name.rpartition(".")[0]
    for ending in endings:
        stem = stem.removesuffix(ending)
    return stem
