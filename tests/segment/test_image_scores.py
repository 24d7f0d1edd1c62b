"""Scores image by image: equal to those of the whole set, with intervals that hold them, and the worst are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, distance_transform_edt

from patchloom.segment.boundary import TOLERANCE, boundary_f
from patchloom.segment.image_scores import ImageScores, errors_of
from patchloom.segment.metrics import MeanIoU
from patchloom.statistics.intervals import bootstrap_interval

NAMES = ["ground", "road", "tree", "nowhere"]


def blobs(seed: int, size: tuple[int, int] = (37, 50), unknown: bool = True) -> torch.Tensor:
    """Return a mask of coarse squares of three classes, a strip of it unknown."""
    coarse = torch.randint(0, 3, (5, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    mask = torch.nn.functional.interpolate(coarse[None, None], size=size, mode="nearest")[0, 0]
    if unknown:
        mask[: 1 + seed % 9, :20] = 255
    return mask


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return predictions, each shifted a little further from its truth, and truths."""
    return [(blobs(n, unknown=False).roll(n, 1), blobs(n)) for n in range(count)]


def by_distances(predicted: np.ndarray, truth: np.ndarray, number: int) -> float:
    """Return the boundary F of a class by distances in the whole image (Csurka et al. 2013)."""
    reach = max(1.0, TOLERANCE * math.hypot(*truth.shape))
    known = ~binary_dilation(truth == 255, np.ones((3, 3), bool))
    borders = []
    for mask in (predicted == number, truth == number):
        padded = np.pad(mask, 1, mode="edge")
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        borders.append(mask & ~inner & known)
    if not (borders[0].any() or borders[1].any()):
        return math.nan
    if not (borders[0].any() and borders[1].any()):
        return 0.0
    precision, recall = (
        (distance_transform_edt(~there) <= reach)[border].mean() for border, there in (borders, borders[::-1])
    )
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


@pytest.mark.parametrize("size", [(37, 50), (150, 331)])
def test_borders_are_scored_as_by_distances_in_the_whole_image(size):
    for seed in range(4):
        predicted, truth = blobs(seed, size, unknown=False).roll(2 * seed, 1), blobs(seed, size)
        expected = [by_distances(predicted.numpy(), truth.numpy(), number) for number in range(4)]
        np.testing.assert_allclose(boundary_f(predicted, truth, 4), expected, rtol=0, atol=1e-12)


def test_figures_are_those_of_the_set_and_lie_in_their_intervals():
    scores, metric = ImageScores(NAMES), MeanIoU(4)
    borders = []
    for index, (predicted, truth) in enumerate(pairs(6)):
        scores.update(index, predicted, truth)
        metric.update(predicted[None], truth[None])
        borders.append(boundary_f(predicted, truth, 4))
    figures, expected = scores.figures(seed=1), metric.compute()
    assert figures["miou"] == expected["miou"]
    assert figures["pixel_accuracy_test"] == expected["pixel_accuracy"]
    assert figures["boundary_f"] == pytest.approx(float(torch.stack(borders).nanmean()), abs=1e-12)
    assert figures["classes_not_in_test"] == ["nowhere"]
    assert figures["per_class_iou"]["nowhere"] is None
    for name, ends in (("miou", "interval"), *((n, f"{n}_interval") for n in ("pixel_accuracy_test", "boundary_f"))):
        low, high = figures[ends]
        assert 0 <= low < figures[name] < high <= 1
    for value, ends in (("per_class_iou", "per_class_interval"), ("per_class_boundary_f",) * 2):
        ends = "per_class_boundary_f_interval" if ends == value else ends
        for name in NAMES[:3]:
            low, high = figures[ends][name]
            assert low < figures[value][name] < high
    values = scores.values()
    assert {name: figures[name] for name in values if name != "per_class_iou"} == {
        name: value for name, value in values.items() if name != "per_class_iou"
    }
    assert set(values["per_class_iou"]) == set(NAMES[:3])


def test_pixel_accuracy_has_the_interval_of_a_bootstrap_over_images():
    scores, rows = ImageScores(NAMES), []
    for index, (predicted, truth) in enumerate(pairs(8)):
        scores.update(index, predicted, truth)
        known = truth != 255
        rows.append([int((predicted == truth)[known].sum()), int(known.sum())])
    rows = np.array(rows, float)
    plain = bootstrap_interval(
        lambda right, known: right.sum() / known.sum(), rows[:, 0], rows[:, 1], draws=400, kind="percentile"
    )
    low, high = scores.figures(draws=400)["pixel_accuracy_test_interval"]
    assert low < plain.value < high
    # Of eight images Student's t makes it wider than the plain bootstrap, but not by much.
    assert 1 < (high - low) / (plain.high - plain.low) < 2.5


def test_a_single_image_has_figures_and_no_interval_and_none_has_nothing():
    scores = ImageScores(NAMES)
    assert scores.figures() == scores.values() == {}
    assert scores.worst(3) == []
    scores.update(4, *pairs(3)[2])
    figures = scores.figures()
    assert 0 < figures["miou"] < 1
    assert figures["interval"] == figures["boundary_f_interval"] == [None, None]


def test_the_worst_images_come_first_and_those_of_which_nothing_is_known_last():
    scores = ImageScores(NAMES)
    truth = blobs(0, unknown=False)
    for index, wrong in ((7, 3), (2, 20), (9, 0), (5, 10)):
        predicted = truth.clone()
        predicted[:wrong] = 3
        scores.update(index, predicted, truth)
    scores.update(1, truth, torch.full_like(truth, 255))
    assert scores.worst(3) == [2, 5, 7]
    assert set(scores.worst(9)[3:]) == {9, 1}


def test_pixels_of_no_class_are_wrong():
    truth = blobs(0, unknown=False)
    nothing = torch.full_like(truth, 255)
    scores = ImageScores(NAMES)
    scores.update(0, nothing, truth)
    assert scores.values()["pixel_accuracy_test"] == 0
    assert errors_of(nothing, blobs(1), 4).unique().tolist() == [5, 255]


def test_what_is_kept_of_an_image_does_not_grow_with_its_pixels():
    kept = []
    for size in ((20, 30), (200, 300)):
        scores = ImageScores(NAMES)
        scores.update(0, blobs(1, size, unknown=False), blobs(1, size))
        kept.append(sum(part.nbytes for parts in (scores._areas, scores._borders) for part in parts))
    assert kept[0] == kept[1] == 4 * 8 * len(NAMES)
