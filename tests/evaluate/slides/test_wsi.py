"""Slides as files: scale, levels, tiles, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from patchloom.data.base import UnreadableImageError
from patchloom.errors import UsageError
from patchloom.evaluate.slides.wsi import Slide, find_slides
from slides_support import slide_pixels, write_slide

pytestmark = pytest.mark.extra("slides")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    pixels = slide_pixels((700, 500), (100, 100, 500, 400))
    path = write_slide(tmp_path_factory.mktemp("slides") / "a.tif", pixels)
    with Slide(path) as opened:
        yield opened, pixels


def test_scale_and_levels(slide):
    opened, _ = slide
    assert (opened.name, opened.size, opened.mpp) == ("a", (700, 500), 0.5)
    assert opened.level_count == 11  # 1, 2, … 1024 pixels hold 700
    assert opened.level_for(0.5) == (10, 0.5)
    assert opened.level_for(0.7) == (10, 0.5)
    assert opened.level_for(0.8) == (9, 1.0)
    assert opened.level_for(0.4) == (10, 0.5)
    with pytest.raises(
        UnreadableImageError, match=r"scanned at 0.5 um/px, too coarse for tiles at 0.25; set mpp to 0.5"
    ):
        opened.level_for(0.25)


def test_levels_are_deepzooms(slide):
    from openslide.deepzoom import DeepZoomGenerator

    opened, _ = slide
    deepzoom = DeepZoomGenerator(opened.handle, tile_size=64, overlap=0)
    assert deepzoom.level_count == opened.level_count
    assert [opened.level_size(level) for level in range(opened.level_count)] == list(deepzoom.level_dimensions)


def test_tiles_are_the_pixels_and_black_beyond_the_border(slide):
    opened, pixels = slide
    np.testing.assert_array_equal(opened.tile(10, 1, 2, size=64), pixels[128:192, 64:128])
    corner = opened.tile(10, 10, 7, size=64)
    assert corner.shape == (64, 64, 3)
    np.testing.assert_array_equal(corner[:52, :60], pixels[448:, 640:])
    assert corner[52:].max() == corner[:, 60:].max() == 0
    half = opened.tile(9, 1, 1, size=64)
    assert abs(half.astype(float) - pixels[128:256:2, 128:256:2]).mean() < 40


def test_the_thumbnail_is_the_whole_slide(slide):
    opened, _ = slide
    assert opened.thumbnail(4.0).shape == (62, 88, 3)


def test_files_that_do_not_say_their_scale(tmp_path):
    path = write_slide(tmp_path / "b.tif", slide_pixels((200, 200), None), mpp=None)
    with pytest.raises(UnreadableImageError, match="does not say its micrometres per pixel; give it as slide_mpp"):
        Slide(path)
    assert Slide(path, slide_mpp=0.25).mpp == 0.25
    Image.fromarray(slide_pixels((300, 200), None)).save(tmp_path / "c.png")
    plain = Slide(tmp_path / "c.png", slide_mpp=0.5)
    assert plain.size == (300, 200)
    assert not plain.many_readers
    assert plain.tile(plain.level_count - 1, 0, 0, 64).shape == (64, 64, 3)


@pytest.mark.parametrize("content", [b"", b"no slide at all", None])
def test_files_that_are_no_slide(tmp_path, content):
    path = tmp_path / "bad.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match="cannot read image 'bad'"):
        Slide(path)


def test_a_slide_damaged_inside_fails_where_it_is_read(tmp_path):
    path = write_slide(tmp_path / "cut.tif", slide_pixels((600, 600), (0, 0, 600, 600)))
    whole = bytearray(path.read_bytes())
    whole[2000:-4000] = bytes(len(whole) - 6000)
    path.write_bytes(whole)
    with pytest.raises(UnreadableImageError, match="cut"), Slide(path, slide_mpp=0.5) as slide:
        slide.thumbnail(0.5)


def test_finding_slides(tmp_path):
    for name in ("x/a.tif", "y/b.svs", "y/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list(find_slides(tmp_path)) == ["a", "b"]
    assert list(find_slides(tmp_path / "x/a.tif")) == ["a"]
    with pytest.raises(UsageError, match="there is no slide or folder"):
        find_slides(tmp_path / "z")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no slide"):
        find_slides(tmp_path / "empty")
    (tmp_path / "y/a.ndpi").write_bytes(b"")
    with pytest.raises(UsageError, match="have the same name"):
        find_slides(tmp_path)
