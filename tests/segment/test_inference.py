"""Whole, sliding and multi-scale segmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.segment.inference import (
    MultiScaleSegmenter,
    SlidingWindowSegmenter,
    WholeSegmenter,
    center_padding,
    pad_to_multiple,
    windows,
)


def plain_slide(model, image, crop, stride):
    """The rule of mmsegmentation's `slide_inference`, written out as it is stated."""
    (hs, ws), (hc, wc), (_, _, height, width) = stride, crop, image.shape
    nh = max(height - hc + hs - 1, 0) // hs + 1
    nw = max(width - wc + ws - 1, 0) // ws + 1
    total, count = 0, torch.zeros(1, 1, height, width)
    for i in range(nh):
        for j in range(nw):
            y2, x2 = min(i * hs + hc, height), min(j * ws + wc, width)
            y1, x1 = max(y2 - hc, 0), max(x2 - wc, 0)
            logits = model(image[:, :, y1:y2, x1:x2])
            logits = F.interpolate(logits, size=(y2 - y1, x2 - x1), mode="bilinear", align_corners=False)
            total = total + F.pad(logits, (x1, width - x2, y1, height - y2))
            count[:, :, y1:y2, x1:x2] += 1
    return total / count


def model(images):
    """Logits at half the size that depend on where in its window a pixel lies."""
    x = F.avg_pool2d(images, 2, ceil_mode=True)
    place = torch.linspace(0, 1, x.shape[-1]) + torch.linspace(0, 2, x.shape[-2])[:, None]
    return torch.cat([x, x.mean(1, keepdim=True) * place], 1)


@pytest.mark.parametrize(("size", "crop", "stride"), [((20, 33), (8, 12), (6, 7)), ((6, 40), (8, 12), (8, 12))])
def test_sliding_windows_follow_the_published_rule(size, crop, stride):
    images = torch.randn(2, 3, *size)
    found = SlidingWindowSegmenter(model, crop, stride, batch_size=5)(images)
    torch.testing.assert_close(found, plain_slide(model, images, crop, stride))


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    data=st.data(),
)
def test_windows_cover_every_pixel_and_have_one_size(size, crop, data):
    stride = tuple(data.draw(st.integers(1, side)) for side in crop)
    seen = torch.zeros(size)
    shapes = set()
    for top, bottom, left, right in windows(size, crop, stride):
        seen[top:bottom, left:right] += 1
        shapes.add((bottom - top, right - left))
    assert seen.min() >= 1
    assert shapes == {(min(crop[0], size[0]), min(crop[1], size[1]))}


def test_whole_resizes_to_the_size_asked_for():
    images = torch.randn(1, 3, 10, 14)
    assert WholeSegmenter(model)(images).shape == (1, 4, 10, 14)
    assert WholeSegmenter(model)(images, (25, 30)).shape == (1, 4, 25, 30)


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    images = torch.randn(1, 3, 12, 16)
    found = MultiScaleSegmenter(WholeSegmenter(model), scales=(0.5, 1.0))(images, (24, 32))
    shares = []
    for size in ((6, 8), (12, 16)):
        view = F.interpolate(images, size=size, mode="bilinear", align_corners=False) if size != (12, 16) else images
        for mirrored in (False, True):
            logits = model(view.flip(-1) if mirrored else view)
            share = F.interpolate(logits, size=(24, 32), mode="bilinear", align_corners=False).softmax(1)
            shares.append(share.flip(-1) if mirrored else share)
    torch.testing.assert_close(found, sum(shares) / 4)


def test_padding_goes_all_round_and_the_odd_pixel_to_the_end():
    assert center_padding((10, 14), 14) == (0, 0, 2, 2)
    assert center_padding((11, 15), 14) == (6, 7, 1, 2)
    padded, pads = pad_to_multiple(torch.ones(1, 1, 5, 4), 4)
    assert padded.shape == (1, 1, 8, 4)
    assert pads == (0, 0, 1, 2)
    assert float(padded[0, 0, 0].sum()) == 0
    assert float(padded[0, 0, 1].sum()) == 4


@pytest.mark.parametrize(("crop", "stride"), [(8, 9), (0, 1), (8, 0)])
def test_windows_that_leave_pixels_out_are_refused(crop, stride):
    with pytest.raises(UsageError, match="leave pixels out"):
        SlidingWindowSegmenter(model, crop, stride)


def test_no_scale_is_refused():
    with pytest.raises(UsageError, match="positive factor"):
        MultiScaleSegmenter(WholeSegmenter(model), scales=())


def test_a_sliding_window_keeps_the_precision_of_its_model():
    images = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    out = SlidingWindowSegmenter(torch.nn.Identity(), 4, 2)(images)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, images, rtol=0, atol=1e-15)
    assert SlidingWindowSegmenter(torch.nn.Identity(), 4, 2)(images.half()).dtype == torch.float32


@pytest.mark.parametrize(("size", "batch_size"), [((70, 23), 1), ((70, 23), 7), ((9, 11), 4), ((33, 40), 64)])
def test_strips_are_the_logits_row_by_row_and_classes_those_of_the_whole(size, batch_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator)
    slide = SlidingWindowSegmenter(lambda x: x.cumsum(-1), 16, 11, batch_size=batch_size)
    strips = list(slide.strips(images))
    tops = [top for top, _ in strips]
    assert tops == [0, *np.cumsum([strip.shape[2] for _, strip in strips])[:-1]]
    whole = slide(images)
    assert torch.equal(torch.cat([strip for _, strip in strips], 2), whole)
    assert torch.equal(slide.classes(images), whole.argmax(1).to(torch.uint8))
    assert torch.equal(slide.classes(images, (20, 30)), slide(images, (20, 30)).argmax(1).to(torch.uint8))
    if batch_size == 1:  # no more rows at a time than a window has
        assert max(strip.shape[2] for _, strip in strips) <= 16
    assert torch.equal(WholeSegmenter(lambda x: x).classes(images), images.argmax(1).to(torch.uint8))
