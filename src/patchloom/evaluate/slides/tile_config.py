"""How a slide is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from patchloom.base.ranges import Positive, PositiveInt, Probability
from patchloom.base.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TileSettings(Settings):
    """How a slide is cut."""

    tile_size: Annotated[int, Ge(8)] = 224
    """Side of a tile in pixels"""
    mpp: Positive = 0.5
    """Micrometres per pixel at which tiles are cut; the nearest level that halving the slide gives is taken"""
    min_tissue: Probability = 0.6
    """Least share of tissue on a tile"""
    tissue_threshold: Probability | None = None
    """Least saturation of tissue, 0 to 1; default: Otsu's for each slide"""
    drop_pen: bool = False
    """Take green, blue and black ink for no tissue"""
    slide_mpp: Positive | None = None
    """Micrometres per pixel of slides whose files do not say it"""
    max_tiles: PositiveInt | None = None
    """Most tiles kept per slide, drawn at random in the same way every time; default: all"""
