"""Multi-crop views: sizes, draws from the generator alone, and what each change of an image is."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from patchloom.data.multicrop import Augmentation, MultiCrop, augmented, blurred, jitter, jitter_stains
from patchloom.errors import UsageError

NOTHING = Augmentation(flip=0, jitter_probability=0, grayscale=0, blur=(0, 0, 0), solarize=0)


def image(channels: int = 3, height: int = 50, width: int = 70, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_have_their_sizes_and_repeat_with_the_generator(channels):
    views = MultiCrop(
        32, 16, local_crops=3, augmentation=Augmentation(rotate=True, vertical_flip=0.5, stain_jitter=0.2)
    )
    first, again, other = (views(image(channels), generator(seed)) for seed in (1, 1, 2))
    assert first["global"].shape == (2, channels, 32, 32)
    assert first["local"].shape == (3, channels, 16, 16)
    assert first["global"].dtype == torch.uint8
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["global"], other["global"])
    assert not torch.equal(first["global"][0], first["global"][1])


def test_no_local_crops_and_no_global_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert MultiCrop(32, 16, local_crops=0)(image(), generator()).keys() == {"global"}
    assert torch.equal(torch.get_rng_state(), state)
    pickle.loads(pickle.dumps(MultiCrop(32, 16)))


def test_an_image_smaller_than_the_crop_is_enlarged():
    assert MultiCrop(64, 32, local_crops=1)(image(3, 9, 5), generator())["global"].shape == (2, 3, 64, 64)


def test_scales_bound_the_share_of_the_area():
    ramp = torch.arange(100).to(torch.uint8).expand(1, 100, 100).contiguous()
    views = MultiCrop(20, 20, 1, global_scale=(0.9, 1.0), local_scale=(0.04, 0.05), augmentation=NOTHING)
    for seed in range(20):
        made = views(ramp, generator(seed))
        spans = [int(made[name][0].max()) - int(made[name][0].min()) for name in ("global", "local")]
        assert spans[0] > 75
        assert spans[1] < 30


def test_each_change_is_what_its_name_says():
    crop = image(3, 20, 20)
    only = {"flip": crop.flip(-1), "vertical_flip": crop.flip(-2), "grayscale": F.rgb_to_grayscale(crop, 3)}
    for name, expected in only.items():
        how = dataclasses.replace(NOTHING, **{name: 1.0})
        assert torch.equal(augmented(crop, how, 0, generator()), expected)
    assert torch.equal(augmented(crop, NOTHING, 0, generator()), crop)
    solarised = dataclasses.replace(NOTHING, solarize=1.0)
    assert torch.equal(augmented(crop, solarised, 1, generator()), torch.where(crop >= 128, 255 - crop, crop))
    assert torch.equal(augmented(crop, solarised, 0, generator()), crop)  # the second global crop alone
    assert torch.equal(augmented(crop, solarised, 2, generator()), crop)


def test_all_four_turns_occur():
    crop = image(3, 6, 6)
    how = dataclasses.replace(NOTHING, rotate=True)
    seen = {bytes(augmented(crop, how, 0, generator(seed)).numpy().tobytes()) for seed in range(40)}
    assert seen == {bytes(torch.rot90(crop, k, (-2, -1)).contiguous().numpy().tobytes()) for k in range(4)}


@pytest.mark.parametrize(("kind", "probability"), [(0, 0.0), (1, 0.9), (2, 0.5)])
def test_blur_comes_as_often_as_it_really_did_in_dinov2(kind, probability):
    how = dataclasses.replace(NOTHING, blur=Augmentation().blur, blur_sigma=(2.0, 2.0))
    crop = image(3, 12, 12)
    share = sum(not torch.equal(augmented(crop, how, kind, generator(s)), crop) for s in range(300)) / 300
    assert share == pytest.approx(probability, abs=0.08)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_torchvisions(sigma):
    crop = image(3, 24, 24)
    expected = F.gaussian_blur(crop, [9, 9], [sigma, sigma])
    assert int((blurred(crop, sigma).int() - expected.int()).abs().max()) <= 1
    assert blurred(image(3, 3, 3), sigma).shape == (3, 3, 3)


def test_jitter_leaves_grey_images_grey_and_uses_all_strengths():
    grey = image(1, 10, 10).expand(3, -1, -1).contiguous()
    changed = jitter(grey, (0.4, 0.4, 0.2, 0.1), generator())
    assert int((changed[0].int() - changed[1].int()).abs().max()) <= 1
    for number in range(4):
        strengths = tuple(0.4 if i == number else 0.0 for i in range(4))
        assert not torch.equal(jitter(image(), strengths, generator(3)), image())  # type: ignore[arg-type]


def test_stain_jitter_changes_stains_and_not_the_glass():
    tissue = image(3, 16, 16)
    assert not torch.equal(jitter_stains(tissue, 0.3, generator()), tissue)
    back = jitter_stains(tissue, 0.0, generator())
    assert int((back.int() - tissue.int()).abs().max()) <= 1
    glass = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    for seed in range(10):
        assert int(jitter_stains(glass, 0.2, generator(seed)).min()) > 240


def test_many_channels_change_in_brightness_and_contrast_but_not_in_colour():
    colour = Augmentation(
        flip=0, jitter=(0, 0, 0.2, 0.1), jitter_probability=1, grayscale=1, blur=(0, 0, 0), solarize=0, stain_jitter=0.5
    )
    crop = image(5, 8, 8)
    assert torch.equal(augmented(crop, colour, 0, generator()), crop)
    brightness = Augmentation(flip=0, jitter=(0.4, 0, 0, 0), jitter_probability=1, grayscale=0, blur=(0, 0, 0))
    changed = augmented(crop // 2, brightness, 0, generator()).float() / (crop // 2).clamp(min=1)
    assert changed[crop > 60].std() < 0.02  # one factor for all channels
    assert torch.equal(augmented(crop, Augmentation(flip=0, jitter_probability=0, blur=(0, 0, 0), solarize=1), 1,
                                 generator()), torch.where(crop >= 128, 255 - crop, crop))  # fmt: skip


def test_deep_crops_are_augmented_as_8_bit_ones_to_their_rounding():
    coarse = image(3, 32, 32)
    for how in (
        Augmentation(flip=0, jitter_probability=1, grayscale=0, blur=(0, 0, 0)),
        Augmentation(flip=0, jitter_probability=0, grayscale=1, blur=(1, 0, 0)),
        Augmentation(flip=0, jitter_probability=0, grayscale=0, blur=(0, 0, 0), stain_jitter=0.5),
    ):
        deep = augmented(coarse.float() / 255, how, 0, generator())
        assert deep.dtype == torch.float32
        assert 0 <= deep.min() <= deep.max() <= 1
        assert (deep * 255 - augmented(coarse, how, 0, generator()).float()).abs().max() < 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiCrop(32, 48), "local_size 48 exceeds the global crops of 32 pixels"),
        (lambda: MultiCrop(32, 16, local_crops=-1), "local_crops is -1"),
        (lambda: MultiCrop(32, 16, global_scale=(0.5, 0.2)), r"global_scale \(0.5, 0.2\) must be two rising shares"),
        (lambda: MultiCrop(32, 16, local_scale=(0.0, 0.2)), "local_scale"),
        (lambda: Augmentation(flip=1.5), "flip is 1.5; it must be at least 0 and at most 1"),
        (
            lambda: Augmentation(blur=(0.1, 2.0, 0.5)),
            r"blur is \(0.1, 2.0, 0.5\); each must be at least 0",
        ),
        (lambda: Augmentation(jitter=(0.4, 0.4, 0.2, 0.8)), "value 4 must be at least 0 and at most 0.5"),
        (lambda: Augmentation(stain_jitter=2.0), "stain_jitter is 2.0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_local_crops_may_be_square_where_global_ones_are_not():
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    views = MultiCrop((64, 32), 16, local_crops=2)(image, torch.Generator().manual_seed(0))
    assert (views["global"].shape, views["local"].shape) == ((2, 3, 64, 32), (2, 3, 16, 16))
    assert MultiCrop((64, 32), (24, 8), 1)(image, torch.Generator())["local"].shape == (1, 3, 24, 8)


@pytest.mark.parametrize(
    ("sizes", "turns", "message"),
    [
        (((64, 32), 48), False, "local_size 48 exceeds the global crops of 64x32 pixels"),
        (((64, 32), 16), True, "rotate turns crops by quarters, which needs square ones"),
        ((64, (32, 16)), True, "rotate turns crops by quarters, which needs square ones"),
    ],
)
def test_oblong_crops_that_cannot_be_are_refused(sizes, turns, message):
    with pytest.raises(UsageError, match=message):
        MultiCrop(*sizes, augmentation=Augmentation(rotate=turns))
