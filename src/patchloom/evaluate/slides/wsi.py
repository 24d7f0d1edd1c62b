"""A whole-slide image: how large its pixels are, its tiles by DeepZoom address, and a small picture of it.

Slides are read by OpenSlide (extra `slides`); pictures it does not know, by Pillow, where their scale is given.

>>> slide = Slide("slides/a.svs")  # doctest: +SKIP
>>> level, mpp = slide.level_for(0.5)  # doctest: +SKIP
>>> slide.tile(level, 10, 12, size=224).shape  # doctest: +SKIP
(224, 224, 3)
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.data.base import UnreadableImageError
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import existing, printable

SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
)
COARSEST = 4 / 3
"""A slide whose finest pixels are larger than this multiple of the scale asked for is refused: tiles of it would be
blown up. Levels differ by factors of two, so a finer slide always has one within two thirds and four thirds."""


class Slide:
    """A whole-slide image, open for reading; one may be read by several threads at once.

    Args:
        path: Its file.
        slide_mpp: Micrometres per pixel at full size, for files that do not say it.
        name: What it is called; default: its file name without suffix.

    Raises:
        UnreadableImageError: The file is no slide, is damaged, or does not say its scale.
        MissingExtraError: OpenSlide is not installed.
    """

    def __init__(self, path: str | Path, slide_mpp: float | None = None, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or printable(self.path.stem)
        openslide = need_openslide()
        try:
            self.handle: Any = openslide.open_slide(self.path)
        except Exception as error:  # damaged files fail in OpenSlide, in Pillow, or in the file system
            raise UnreadableImageError(self.name, _short(error)) from error
        self.size: tuple[int, int] = self.handle.dimensions
        """Width and height at full size, in pixels."""
        self.mpp = self._mpp(slide_mpp)
        """Micrometres per pixel at full size."""

    @property
    def many_readers(self) -> bool:
        """Return whether several threads may read at once; Pillow's pictures have one position for all."""
        return isinstance(self.handle, need_openslide().OpenSlide)

    def _mpp(self, given: float | None) -> float:
        try:
            mpp = [float(self.handle.properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
        except (KeyError, ValueError):
            mpp = []
        if mpp and min(mpp) > 0:
            return sum(mpp) / 2
        if given is None:
            raise UnreadableImageError(
                self.name,
                "the file does not say its micrometres per pixel; give it as slide_mpp (0.25 at 40x, 0.5 at 20x)",
            )
        return given

    def level_for(self, mpp: float) -> tuple[int, float]:
        """Return the DeepZoom level whose pixels are nearest to `mpp` micrometres, and how large they are.

        Raises:
            UnreadableImageError: The slide was scanned at a coarser scale.
        """
        if self.mpp > COARSEST * mpp:
            raise UnreadableImageError(
                self.name,
                f"scanned at {self.mpp:.3g} um/px, too coarse for tiles at {mpp:.3g}; set mpp to {self.mpp:.3g}",
            )
        top = self.level_count - 1
        level = min(range(self.level_count), key=lambda number: abs(self.mpp * 2.0 ** (top - number) - mpp))
        return level, self.mpp * 2.0 ** (top - level)

    @property
    def level_count(self) -> int:
        """Return the number of DeepZoom levels: from one pixel to full size, each twice the one before."""
        return (max(self.size) - 1).bit_length() + 1

    def level_size(self, level: int) -> tuple[int, int]:
        """Return width and height of a DeepZoom level in pixels."""
        width, height = self.size
        scale = 2 ** (self.level_count - 1 - level)
        return -(-width // scale), -(-height // scale)

    def tile(self, level: int, column: int, row: int, size: int) -> np.ndarray:
        """Return a tile (size, size, 3) uint8; what lies beyond the right and lower border is black.

        Raises:
            UnreadableImageError: The file is damaged there.
        """
        try:
            pixels = np.asarray(self._pyramid(size).get_tile(level, (column, row)).convert("RGB"))
        except Exception as error:
            raise UnreadableImageError(self.name, f"tile {level}/{column}/{row}: {_short(error)}") from error
        height, width = pixels.shape[:2]
        if (height, width) == (size, size):
            return pixels
        return np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """Return the whole slide with pixels of about `mpp` micrometres, (H, W, 3) uint8.

        Raises:
            UnreadableImageError: The file is damaged.
        """
        width, height = (max(1, round(side * self.mpp / mpp)) for side in self.size)
        try:
            # Pillow's thumbnail keeps the aspect ratio by rounding; asked for one pixel more, it fills the size.
            picture = self.handle.get_thumbnail((width + 1, height + 1)).convert("RGB")
        except Exception as error:
            raise UnreadableImageError(self.name, _short(error)) from error
        return np.asarray(picture if picture.size == (width, height) else picture.resize((width, height)))

    def close(self) -> None:
        """Close the file."""
        self.handle.close()

    def __enter__(self) -> Slide:
        """Return the slide itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    @cached_property
    def _pyramids(self) -> dict[int, Any]:
        return {}

    def _pyramid(self, size: int) -> Any:
        from openslide.deepzoom import DeepZoomGenerator

        if size not in self._pyramids:
            self._pyramids[size] = DeepZoomGenerator(self.handle, tile_size=size, overlap=0)
        return self._pyramids[size]


def find_slides(slides: str | Path) -> dict[str, Path]:
    """Return the files of the slides meant, by name.

    Args:
        slides: One file, or a folder that is searched with all its sub-folders.

    Raises:
        UsageError: There is nothing there, or two files would have the same name.
    """
    path = existing(slides)
    if path.is_file():
        return {printable(path.stem): path}
    if not path.is_dir():
        raise UsageError(f"there is no slide or folder {slides}")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SLIDE_SUFFIXES and file.is_file())
    if not files:
        raise UsageError(f"{slides} holds no slide (looked for {', '.join(sorted(SLIDE_SUFFIXES))})")
    by_name: dict[str, Path] = {}
    for file in files:
        name = printable(file.stem)
        if name in by_name:
            raise UsageError(f"{by_name[name]} and {file} have the same name; slides are told apart by it, rename one")
        by_name[name] = file
    return by_name


def need_openslide() -> Any:
    """Return the module, or raise what to install."""
    try:
        import openslide
        import openslide.deepzoom
    except (ImportError, OSError) as error:  # OSError: the wrapper is there, the library is not
        raise MissingExtraError("openslide-python and openslide-bin", "slides", "reading whole slides") from error
    return openslide


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:
        return "not a slide"
    return text if len(text) <= 120 else text[:117] + "…"
