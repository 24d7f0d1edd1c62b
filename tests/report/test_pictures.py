"""Samples of every kind are drawn as people look at them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data.kinds import KINDS
from patchloom.data.sample import Sample
from patchloom.report.pictures import PICTURES, middle_images, sample_figure

VALUES = {
    "image": torch.rand(3, 20, 30),
    "clip": torch.rand(3, 5, 20, 30),
    "volume": torch.rand(1, 6, 20, 30),
    "points": torch.randn(50, 3),
    "signal": torch.randn(2, 100),
    "text": torch.arange(12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn(kind):
    figure = sample_figure(KINDS[kind], [Sample(VALUES[kind], 0, "one"), Sample(VALUES[kind], 0, "two")])
    with Image.open(io.BytesIO(figure.png)) as image:
        pixels = np.asarray(image)
    assert (pixels[..., 3] > 0).any()
    assert "one, two" in figure.alt


def test_a_clip_is_a_strip_of_its_frames_in_order():
    levels = torch.linspace(0, 1, 20)
    clip = levels[None, :, None, None].expand(3, 20, 10, 10)
    row = PICTURES["clip"](Sample(clip, 0, "clip"))[50]
    shown = row[row[:, 3] > 0][:, 0].astype(int)
    steps = shown[np.flatnonzero(np.diff(shown, prepend=-1))]
    assert len(steps) == 8
    assert (np.diff(steps) > 0).all()
    assert (steps[0], steps[-1]) == (0, 255)


def test_a_volume_is_three_slices_of_the_shape_of_the_body():
    volume = torch.zeros(1, 10, 40, 20)
    volume[:, 5] = 1  # the middle slice, seen whole along its own axis and as a line along the others
    spacing = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)
    drawn = PICTURES["volume"](Sample(volume, 0, "v", {"spacing": spacing}))
    assert drawn.shape == (108, 3 * 108 + 2 * 4, 4)  # 40 mm along every axis
    bright = [(drawn[:, start : start + 108, 0] > 127).mean() for start in (0, 112, 224)]
    assert bright[0] == 1
    assert bright[1] == pytest.approx(0.1, abs=0.02)
    assert bright[2] == pytest.approx(0.1, abs=0.02)


def test_the_middle_of_a_clip_is_the_frame_in_the_middle_of_the_tube_its_map_is_of():
    clips = torch.arange(8.0)[None, None, :, None, None].expand(1, 1, 8, 4, 4)
    maps = torch.arange(4.0)[None, None, :, None, None].expand(1, 2, 4, 2, 2)
    images, planes = middle_images(clips, maps)
    assert images.shape == (1, 1, 4, 4)
    assert float(images[0, 0, 0, 0]) == 5  # tube 2 is of frames 4 and 5
    assert float(planes[0, 0, 0, 0]) == 2
    image = torch.rand(2, 3, 4, 4)
    assert middle_images(image, image)[0] is image


def test_the_words_of_a_text_are_written():
    empty = PICTURES["text"](Sample(torch.zeros(0), 0, "t", {"caption": ""}))
    full = PICTURES["text"](Sample(torch.zeros(0), 0, "t", {"caption": "a horse on a meadow " * 10}))
    assert not empty[..., 3].any()
    assert full.shape[0] > 2 * empty.shape[0]
