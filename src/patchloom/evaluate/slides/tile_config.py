"""How a slide is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """How a slide is cut."""

    tile_size: int = 224
    """Side of a tile in pixels"""
    mpp: float = 0.5
    """Micrometres per pixel at which tiles are cut; the nearest level that halving the slide gives is taken"""
    min_tissue: float = 0.6
    """Least share of tissue on a tile"""
    tissue_threshold: float | None = None
    """Least saturation of tissue, 0 to 1; default: Otsu's for each slide"""
    drop_pen: bool = False
    """Take green, blue and black ink for no tissue"""
    slide_mpp: float | None = None
    """Micrometres per pixel of slides whose files do not say it"""
    max_tiles: int | None = None
    """Most tiles kept per slide, drawn at random in the same way every time; default: all"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        for name, value, low in (("tile_size", self.tile_size, 8), ("max_tiles", self.max_tiles, 1)):
            if value is not None and value < low:
                raise UsageError(f"{name} is {value}; it must be at least {low}")
        for name, scale in (("mpp", self.mpp), ("slide_mpp", self.slide_mpp)):
            if scale is not None and not scale > 0:
                raise UsageError(f"{name} is {scale}; it must be above 0 micrometres per pixel")
        for name, share in (("min_tissue", self.min_tissue), ("tissue_threshold", self.tissue_threshold)):
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"{name} is {share}; it must be between 0 and 1")
