"""Panoptic quality, mask AP and borders against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.detection import PanopticQuality

from patchloom.errors import UsageError
from patchloom.segment.boundary import boundary_f
from patchloom.segment.objects import MaskAP, PanopticScores


def maps(seed, void=True):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 4, (6, 8), generator=generator).repeat_interleave(5, 0).repeat_interleave(5, 1)
    truth = small % 3
    said = torch.where(torch.rand(30, 40, generator=generator) < 0.1, (truth + 1) % 3, truth)
    ids = torch.where(truth > 0, small, 0)
    if void:
        truth[:4] = 255
    return said, torch.where(said > 0, ids, 0), truth, ids


def test_panoptic_quality_is_that_of_torchmetrics_over_all_images():
    scores, metric = PanopticScores({1, 2}, {0}), PanopticQuality({1, 2}, {0}, allow_unknown_preds_category=True)
    for seed in range(4):
        said, said_ids, truth, ids = maps(seed)
        scores.update(said, said_ids, truth, ids)
        metric.update(torch.stack([said, said_ids], -1)[None], torch.stack([truth, ids], -1)[None])
    found = scores.compute()
    assert found["pq"] == pytest.approx(float(metric.compute()))
    low, high = found["pq_interval"]
    assert low <= found["pq"] <= high
    assert found["pq"] == pytest.approx(sum(found["pq_per_class"].values()) / 3)


def test_an_image_on_which_all_is_void_counts_nowhere():
    scores = PanopticScores({1}, {0})
    said, said_ids, truth, ids = maps(0)
    scores.update(said, said_ids, torch.full_like(truth, 255), ids)
    assert math.isnan(scores.compute()["pq"])


@pytest.mark.extra("detection")
def test_mask_ap_is_that_of_coco_and_has_an_interval():
    pytest.importorskip("pycocotools")
    metric = MaskAP()
    for number in range(4):
        masks = torch.zeros(2, 20, 20, dtype=torch.bool)
        masks[0, 2:10, 2:10], masks[1, 12:18, 12:18] = True, True
        said = masks.clone()
        if number == 3:
            said[1] = False
            said[1, :3, 15:] = True
        scores = torch.tensor([0.9, 0.8])
        labels = torch.tensor([0, 1])
        metric.update({"masks": said, "scores": scores, "labels": labels}, {"masks": masks, "labels": labels})
    found = metric.compute()
    assert found["map_per_class"][0] == pytest.approx(1.0)
    assert 0.7 < found["map"] < 1
    low, high = found["map_interval"]
    assert low < found["map"] < high


def test_borders_within_reach_are_right_and_others_are_not():
    truth = torch.zeros(60, 80, dtype=torch.uint8)
    truth[20:40, 20:60] = 1
    near, far = truth.roll(1, 0), truth.roll(6, 0)
    assert boundary_f(truth, truth, 2).tolist() == [1.0, 1.0]
    assert boundary_f(near, truth, 2)[1] > 0.95
    # Its upright borders still lie on one another for 14 rows of 20.
    assert 0.1 < float(boundary_f(far, truth, 2)[1]) < 0.5


def test_what_has_no_border_has_no_score_and_what_is_missed_has_none_right():
    truth = torch.zeros(10, 10, dtype=torch.uint8)
    assert boundary_f(truth, truth, 3).isnan().all()
    said = truth.clone()
    said[3:6, 3:6] = 1
    found = boundary_f(said, truth, 3)
    assert found[:2].tolist() == [0.0, 0.0]
    assert math.isnan(found[2])
    # Where nothing is known there is no border.
    assert boundary_f(said, torch.full_like(truth, 255), 3).isnan().all()
    with pytest.raises(UsageError, match="the prediction has shape"):
        boundary_f(said, truth[1:], 3)
