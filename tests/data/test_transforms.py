"""Facts about the transforms: exact geometry, draws that come from the generator alone, timm's recipe."""

# ruff: noqa: NPY002 - the legacy global generator is what timm draws from
from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from patchloom.data.pixels import jitter_colors, random_box, resize, shift_hue
from patchloom.data.transforms import (
    EvalTransform,
    FinetuneTransform,
    PairedViews,
    WholeImageTransform,
    eval_view,
    make_mixup,
)
from patchloom.errors import UsageError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 90, width: int = 130, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator(seed))


def test_paired_views_equal_flip_first_then_crop() -> None:
    image = picture()
    transform = PairedViews(32, 48)
    for seed in range(40):
        draws = generator(seed)
        flipped = image.flip(-1) if float(torch.rand((), generator=draws)) < 0.5 else image
        top, left, h, w = random_box(90, 130, (0.2, 1.0), (3 / 4, 4 / 3), draws)
        crop = flipped[:, top : top + h, left : left + w]
        views = transform(image, generator(seed))
        for name, size in (("image", 32), ("target", 48)):
            expected = F.resize(crop, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(views[name], expected)


@pytest.mark.parametrize(
    ("settings_", "names"),
    [
        ({}, {"image"}),
        ({"second_size": 32}, {"image"}),
        ({"second_size": 16}, {"image", "target"}),
        ({"second_interpolation": "lanczos"}, {"image", "target"}),
        ({"interpolation": "bilinear", "second_interpolation": "bilinear"}, {"image"}),
    ],
)
def test_second_view_only_where_it_differs(settings_: dict, names: set[str]) -> None:
    views = PairedViews(32, **settings_)(picture(), generator())
    assert set(views) == names
    assert views["image"].shape == (3, 32, 32)
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in views.values())


def test_views_of_other_channel_counts_and_layouts() -> None:
    for channels in (1, 4, 6):
        views = PairedViews(24, second_interpolation="lanczos")(picture(channels=channels), generator())
        assert views["image"].shape == views["target"].shape == (channels, 24, 24)
    image = picture()
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(PairedViews(24)(image, generator())["image"], PairedViews(24)(interleaved, generator())["image"])


def seed_globals(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_same_generator_state_same_views_and_global_state_unused() -> None:
    image = picture()
    for transform in (PairedViews(24, color_jitter=0.4), FinetuneTransform(24), EvalTransform(24)):
        seed_globals(1)
        first = transform(image, generator(7))["image"]
        seed_globals(2)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        again = pickle.loads(pickle.dumps(transform))(image, generator(7))["image"]
        assert torch.equal(first, again)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]
    assert not torch.equal(
        FinetuneTransform(24)(image, generator(7))["image"], FinetuneTransform(24)(image, generator(8))["image"]
    )


def test_flip_rate_and_no_flip() -> None:
    image = torch.arange(40, dtype=torch.uint8).expand(3, 40, 40)  # rises from left to right
    rises = []
    for seed in range(200):
        view = PairedViews(16)(image, generator(seed))["image"]
        rises.append(bool(view[0, 0, -1] > view[0, 0, 0]))
    assert 70 < sum(rises) < 130
    assert all(
        PairedViews(16, flip=0)(image, generator(s))["image"][0, 0, -1] > 8 for s in range(20)
    )  # never flipped: the right edge stays the brighter one


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    low=st.floats(0.01, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_box_lies_inside_with_aspect_in_range(height: int, width: int, seed: int, low: float) -> None:
    top, left, h, w = random_box(height, width, (low, 1.0), (3 / 4, 4 / 3), generator(seed))
    assert 0 < h <= height
    assert 0 < w <= width
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w
    if min(h, w) >= 20:
        assert 0.65 < w / h < 1.5


def test_box_statistics_follow_torchvision() -> None:
    from torchvision.transforms.v2 import RandomResizedCrop

    theirs = RandomResizedCrop(8, scale=(0.2, 1.0))
    image = torch.zeros(3, 100, 150, dtype=torch.uint8)
    torch.manual_seed(0)
    reference = torch.tensor(
        [[p[name] for name in ("top", "left", "height", "width")] for p in
         (theirs.make_params([image]) for _ in range(2000))], dtype=torch.float64
    )  # fmt: skip
    draws = generator(0)
    ours = torch.tensor(
        [random_box(100, 150, (0.2, 1.0), (3 / 4, 4 / 3), draws) for _ in range(2000)], dtype=torch.float64
    )
    error = (ours.var(0) / 2000 + reference.var(0) / 2000).sqrt()
    assert ((ours.mean(0) - reference.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(ours.std(0), reference.std(0), rtol=0.08)


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))])
def test_box_of_a_ribbon_is_the_clamped_centre(height: int, width: int, expected: tuple) -> None:
    assert random_box(height, width, (0.9, 1.0), (3 / 4, 4 / 3), generator()) == expected


