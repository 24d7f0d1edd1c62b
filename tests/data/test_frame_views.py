"""Views of triplets: what is done to which, and from whose draws."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from patchloom.data.frame_views import NO_BLUR, TripletViews, draw_order
from patchloom.errors import UsageError


def triplet(stack: int = 3, side: int = 84) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (3 * stack, side, side), dtype=torch.uint8, generator=generator)


def drawn(views: TripletViews, image: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    return views(image, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stack", [1, 3, 4])
def test_a_sample_has_four_images_and_an_order(stack):
    views = TripletViews(84, stack)
    sample = drawn(views, triplet(stack), 0)
    assert {name: tuple(value.shape) for name, value in sample.items()} == {
        **dict.fromkeys(("view1", "view2", "previous", "next"), (stack, 84, 84)),
        "order": (),
    }
    assert all(sample[name].dtype == torch.uint8 for name in ("view1", "previous"))
    again = drawn(views, triplet(stack), 0)
    assert all(torch.equal(sample[name], again[name]) for name in sample)
    assert not torch.equal(sample["view1"], drawn(views, triplet(stack), 1)["view1"])


def test_neighbours_are_neither_cropped_nor_flipped_and_views_are():
    image = torch.zeros(9, 84, 84, dtype=torch.uint8)
    image[:, 40:44, 10:14] = 200  # stays where it is, whatever its colour
    moved = 0
    for seed in range(12):
        sample = drawn(TripletViews(84), image, seed)
        for name in ("previous", "next"):
            inside = sample[name][:, 40:44, 10:14].float().mean()
            rest = sample[name].float().sum() - sample[name][:, 40:44, 10:14].float().sum()
            assert inside > 50
            assert rest / (3 * 84 * 84) < 60
            assert sample[name][:, 40:44, 10:14].float().std() < 60
        moved += not torch.equal(sample["view1"][0] > 100, image[0] > 100)
    assert moved > 9


def test_only_the_second_view_is_solarized():
    image = torch.full((9, 84, 84), 250, dtype=torch.uint8)
    dark = {"view1": 0, "view2": 0, "previous": 0}
    for seed in range(80):
        sample = drawn(TripletViews(84), image, seed)
        for name in dark:
            dark[name] += bool(sample[name].float().mean() < 100)
    assert dark["view1"] == dark["previous"] == 0
    assert 5 < dark["view2"] < 30  # one in five


def test_the_published_blur_changes_nothing():
    image = triplet()[:3]
    for sigma in (0.1, 0.2, NO_BLUR):
        assert torch.equal(F.gaussian_blur(image, [7, 7], [sigma, sigma]), image)
    plain = drawn(TripletViews(84), triplet(), 3)
    blurred = drawn(TripletViews(84, blur_sigma=(1.0, 2.0)), triplet(), 3)
    assert blurred["view1"].float().std() < 0.8 * plain["view1"].float().std()
    assert torch.equal(plain["previous"], blurred["previous"])


def test_orders_are_drawn_as_told():
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([draw_order(generator) for _ in range(1200)]).bincount(minlength=6)
    assert counts.min() > 150
    balanced = torch.stack([draw_order(generator, balanced=True) for _ in range(1200)]).bincount(minlength=6)
    assert 540 < balanced[0] < 660


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TripletViews(84, crop_scale=(0.5, 0.2)), "crop_scale"),
        (lambda: TripletViews(84, blur_sigma=(0.0, 0.2)), "blur_sigma"),
        (lambda: TripletViews(84, flip=2), "flip is 2"),
        (lambda: drawn(TripletViews(84, 4), triplet(3), 0), "12 of uint8 are needed"),
        (lambda: drawn(TripletViews(84), triplet().float(), 0), "float32"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
