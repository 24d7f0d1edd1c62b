"""Tissue is found by colour, and tiles by how much of it they hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import median_filter

from patchloom.data.base import UnreadableImageError
from patchloom.errors import UsageError
from patchloom.evaluate.slides.tissue import TileSettings, find_tiles, tile_shares, tissue_mask
from patchloom.evaluate.slides.wsi import Slide
from slides_support import slide_pixels, tissue_texture, write_slide

pytestmark = pytest.mark.extra("slides")
BOX = (128, 192, 576, 448)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = write_slide(tmp_path_factory.mktemp("slides") / "a.tif", slide_pixels((1000, 700), BOX))
    with Slide(path) as opened:
        yield opened


def test_tiles_lie_on_the_tissue(slide):
    tiles = find_tiles(slide, TileSettings(tile_size=64))
    assert (tiles.level, tiles.mpp, tiles.size) == (10, 0.5, 64)
    expected = {(column, row) for column in range(2, 9) for row in range(3, 7)}
    found = set(map(tuple, tiles.places.tolist()))
    assert found <= expected
    assert len(found) >= 0.85 * len(expected)  # real tissue has holes
    order = tiles.places[:, 1] * 100 + tiles.places[:, 0]
    assert (np.diff(order) > 0).all()
    assert ((tiles.tissue >= 0.6) & (tiles.tissue <= 1)).all()


def test_scales_and_limits(slide):
    half = find_tiles(slide, TileSettings(tile_size=64, mpp=1.0))
    assert (half.level, half.mpp) == (9, 1.0)
    assert len(half) < 10
    some = find_tiles(slide, TileSettings(tile_size=64, max_tiles=5))
    again = find_tiles(slide, TileSettings(tile_size=64, max_tiles=5))
    assert len(some) == 5
    np.testing.assert_array_equal(some.places, again.places)


def test_glass_alone_has_no_tissue(tmp_path):
    path = write_slide(tmp_path / "glass.tif", slide_pixels((600, 600), None))
    with Slide(path) as slide, pytest.raises(UnreadableImageError, match=r"no tissue: of 100 tiles the best has 0 %"):
        find_tiles(slide, TileSettings(tile_size=64))


def test_masks():
    image = np.concatenate([np.full((40, 40, 3), 235, np.uint8), tissue_texture(40, 40)], 1)
    mask = tissue_mask(image)
    assert mask[:, :37].mean() == 0
    assert mask[:, 43:].mean() > 0.75
    black = np.zeros((40, 40, 3), np.uint8)
    black[::2, ::2, 0] = 4  # noise of a dark border is fully saturated
    assert not tissue_mask(black).any()
    assert not tissue_mask(np.full((9, 9, 3), 200, np.uint8)).any()
    pen = np.full((40, 40, 3), (20, 60, 160), np.uint8)
    both = np.concatenate([image, pen], 1)
    assert tissue_mask(both)[:, 85:].all()
    without = tissue_mask(both, drop_pen=True)
    assert not without[:, 85:].any()
    assert without[:, 45:75].mean() > 0.7


def test_the_filter_is_a_median():
    image = (np.random.default_rng(0).random((30, 40, 3)) * 255).astype(np.uint8)
    image[..., 0] = 255
    saturation = 1 - image.min(2) / 255
    expected = median_filter((saturation > 0.6).astype(np.uint8), 5).astype(bool)
    np.testing.assert_array_equal(tissue_mask(image, threshold=0.6)[2:-2, 2:-2], expected[2:-2, 2:-2])


@pytest.mark.parametrize("side", [4.0, 3.5, 7.25])
def test_shares_are_areas(side):
    mask = np.random.default_rng(0).random((19, 23)) > 0.5
    columns, rows = int(np.ceil(23 / side)), int(np.ceil(19 / side))
    fine = mask.repeat(8, 0).repeat(8, 1)
    expected = [
        [
            fine[round(r * side * 8) : round((r + 1) * side * 8), round(c * side * 8) : round((c + 1) * side * 8)].sum()
            for c in range(columns)
        ]
        for r in range(rows)
    ]
    np.testing.assert_allclose(tile_shares(mask, columns, rows, side), np.array(expected) / (side * 8) ** 2, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 4}, "tile_size is 4"),
        ({"mpp": 0.0}, "mpp is 0.0"),
        ({"slide_mpp": -1.0}, "slide_mpp is -1.0"),
        ({"min_tissue": 60.0}, "min_tissue is 60.0; it must be at least 0 and at most 1"),
        ({"max_tiles": 0}, "max_tiles is 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        TileSettings(**settings)
