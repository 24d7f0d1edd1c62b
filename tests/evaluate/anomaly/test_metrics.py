"""Figures of scores and maps against scikit-learn, and AUPRO against its definition, threshold by threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from patchloom.errors import UsageError
from patchloom.evaluate.anomaly.metrics import AUPRO, PixelFigures, Ranking, region_weights


def scored(seed: int, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores; with few levels there are many ties."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 80)
    values = truth * 0.6 + rng.normal(0, 0.6, 80)
    return truth, np.round(values * levels) / levels if levels else values


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rankings_are_scikit_learns(seed, levels):
    truth, values = scored(seed, levels)
    ranking = Ranking(values[truth == 0], values[truth == 1])
    assert ranking.auroc() == pytest.approx(roc_auc_score(truth, values))
    assert ranking.average_precision() == pytest.approx(average_precision_score(truth, values))
    assert ranking.f1(0.5) == pytest.approx(f1_score(truth, values >= 0.5))
    precision, recall, _ = precision_recall_curve(truth, values)
    best = np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert ranking.best_f1() == pytest.approx(best)


def test_of_one_kind_alone_nothing_is_known():
    for ranking in (Ranking(np.ones(3), np.ones(0)), Ranking(np.ones(0), np.ones(3))):
        assert all(
            math.isnan(v) for v in (ranking.auroc(), ranking.average_precision(), ranking.best_f1(), ranking.f1(0))
        )


def maps_and_masks(levels: int | None = None, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    rng = np.random.default_rng(seed)
    masks: list[np.ndarray | None] = [np.zeros((24, 30), bool) for _ in range(3)]
    masks[0][2:6, 3:9] = True
    masks[0][6, 9] = True  # touches at a corner: one region
    masks[0][15:20, 20:22] = True
    masks[1][10, 10] = True
    masks[2] = None
    maps = [rng.random((24, 30)) * 0.7 + (0 if mask is None else mask * 0.25) for mask in masks]
    maps = [np.round(one * levels) / levels if levels else one for one in maps]
    return [one.astype(np.float32) for one in maps], masks


def aupro_formula(maps, masks, limit=0.3):
    """Overlap and false positive rate at every threshold, linearly between them."""
    values = np.stack(maps)
    truth = np.stack([np.zeros((24, 30), bool) if mask is None else mask for mask in masks])
    regions = []
    for number, mask in enumerate(truth):
        numbers, count = label(mask, np.ones((3, 3)))
        regions += [(number, numbers == region) for region in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(values)[::-1]:
        told = values >= threshold
        overlap = np.mean([told[number][region].mean() for number, region in regions])
        points.append((float(told[~truth].mean()), float(overlap)))
    rates, overlaps = np.array(points).T
    inside = rates <= limit
    rates, overlaps = np.append(rates[inside], limit), np.append(overlaps[inside], np.interp(limit, rates, overlaps))
    return np.trapezoid(overlaps, rates) / limit


@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_its_definition(levels, limit):
    maps, masks = maps_and_masks(levels)
    found = PixelFigures(maps, masks)
    assert found.regions == [2, 1, 0]
    assert found.aupro(limit) == pytest.approx(aupro_formula(maps, masks, limit), abs=1e-6)


def test_the_metric_takes_batches():
    maps, masks = maps_and_masks()
    metric = AUPRO()
    for one, mask in zip(maps, masks, strict=True):
        truth = np.zeros_like(one) if mask is None else mask
        metric.update(torch.tensor(one)[None, None], torch.tensor(truth)[None, None])
    assert float(metric.compute()) == pytest.approx(PixelFigures(maps, masks).aupro())
    with pytest.raises(UsageError, match="fpr_limit is 0"):
        AUPRO(0.0)


def test_a_perfect_map_has_one_and_a_reversed_one_none():
    mask = np.zeros((20, 20), bool)
    mask[4:8, 5:9] = True
    assert PixelFigures([mask.astype(float)], [mask]).aupro() == pytest.approx(1, abs=1e-9)
    assert PixelFigures([1.0 - mask], [mask]).aupro() == pytest.approx(0, abs=1e-9)


def test_every_region_counts_alike_whatever_its_size():
    mask = np.zeros((20, 20), bool)
    mask[:10, :10], mask[15, 15] = True, True
    weights, count = region_weights(mask)
    assert count == 2
    assert weights[15, 15] == 1
    assert weights[:10, :10].sum() == pytest.approx(1)
    found = np.zeros((20, 20))
    found[15, 15] = 1
    # Half of the regions are found at once; the other on the way from one false positive to all pixels.
    assert PixelFigures([found], [mask]).aupro() > 0.5


def test_intervals_hold_the_figures_and_draws_agree_with_them():
    pairs = [maps_and_masks(seed=seed) for seed in range(6)]
    maps, masks = [m for one, _ in pairs for m in one], [m for _, one in pairs for m in one]
    found = PixelFigures(maps, masks)
    intervals = found.intervals(0.6)
    assert intervals["pixel_auroc"].value == pytest.approx(
        roc_auc_score(
            np.concatenate([(np.zeros_like(m) if k is None else k).ravel() for m, k in zip(maps, masks, strict=True)])
            > 0,
            np.stack(maps).ravel(),
        )
    )
    for name in ("pixel_auroc", "aupro", "pixel_ap", "pixel_f1"):
        value, low, high = intervals[name][:3]
        assert low <= value <= high
        assert 0 < high - low < 0.5
    assert intervals == found.intervals(0.6)


def test_draws_of_images_that_are_all_alike_do_not_spread():
    maps, masks = maps_and_masks()
    found = PixelFigures(maps * 4, masks * 4)
    # One image with each sort of defect, four times over: only how often each is drawn differs.
    interval = PixelFigures(maps[:1] * 8 + maps[2:] * 8, masks[:1] * 8 + masks[2:] * 8).intervals(0.6)["aupro"]
    assert interval.high - interval.low == pytest.approx(0, abs=1e-6)
    assert found.aupro() == pytest.approx(PixelFigures(maps, masks).aupro())


def test_without_defects_or_without_good_pixels_nothing_is_known():
    maps, _ = maps_and_masks()
    for pair in (([maps[2]], [None]), ([maps[0]], [np.ones((24, 30), bool)])):
        assert all(
            math.isnan(value) for interval in PixelFigures(*pair).intervals(0.5).values() for value in interval[:3]
        )
    with pytest.raises(UsageError, match="does not belong"):
        PixelFigures([maps[0]], [np.ones((3, 3), bool)])
