"""Insertion and deletion against plain loops over pixels; what a good map scores and a bad one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.explain.faithfulness import blurred_start, insertion_deletion, mass_inside, pixel_ranks, pointing_game


def linear(classes: int = 3, side: int = 8, seed: int = 0):
    weight = torch.randn(classes, 3 * side * side, generator=torch.Generator().manual_seed(seed)) * 0.2
    return lambda images: images.flatten(1) @ weight.T


def test_curves_are_those_of_a_loop_over_pixels():
    model, images, maps = linear(), torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8)
    target = torch.tensor([2, 0])
    scores = insertion_deletion(model, images, maps, target, steps=8)
    blurred = blurred_start(images)
    for index in range(2):
        order = maps[index].flatten().argsort(descending=True)
        curves = {"insertion": [], "deletion": []}
        for step in range(9):
            inserted, deleted = blurred[index].flatten(1).clone(), images[index].flatten(1).clone()
            for pixel in order[: step * 8]:
                inserted[:, pixel] = images[index].flatten(1)[:, pixel]
                deleted[:, pixel] = 0
            for name, changed in (("insertion", inserted), ("deletion", deleted)):
                curves[name].append(float(model(changed.view(1, 3, 8, 8)).softmax(-1)[0, target[index]]))
        for name, curve in curves.items():
            torch.testing.assert_close(getattr(scores.curves, name)[index], torch.tensor(curve))
            area = sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / 8
            assert float(getattr(scores, name)[index]) == pytest.approx(area, abs=1e-6)


def test_the_ends_are_the_image_the_blur_and_the_mean_colour():
    model, images, target = linear(), torch.randn(2, 3, 8, 8), torch.tensor([1, 1])
    curves = insertion_deletion(model, images, torch.rand(2, 2, 2), target).curves
    probability = model(images).softmax(-1)[:, 1]
    torch.testing.assert_close(curves.insertion[:, -1], probability)
    torch.testing.assert_close(curves.deletion[:, 0], probability)
    torch.testing.assert_close(curves.deletion[:, -1], torch.full((2,), 1 / 3))
    torch.testing.assert_close(curves.insertion[:, 0], model(blurred_start(images)).softmax(-1)[:, 1])
    assert curves.fraction.tolist() == pytest.approx([step / 50 for step in range(51)])


def test_patches_go_as_a_whole_and_bilinear_maps_pixel_by_pixel():
    maps = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]])
    ranks, count = pixel_ranks(maps, (4, 4), "patches")
    assert count == 4
    assert ranks[0].tolist() == [[3, 3, 0, 0], [3, 3, 0, 0], [1, 1, 2, 2], [1, 1, 2, 2]]
    ranks, count = pixel_ranks(maps, (4, 4))
    smooth = F.interpolate(maps[:, None], size=(4, 4), mode="bilinear")[0, 0].flatten()
    assert count == 16
    assert ranks.flatten()[smooth.argsort(descending=True, stable=True)].tolist() == list(range(16))
    scores = insertion_deletion(linear(side=4), torch.randn(1, 3, 4, 4), maps, torch.tensor([0]), unit="patches")
    assert scores.curves.insertion.shape == (1, 5)


def test_the_map_of_what_decides_beats_its_opposite():
    def bright_corner(images):  # class 1 where the upper left quarter is bright
        score = 8 * (images[:, :, :4, :4].mean((1, 2, 3)) - 0.7)
        return torch.stack([-score, score], 1)

    images = torch.randn(4, 3, 8, 8) * 0.1
    images[:, :, :4, :4] += 1
    right = torch.zeros(4, 2, 2)
    right[:, 0, 0] = 1
    target = torch.ones(4, dtype=torch.int64)
    good = insertion_deletion(bright_corner, images, right, target)
    bad = insertion_deletion(bright_corner, images, 1 - right, target)
    assert float((good.insertion - bad.insertion).min()) > 0.02
    assert float((bad.deletion - good.deletion).min()) > 0.1
    mask = F.interpolate(right[:, None], size=(8, 8))[:, 0] > 0
    assert pointing_game(right, mask).all()
    assert not pointing_game(1 - right, mask).any()
    inside = mass_inside(right, mask)
    assert float(inside.min()) > 0.6
    torch.testing.assert_close(mass_inside(torch.ones(1, 2, 2), mask[:1]), torch.tensor([0.25]))


def test_blur_follows_the_size_of_the_image():
    from torchvision.transforms.v2.functional import gaussian_blur

    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(blurred_start(images), gaussian_blur(images, [51, 51], [50.0, 50.0]))
    small = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(blurred_start(small), gaussian_blur(small, [9, 9], [50 / 7, 50 / 7]))


@pytest.mark.parametrize(
    ("maps", "target", "steps", "message"),
    [
        (torch.rand(1, 2, 2), torch.tensor([0, 0]), 50, r"2 images have maps of shape \(1, 2, 2\)"),
        (torch.rand(2, 4), torch.tensor([0, 0]), 50, "maps of shape"),
        (torch.rand(2, 2, 2), torch.tensor([0]), 50, "give one class for each image"),
        (torch.rand(2, 2, 2), torch.tensor([0, 0]), 0, "steps is 0"),
    ],
)
def test_what_does_not_belong_together_is_refused(maps, target, steps, message):
    with pytest.raises(UsageError, match=message):
        insertion_deletion(linear(), torch.randn(2, 3, 8, 8), maps, target, steps=steps)
    with pytest.raises(UsageError, match="do not belong together"):
        pointing_game(torch.rand(1, 2, 2), torch.zeros(2, 4, 4, dtype=torch.bool))
