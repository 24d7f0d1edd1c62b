"""Where tissue is on a slide, and the tiles that hold enough of it.

Stained tissue is colourful, glass is not: Otsu's threshold on the saturation of a small picture, then a median filter.
The tissue network of Phikon-v2 (Filiot et al. 2024, arXiv 2409.09173) was not published, so tiles differ from its.

>>> glass, stained = np.full((32, 32, 3), 230, np.uint8), np.full((32, 32, 3), (200, 90, 160), np.uint8)
>>> tissue_mask(np.concatenate([glass, stained])).mean(1).round()[[0, 60]].tolist()
[0.0, 1.0]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import uniform_filter

from patchloom.data.base import UnreadableImageError
from patchloom.evaluate.slides.tile_config import TileSettings
from patchloom.evaluate.slides.wsi import Slide

THUMBNAIL_MPP = 8.0
"""Micrometres per pixel of the picture on which tissue is looked for."""
LEAST_SATURATION = 0.05
"""Otsu splits anything in two, even the noise of bare glass; below this nothing is tissue."""
DARKEST = 0.08
"""Brightness below which a pixel is the border of the scan, whatever its colour."""
MEDIAN_SIDE = 5


@dataclass(frozen=True)
class Tiles:
    """The tiles of a slide that hold tissue, row by row."""

    level: int
    """DeepZoom level."""
    mpp: float
    """Micrometres per pixel there."""
    size: int
    """Side of a tile in pixels."""
    places: np.ndarray
    """(n, 2) int64: column and row."""
    tissue: np.ndarray
    """(n,) float: share of tissue."""
    thumbnail: np.ndarray = field(repr=False)
    """(H, W, 3) uint8: the slide."""
    mask: np.ndarray = field(repr=False)
    """(H, W) bool: where tissue was found on it."""

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.places)

    @property
    def side_on_thumbnail(self) -> float:
        """Return the side of a tile in pixels of the thumbnail."""
        return self.size * self.mpp / THUMBNAIL_MPP


def find_tiles(slide: Slide, settings: TileSettings) -> Tiles:
    """Return the tiles of a slide with enough tissue.

    Raises:
        UnreadableImageError: The slide has none, is damaged, or was scanned at too coarse a scale.
    """
    level, mpp = slide.level_for(settings.mpp)
    thumbnail = slide.thumbnail(THUMBNAIL_MPP)
    mask = tissue_mask(thumbnail, settings.tissue_threshold, settings.drop_pen)
    width, height = slide.level_size(level)
    columns, rows = -(-width // settings.tile_size), -(-height // settings.tile_size)
    shares = tile_shares(mask, columns, rows, settings.tile_size * mpp / THUMBNAIL_MPP)
    chosen = shares >= settings.min_tissue
    if not chosen.any():
        raise UnreadableImageError(
            slide.name,
            f"no tissue: of {columns * rows} tiles the best has {100 * shares.max():.0f} %, and min_tissue asks for "
            f"{100 * settings.min_tissue:.0f} %",
        )
    row, column = np.nonzero(chosen)
    places, tissue = np.stack([column, row], 1), shares[chosen]
    if settings.max_tiles is not None and len(places) > settings.max_tiles:
        kept = np.random.default_rng(0).choice(len(places), settings.max_tiles, replace=False)
        places, tissue = places[np.sort(kept)], tissue[np.sort(kept)]
    return Tiles(level, mpp, settings.tile_size, places.astype(np.int64), tissue, thumbnail, mask)


def tissue_mask(image: np.ndarray, threshold: float | None = None, drop_pen: bool = False) -> np.ndarray:
    """Return where tissue is, (H, W) bool.

    Args:
        image: (H, W, 3) uint8.
        threshold: Least saturation, 0 to 1; default: Otsu's, and at least 0.05.
        drop_pen: Leave out ink: what is greener or bluer than it is red, and what is nearly black.
    """
    from skimage.filters import threshold_otsu

    pixels = image.astype(np.float32) / 255
    value, low = pixels.max(2), pixels.min(2)
    saturation = (value - low) / np.maximum(value, 1e-6)
    counts = value >= DARKEST
    if drop_pen:
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        counts &= (red >= green) & (blue <= 1.35 * red) & (value > 0.25)
    if threshold is None:
        # Ink and borders have no say. One level alone cannot be split in two.
        counted = saturation[counts]
        two = counted.size > 0 and np.ptp(counted) > 0
        threshold = max(float(threshold_otsu(counted)), LEAST_SATURATION) if two else LEAST_SATURATION
    mask = counts & (saturation > threshold)
    # The median of a mask is what most of the neighbourhood says.
    return uniform_filter(mask.astype(np.float32), MEDIAN_SIDE) > 0.5


def tile_shares(mask: np.ndarray, columns: int, rows: int, side: float) -> np.ndarray:
    """Return the share of each tile that a mask covers, (rows, columns); beyond the mask there is nothing.

    Args:
        mask: (H, W) bool.
        columns: Tiles across.
        rows: Tiles down.
        side: Side of a tile in pixels of the mask, any positive number: parts of pixels count as such.
    """
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    for axis, count in enumerate((rows, columns)):
        edges = np.minimum(np.arange(count + 1) * side, mask.shape[axis])
        before = np.minimum(edges.astype(np.int64), mask.shape[axis] - 1)
        part = np.expand_dims(edges - before, 1 - axis)
        total = np.take(total, before, axis) * (1 - part) + np.take(total, before + 1, axis) * part
    return np.diff(np.diff(total, axis=0), axis=1) / side**2
