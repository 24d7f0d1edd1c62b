"""Sizes of images as people give them: one side, or height and width.

>>> parse_size("256,128"), parse_size("64"), parse_size([64, 64])
((256, 128), 64, 64)
>>> pair(64), size_text((256, 128))
((64, 64), '256x128')
"""

from __future__ import annotations

import re
from typing import Any

from patchloom.errors import UsageError

Size = int | tuple[int, int]
"""Side of square images, or (height, width), in pixels."""
Sides = int | tuple[int, ...]
"""Side of cubes, or one for each axis of volumes: (depth, height, width), in voxels."""


def is_size(hint: Any) -> bool:
    """Return whether a type is that of a size, or of one that may be left out."""
    return hint in (Size, Size | None)


def is_sides(hint: Any) -> bool:
    """Return whether a type is that of the sides of volumes, or of ones that may be left out."""
    return hint in (Sides, Sides | None)


def checked_sides(name: str, value: Any, count: int = 3) -> Sides:
    """Return sides that can be those of inputs of so many axes, equal ones as one number.

    Args:
        name: What they are called in the sentence of refusal.
        value: As they may be written: 64, "64", "16,96,96", [16, 96, 96].
        count: Axes.

    Raises:
        UsageError: They are none, or below 1.
    """
    sides = parse_sides(value)
    known = isinstance(sides, int) and not isinstance(sides, bool)
    if not known and not (isinstance(sides, tuple) and len(sides) == count):
        raise UsageError(f"{name} is {value!r}; give one side in voxels, or {count} as 16,96,96")
    if min((sides,) if isinstance(sides, int) else sides) < 1:
        raise UsageError(f"{name} is {value!r}; sides are at least 1")
    return sides


def parse_sides(value: Any) -> Any:
    """Return sides as they may be written; what is none comes back as it is."""
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[\[(]?\s*\d+(\s*,\s*\d+)*\s*[\])]?\s*", value):
            return None if value in ("null", "None") else value
        value = [int(number) for number in re.findall(r"\d+", value)]
    if isinstance(value, list | tuple) and value and all(hasattr(side, "__index__") for side in value):
        sides = tuple(int(side) for side in value)
        return sides[0] if len(set(sides)) == 1 and len(sides) != 2 else sides  # two are of images, and no cube's
    return int(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def pair(size: Size) -> tuple[int, int]:
    """Return a size as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def compact(size: Size) -> Size:
    """Return the side where height and width are the same, else (height, width)."""
    height, width = pair(size)
    return height if height == width else (height, width)


def size_text(size: Size) -> str:
    """Return a size in words: 64, or 256x128."""
    return "x".join(map(str, dict.fromkeys(pair(size))))


def parse_size(value: Any) -> Any:
    """Return a size as it may be written (64, "64", "256,128", [256, 128]); what is none comes back as it is."""
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[\[(]?\s*\d+(\s*,\s*\d+)?\s*[\])]?\s*", value):
            return None if value in ("null", "None") else value
        value = [int(number) for number in re.findall(r"\d+", value)]
    if isinstance(value, list | tuple) and all(hasattr(side, "__index__") for side in value):
        sides = [int(side) for side in value]
        return sides[0] if len(sides) == 1 else compact((sides[0], sides[1])) if len(sides) == 2 else value
    return int(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def checked_size(name: str, value: Any) -> Size:
    """Return a size that can be one of images, square ones as their side.

    Raises:
        UsageError: It is none, or a side is below 1.
    """
    size = parse_size(value)
    if isinstance(size, bool) or not isinstance(size, int | tuple) or (isinstance(size, tuple) and len(size) != 2):
        raise UsageError(f"{name} is {value!r}; give the side in pixels, or height and width as 256,128")
    if min(pair(size)) < 1:
        raise UsageError(f"{name} is {size_text(size)}; it must be at least 1")
    return size
