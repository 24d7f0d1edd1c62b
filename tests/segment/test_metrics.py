"""Scores of segmentation equal scikit-learn's, torchmetrics' and MONAI's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from patchloom.errors import UsageError
from patchloom.segment.metrics import Areas, MeanIoU, areas, dice, hausdorff, iou


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (4, 20, 30), generator=generator)
    noise = torch.rand(truth.shape, generator=generator)
    said = torch.where(noise < 0.3, torch.randint(0, 5, truth.shape, generator=generator), truth)
    return said, truth.where(noise < 0.9, 255)


def test_mean_iou_adds_up_areas_over_all_images(pair):
    said, truth = pair
    metric = MeanIoU(5)
    for one, other in zip(said, truth, strict=True):
        metric.update(one[None], other[None])
    scores = metric.compute()
    known = truth != 255
    expected = jaccard_score(truth[known], said[known], average=None)
    assert scores["iou"] == pytest.approx(expected.tolist())
    assert scores["miou"] == pytest.approx(expected.mean())
    matrix = confusion_matrix(truth[known], said[known])
    assert scores["pixel_accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
    assert scores["class_accuracy"] == pytest.approx((matrix.diagonal() / matrix.sum(1)).mean())


def test_logits_are_taken_as_well(pair):
    said, truth = pair
    metric = MeanIoU(5)
    metric.update(torch.nn.functional.one_hot(said, 5).movedim(-1, 1).float(), truth)
    other = MeanIoU(5)
    other.update(said, truth)
    assert metric.compute() == other.compute()


def test_areas_are_torchmetrics_counts(pair):
    from torchmetrics.functional.classification import multiclass_stat_scores

    said, truth = pair
    hit, false, _, missed, _ = multiclass_stat_scores(
        said.flatten(), truth.flatten(), 5, average=None, ignore_index=255
    ).T
    found = areas(said, truth, 5)
    assert torch.equal(found.intersection, hit)
    assert torch.equal(found.predicted, hit + false)
    assert torch.equal(found.true, hit + missed)


def test_a_class_that_is_nowhere_does_not_count(pair):
    said, truth = pair
    more = areas(said, truth, 8)
    assert math.isnan(float(iou(more)[7]))
    assert float(iou(more).nanmean()) == pytest.approx(float(iou(areas(said, truth, 5)).nanmean()))


def test_batches_add_up(pair):
    said, truth = pair
    single = Areas(
        *(torch.stack(rows) for rows in zip(*(areas(a, b, 5) for a, b in zip(*pair, strict=True)), strict=True))
    )
    for one, other in zip(single.total(), areas(said, truth, 5), strict=True):
        assert torch.equal(one, other)


def test_dice_equals_monais_and_the_published_way_torchmetrics():
    monai = pytest.importorskip("monai.metrics")
    from torchmetrics.functional.segmentation import dice_score

    generator = torch.Generator().manual_seed(1)
    said, truth = (torch.randint(0, 4, (3, 16, 16), generator=generator) for _ in range(2))
    hot = [torch.nn.functional.one_hot(x, 4).movedim(-1, 1).float() for x in (said, truth)]
    expected = monai.compute_dice(*hot, include_background=True)
    found = torch.stack([dice(areas(a, b, 4)) for a, b in zip(said, truth, strict=True)])
    torch.testing.assert_close(found.float(), expected)
    whole = dice_score(*(x.transpose(0, 1).flatten(1)[None].long() for x in hot), num_classes=4, average="none")
    torch.testing.assert_close(dice(areas(said, truth, 4)).float(), whole.flatten().float())
    known = truth != 0  # the published way leaves these pixels out
    expected = 2 * ((said == truth) & known & (said == 2)).sum() / ((said[known] == 2).sum() + (truth == 2).sum())
    assert float(dice(areas(said, truth, 4, ignore_index=0))[2]) == pytest.approx(float(expected))


@pytest.mark.parametrize("spacing", [None, (0.7, 1.3, 2.5)])
@pytest.mark.parametrize("percentile", [95.0, 100.0])
def test_hausdorff_equals_monais(spacing, percentile):
    monai = pytest.importorskip("monai.metrics")
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (14, 12, 10)), indexing="ij"), -1)
    said = ((grid - [5, 6, 4]) ** 2).sum(-1) < 14
    truth = ((grid - [7, 5, 5]) ** 2).sum(-1) < 18
    said |= generator.random(said.shape) < 0.01
    truth[:2] = True  # touches the border
    pair = [torch.from_numpy(x)[None, None].float() for x in (said, truth)]
    expected = monai.compute_hausdorff_distance(
        *pair, include_background=True, percentile=percentile if percentile < 100 else None, spacing=spacing
    )
    assert hausdorff(said, truth, spacing, percentile) == pytest.approx(float(expected), rel=1e-5)


def test_hausdorff_of_empty_shapes():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert math.isnan(hausdorff(empty, empty))
    assert hausdorff(full, empty) == hausdorff(empty, full) == math.inf
    assert hausdorff(full, full) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: areas(torch.zeros(3), torch.zeros(4), 2), r"\(3,\) and the mask \(4,\)"),
        (lambda: areas(torch.zeros(2), torch.tensor([0, 7]), 2), "mask holds the class 7; classes run from 0 to 1"),
        (lambda: areas(torch.tensor([0, 3]), torch.zeros(2), 2), "prediction holds the class 3"),
        (lambda: areas(torch.zeros(2), torch.tensor([0, -1]), 2), "mask holds the class -1"),
        (lambda: hausdorff(np.ones((2, 2)), np.ones((2, 2)), (1.0,)), "each of 2 axes"),
        (lambda: hausdorff(np.ones((2, 2)), np.ones((2, 3))), "shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
