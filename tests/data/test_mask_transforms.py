"""Image and mask go the same way; colours change on the image alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from patchloom.data.mask_transforms import TestImage, TrainCrop, distort_colours, resized_size
from patchloom.data.pixels import stretched
from patchloom.errors import UsageError


def pair(height: int = 40, width: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose value tells the class, 20 · class, and its mask."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[: height // 2, width // 3 :] = 1
    mask[height // 2 :, : width // 2] = 2
    return (mask * 20 + 40).expand(3, -1, -1), mask


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    crop=st.tuples(st.integers(24, 64), st.integers(24, 64)),
    short_side=st.sampled_from([None, 30]),
    rotate=st.sampled_from([0.0, 45.0]),
)
def test_pixels_keep_their_class_wherever_they_go(seed, crop, short_side, rotate):
    view = TrainCrop(crop, short_side=short_side, colours=False, vertical_flip=0.5, rotate=rotate)
    image, mask = pair()
    found = view(image, torch.Generator().manual_seed(seed), mask=mask)
    image, mask = found["image"], found["mask"]
    assert image.shape == (3, *crop)
    assert mask.shape == crop
    assert mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) <= {0, 1, 2, 255}
    known = mask != 255
    near = (image[0].float() - (mask.float() * 20 + 40)).abs() <= 3
    assert float(near[known].float().mean()) > 0.6  # bilinear pixels along the edges aside
    if not rotate:
        assert int(image[:, ~known].sum()) == 0  # padding


def test_the_same_generator_gives_the_same_view():
    image, mask = pair()
    views = [TrainCrop((32, 32))(image, torch.Generator().manual_seed(5), mask=mask) for _ in range(2)]
    assert torch.equal(views[0]["image"], views[1]["image"])
    assert torch.equal(views[0]["mask"], views[1]["mask"])


def test_crops_of_one_class_are_drawn_anew():
    picture, patch = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.uint8)
    patch[28:36, 28:36] = 1

    def two_classes(share):
        view = TrainCrop((24, 24), scale=(1.0, 1.0), max_share=share, colours=False)
        masks = [view(picture, torch.Generator().manual_seed(n), mask=patch)["mask"] for n in range(60)]
        return sum(len(mask.unique()) > 1 for mask in masks)

    assert two_classes(0.95) > 1.3 * two_classes(1.0)


def test_testing_keeps_the_mask_and_resizes_the_image():
    image, mask = pair()
    found = TestImage(20)(image, mask=mask)
    assert found["image"].shape == (3, 20, 30)
    assert torch.equal(found["mask"], mask)
    assert TestImage()(image, mask=mask)["image"].shape == (3, 40, 60)


def test_the_longer_side_is_bounded():
    assert resized_size((40, 60), 20) == (20, 30)
    assert resized_size((40, 60), 20, 1.5) == (30, 45)
    assert resized_size((40, 60), None, 0.5) == (20, 30)
    assert resized_size((10, 100), 20) == (8, 80)  # not 20 x 200: mmsegmentation's scale of 2048 x 512


@pytest.mark.parametrize("minmax", [False, True])
def test_a_size_out_of_proportion_is_that_of_image_and_mask_and_the_range_that_of_the_resized_image(minmax):
    torch.manual_seed(0)
    image, mask = torch.randint(60, 160, (3, 40, 60), dtype=torch.uint8), pair()[1]
    expected = F.interpolate(image[None].float(), (28, 28), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
    if minmax:
        expected = stretched(expected.to(torch.uint8)).float()
    tested = TestImage(minmax=minmax, resize=(28, 28))(image, mask=mask)
    assert (tested["image"].float() - expected).abs().max() <= (8 if minmax else 1)  # rounding, and that stretched
    assert torch.equal(tested["mask"], mask)
    plain = {"scale": (1.0, 1.0), "max_share": 1.0, "flip": 0.0, "colours": False}
    view = TrainCrop((28, 28), resize=(28, 28), minmax=minmax, **plain)(
        image, torch.Generator().manual_seed(0), mask=mask
    )
    assert torch.equal(view["image"], tested["image"])
    nearest = F.interpolate(mask[None, None].float(), (28, 28), mode="nearest-exact")[0, 0]
    assert torch.equal(view["mask"].float(), nearest)
    if minmax:
        assert view["image"].amin() == 0
        assert view["image"].amax() == 255


def test_colours_change_by_published_amounts():
    torch.manual_seed(0)
    image = torch.randint(40, 200, (3, 16, 16), dtype=torch.uint8)
    changed = [distort_colours(image, torch.Generator().manual_seed(n)) for n in range(200)]
    same = sum(torch.equal(x, image) for x in changed)
    assert 3 <= same <= 30  # 1/16 of them
    means = torch.stack([x.float().mean() for x in changed])
    assert means.min() < image.float().mean() * 0.6
    assert means.max() > image.float().mean() * 1.2
    assert all(x.dtype == torch.uint8 for x in changed)


def test_saturation_and_hue_keep_grey_grey():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    for seed in range(30):
        x = distort_colours(grey, torch.Generator().manual_seed(seed)).int()
        assert int((x[0] - x[2]).abs().max()) <= 1


def test_channels_are_stretched_and_constant_ones_become_zero():
    image = torch.tensor([[[10, 20], [30, 20]], [[7, 7], [7, 7]]], dtype=torch.uint8)
    assert stretched(image).tolist() == [[[0, 128], [255, 128]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": (0, 4)}, "at least 1 pixel"),
        ({"crop": (4, 4), "scale": (2.0, 0.5)}, "rising"),
        ({"crop": (4, 4), "flip": 1.5}, "flip is 1.5"),
        ({"crop": (4, 4), "resize": (4, 4), "short_side": 4}, "give one of them"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        TrainCrop(**arguments)