def test_eval_transform_resizes_shorter_side_and_cuts_the_centre() -> None:
    image = picture(96, 128)
    resized = F.resize(image, [36], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(EvalTransform(32)(image)["image"], F.center_crop(resized, [32, 32]))
    upright = picture(128, 96)
    assert EvalTransform(32)(upright, generator())["image"].shape == (3, 32, 32)


def test_eval_transform_leaves_an_image_of_the_right_size_alone() -> None:
    image = picture(32, 32)
    assert torch.equal(EvalTransform(32)(image)["image"], image)
    assert not torch.equal(EvalTransform(32)(picture(33, 32))["image"], image)


def test_the_whole_image_is_shown_and_each_channel_stretched():
    image = picture(40, 60) // 3 + 20
    image[2] = 77
    shown = WholeImageTransform(16)(image)["image"]
    small = F.resize(image, [16, 16], InterpolationMode.BICUBIC, antialias=True).double()
    for channel in (0, 1):
        low, high = small[channel].min(), small[channel].max()
        assert torch.equal(shown[channel].double(), ((small[channel] - low) / (high - low) * 255).round())
    assert not shown[2].any()  # one value: nothing to stretch
    assert isinstance(eval_view("whole", 16), WholeImageTransform)
    with pytest.raises(UsageError, match="unknown view"):
        eval_view("half", 16)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_resize_matches_pillow_within_rounding(interpolation: str) -> None:
    from PIL import Image
    from skimage.data import astronaut

    pixels = astronaut()[:200, :300]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    ours = resize(image, (64, 80), interpolation)
    theirs = Image.fromarray(pixels).resize((80, 64), Image.Resampling[interpolation.upper()])
    difference = ours.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()
    assert difference.abs().max() <= (0 if interpolation == "lanczos" else 2)


def test_color_jitter_acts_on_any_number_of_channels() -> None:
    image = picture()
    assert not torch.equal(jitter_colors(image, 0.4, generator()), image)
    assert torch.equal(jitter_colors(image, 0.0, generator()), image)
    many = jitter_colors(picture(channels=5), 0.4, generator())
    assert many.shape == (5, 90, 130)
    assert not torch.equal(many, picture(channels=5))


@pytest.mark.parametrize("amount", [-0.1, 0.04, 0.5])
@pytest.mark.parametrize("shape", [(1, 7), (40, 33)])
def test_hue_is_torchvision_s_to_one_grey_level(amount: float, shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator())
    image[..., :3] = 90  # colourless
    assert (shift_hue(image, amount).int() - F.adjust_hue(image, amount).int()).abs().max() <= 1


def test_finetune_transform_is_normalised_and_erases() -> None:
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    plain = FinetuneTransform(32, auto_augment=None, color_jitter=0.0, erasing=0.0)
    expected = (1 - torch.tensor(plain.mean)) / torch.tensor(plain.std)
    image = plain(white, generator())["image"]
    assert image.dtype == torch.float32
    assert plain.normalized
    assert torch.allclose(image, expected[:, None, None].expand_as(image))
    erased = FinetuneTransform(32, auto_augment=None, color_jitter=0.0, erasing=1.0)(white, generator())["image"]
    assert 0 < (erased != image).float().mean() < 0.5


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("padding", [None, 4])
def test_the_finetuning_recipe_takes_deep_images_of_any_channels(channels: int, padding: int | None) -> None:
    deep = picture(channels=channels).float() / 255
    settings = {"mean": (0.25,) * channels, "std": (0.5,) * channels}
    plain = FinetuneTransform(32, auto_augment=None, color_jitter=0.0, erasing=0.0, padding=padding, **settings)
    image = plain(torch.full((channels, 40, 40), 0.75), generator())["image"]
    inside = image[:, 4:-4, 4:-4]
    assert torch.allclose(inside, torch.ones_like(inside))
    recipe = FinetuneTransform(32, auto_augment="rand-m9-n6-mstd0.5-inc1", erasing=1.0, padding=padding, **settings)
    first, again = (recipe(deep, generator(3))["image"] for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (channels, 32, 32)
    assert not torch.equal(first, recipe(deep, generator(4))["image"])
    if channels != 3:  # 8-bit images of other channels go the same way
        assert recipe(picture(channels=channels), generator())["image"].shape == (channels, 32, 32)


def test_deep_images_stay_float_and_inside_their_range_with_the_values_of_8_bits() -> None:
    sharp = picture().float() / 255
    for transform in (
        PairedViews(24, second_interpolation="lanczos", color_jitter=0.4),
        EvalTransform(24),
        WholeImageTransform(24),
    ):
        deep = transform(sharp, generator())
        coarse = transform(picture(), generator())
        for name, view in deep.items():
            assert view.dtype == torch.float32
            assert 0 <= view.min() <= view.max() <= 1
            assert (view - coarse[name].float() / 255).abs().max() < 0.02
    faint = torch.full((1, 40, 40), 1000 / 65535)
    assert torch.allclose(EvalTransform(24)(faint)["image"], torch.tensor(1000 / 65535))


def test_the_strongest_augmentation_leaves_no_bit_and_is_no_error() -> None:
    transform = FinetuneTransform(16, auto_augment="rand-m10-n15-p1-inc1", erasing=0.0)
    operation = next(
        op for step in transform._recipe.transforms for op in getattr(step, "ops", ()) if "Poster" in op.name
    )
    image = Image.fromarray(picture(8, 8).permute(1, 2, 0).numpy())
    assert not np.asarray(operation.aug_fn(image, 0)).any()
    assert np.array_equal(np.asarray(operation.aug_fn(image, 8)), np.asarray(image))
    assert np.array_equal(np.asarray(operation.aug_fn(image, 2)), np.asarray(image) & 0b11000000)
    for seed in range(40):
        assert transform(picture(20, 20), generator(seed))["image"].isfinite().all()


def test_a_padded_crop_shows_the_whole_image_moved() -> None:
    image = picture(32, 32)
    settings = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "flip": 0.0, "auto_augment": None, "color_jitter": 0.0}
    transform = pickle.loads(pickle.dumps(FinetuneTransform(32, erasing=0.0, padding=4, **settings)))
    padded = torch.nn.functional.pad(image.float() / 255, (4, 4, 4, 4))
    places = {(top, left): padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
    found = set()
    for seed in range(30):
        view = transform(image, generator(seed))["image"]
        found |= {place for place, crop in places.items() if torch.allclose(view, crop, atol=1e-6)}
    assert len(found) > 15
    assert transform(picture(40, 60), generator())["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("count", [1, 5, 6])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_takes_any_batch_and_draws_from_the_generator(count: int, mode: str) -> None:
    mixing = make_mixup(10, mode=mode)
    labels = torch.arange(count)
    images = torch.rand(count, 3, 8, 8, generator=generator())
    mixed, soft = mixing(images.clone(), labels, generator(3))
    again, soft_again = mixing(images.clone(), labels, generator(3))
    assert mixed.shape == images.shape
    assert soft.shape == (count, 10)
    assert torch.allclose(soft.sum(1), torch.ones(count))
    assert torch.equal(mixed, again)
    assert torch.equal(soft, soft_again)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairedViews(0), "size is 0"),
        (lambda: PairedViews(16, scale=(0.5, 0.2)), "scale is"),
        (lambda: PairedViews(16, ratio=(2, 1)), "ratio is"),
        (lambda: PairedViews(16, flip=2), "flip is 2"),
        (lambda: PairedViews(16, color_jitter=-1), "color_jitter is -1"),
        (lambda: PairedViews(16, interpolation="bicubc"), "unknown interpolation 'bicubc'; did you mean bicubic"),
        (lambda: EvalTransform(16, crop_pct=1.5), "crop_pct is 1.5"),
        (lambda: FinetuneTransform(16, erasing=3), "erasing is 3"),
        (lambda: FinetuneTransform(16, scale=(0, 1)), "scale is"),
        (lambda: make_mixup(10, mixup=0, cutmix=0), "nothing to mix"),
        (lambda: make_mixup(10, mode="both"), "unknown mixup mode"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(("height", "width"), [(90, 130), (130, 90), (300, 60), (64, 32)])
def test_an_oblong_centre_is_cut_out_in_proportion(height: int, width: int) -> None:
    # Each pixel holds its own place: what is shown of it is the slope, which is the scale, the same both ways.
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    shown = EvalTransform((64, 32))(torch.stack([rows * height, columns * width, rows]) / 300)["image"] * 300
    assert shown.shape == (3, 64, 32)
    down, across = shown[0, 10:-10].diff(dim=0).mean(), shown[1, :, 5:-5].diff(dim=1).mean()
    assert float(down) == pytest.approx(float(across), rel=0.05)
    middle = [float(shown[axis].mean()) for axis in (0, 1)]
    assert middle == pytest.approx([height / 2, width / 2], abs=1.0)


def test_oblong_crops_are_stretched_no_more_than_square_ones() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 200), torch.linspace(0, 1, 200), indexing="ij")
    image = torch.stack([rows, columns, rows])
    for size in (48, (64, 32), (32, 64)):
        stretched = []
        for seed in range(60):
            view = PairedViews(size, flip=0.0)(image, generator(seed))["image"]
            stretched.append(float(view[1].diff(dim=1).mean() / view[0].diff(dim=0).mean()))
        assert 0.72 < min(stretched) < 0.9 < 1.1 < max(stretched) < 1.38


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("channels", [3, 5])
def test_every_transform_makes_oblong_views(channels: int, padding: int | None) -> None:
    image = picture(70, 90, channels)
    for transform in (
        PairedViews((48, 24), (32, 16)),
        EvalTransform((48, 24)),
        WholeImageTransform((48, 24)),
        FinetuneTransform((48, 24), padding=padding),
    ):
        assert transform(image, generator())["image"].shape == (channels, 48, 24)
    assert PairedViews((48, 24), (32, 16))(image, generator())["target"].shape == (channels, 32, 16)
