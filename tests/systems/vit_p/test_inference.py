"""Points of masks, fusion and the three kinds of answers, against the published formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.errors import UsageError
from patchloom.systems.vit_p.inference import (
    fuse_mask_scores,
    inner_pixel,
    instance_inference,
    mask_points,
    panoptic_inference,
    semantic_inference,
)


def draws(queries=5, classes=4, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, classes + 1, generator=generator, dtype=torch.float64) * 2
    point = torch.randn(queries, classes, generator=generator, dtype=torch.float64) * 2
    masks = torch.randn(queries, side, side + 3, generator=generator, dtype=torch.float64) * 3
    return query, point, masks


def published_points(masks):
    count, height, width = masks.shape
    rows, columns = torch.unravel_index(masks.view(count, -1).argmax(1), (height, width))
    return torch.stack([rows / float(height), columns / float(width)], -1) * 2 - 1


def published_scores(query, point, alpha, renormalize):
    p, q = query[:, :-1].softmax(-1), point.softmax(-1)
    g = p ** (1 - alpha) * q**alpha
    v = query.softmax(-1)[:, -1:]
    r = g.log().softmax(-1) if renormalize else g
    return torch.log(torch.cat([r * (1 - v), v], -1) + 1e-8)


def test_the_point_of_a_soft_mask_is_its_first_highest_value():
    _, _, masks = draws()
    torch.testing.assert_close(mask_points(masks), published_points(masks).float())
    flat = torch.zeros(1, 4, 6)
    assert mask_points(flat).tolist() == [[-1.0, -1.0]]
    flat[0, 2, 3] = flat[0, 3, 1] = 5.0
    assert mask_points(flat).tolist() == [[0.0, 0.0]]
    assert mask_points(torch.zeros(0, 4, 6)).shape == (0, 2)


def test_the_point_of_a_mask_of_yes_or_no_lies_deep_inside():
    ring = torch.zeros(1, 9, 9, dtype=torch.bool)
    ring[0, 1:8, 1:8] = True
    assert mask_points(ring, "distance")[0].tolist() == pytest.approx([4 / 9 * 2 - 1] * 2)
    ring[0, 3:6, 3:6] = False  # its centre of mass is in the hole
    for mode in ("distance", "centroid"):
        row, column = ((mask_points(ring, mode)[0] + 1) / 2 * 9).round().long().tolist()
        assert ring[0, row, column]
    # The border of the image is a border.
    assert inner_pixel(np.ones((5, 7), bool)) == (2, 2)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200))
def test_points_lie_inside_whatever_the_mask(seed):
    mask = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(seed)) > 0.6
    mask[:, 3, 4] = True
    for mode in ("argmax", "distance", "centroid"):
        places = ((mask_points(mask, mode) + 1) / 2 * torch.tensor([7, 9])).round().long()
        assert all(mask[n, r, c] for n, (r, c) in enumerate(places.tolist()))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_fused_scores_are_the_published_ones(alpha, renormalize):
    query, point, _ = draws()
    found = fuse_mask_scores(query, point, alpha, renormalize)
    torch.testing.assert_close(found, published_scores(query, point, alpha, renormalize), atol=1e-9, rtol=1e-9)
    single = fuse_mask_scores(query.float(), point.float(), alpha, renormalize)
    torch.testing.assert_close(single.double(), found, atol=1e-5, rtol=1e-5)


def test_fusion_survives_classes_of_no_probability():
    query, point, _ = draws()
    query[:, 0] = -torch.inf
    assert torch.isfinite(fuse_mask_scores(query, point)).all()
    query[:, :-1], point[:, 1:] = -1e6, -1e6
    assert torch.isfinite(fuse_mask_scores(query, point)).all()
    assert torch.isfinite(fuse_mask_scores(query.half(), point.half())).all()


def test_masks_without_classes_are_judged_by_points_and_their_own_quality():
    _, point, _ = draws()
    torch.testing.assert_close(fuse_mask_scores(None, point).exp()[:, :-1], point.softmax(-1), atol=1e-7, rtol=1e-7)
    void = torch.full((5,), 0.25, dtype=torch.float64)
    found = fuse_mask_scores(None, point, void=void).exp()
    torch.testing.assert_close(found[:, :-1], point.softmax(-1) * 0.75, atol=1e-7, rtol=1e-7)


def test_semantic_scores_are_sums_over_masks():
    query, _, masks = draws()
    expected = torch.zeros(4, 12, 15, dtype=torch.float64)
    for q in range(5):
        for c in range(4):
            expected[c] += query[q].softmax(-1)[c] * masks[q].sigmoid()
    torch.testing.assert_close(semantic_inference(query, masks), expected)


def published_panoptic(query, masks, things, least, overlap):
    scores, labels = query.softmax(-1).max(-1)
    kept = [q for q in range(len(query)) if labels[q] != query.shape[1] - 1 and scores[q] > least]
    ids, segments, stuff = torch.zeros(masks.shape[1:], dtype=torch.int32), [], {}
    if not kept:
        return ids, segments
    owner = torch.stack([scores[q] * masks[q].sigmoid() for q in kept]).argmax(0)
    for k, q in enumerate(kept):
        area, whole = int((owner == k).sum()), int((masks[q].sigmoid() >= 0.5).sum())
        final = (owner == k) & (masks[q].sigmoid() >= 0.5)
        if not (area and whole and final.any()) or area / whole < overlap:
            continue
        label = int(labels[q])
        if label not in things and label in stuff:
            ids[final] = stuff[label]
            continue
        segments.append({"id": len(segments) + 1, "category_id": label, "isthing": label in things})
        ids[final] = len(segments)
        if label not in things:
            stuff[label] = len(segments)
    return ids, segments


@pytest.mark.parametrize(("least", "overlap"), [(0.0, 0.0), (0.3, 0.1), (0.0, 0.8), (0.99, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_panoptic_segments_are_the_published_ones(seed, least, overlap):
    query, _, masks = draws(queries=9, seed=seed)
    found = panoptic_inference(query, masks, {1, 3}, least, overlap)
    ids, segments = published_panoptic(query, masks, {1, 3}, least, overlap)
    assert torch.equal(found.ids, ids)
    assert found.segments == segments


def test_objects_are_the_best_pairs_of_mask_and_class():
    query, _, masks = draws()
    found = instance_inference(query, masks, top_k=7)
    shares = query.softmax(-1)[:, :-1]
    pairs = sorted(((float(shares[q, c]), q, c) for q in range(5) for c in range(4)), reverse=True)[:7]
    for number, (score, q, c) in enumerate(pairs):
        mask = masks[q] > 0
        assert torch.equal(found.masks[number], mask)
        assert int(found.labels[number]) == c
        quality = float((masks[q].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        assert float(found.scores[number]) == pytest.approx(score * quality)
    only = instance_inference(query, masks, top_k=7, things={2})
    assert set(only.labels.tolist()) <= {2}


def test_no_masks_are_no_answer_and_no_error():
    query, masks = torch.zeros(0, 5), torch.zeros(0, 6, 7)
    assert not semantic_inference(query, masks).any()
    panoptic = panoptic_inference(query, masks, {1})
    assert not panoptic.ids.any()
    assert panoptic.segments == []
    assert [len(part) for part in instance_inference(query, masks)] == [0, 0, 0]
    assert fuse_mask_scores(query, torch.zeros(0, 4)).shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_points(torch.full((1, 2, 2), torch.nan)), "masks hold NaN"),
        (lambda: mask_points(torch.zeros(1, 2, 2), "distance"), "is for masks of yes or no"),
        (lambda: mask_points(torch.zeros(1, 2, 2), "middle"), "unknown point_mode 'middle'"),
        (lambda: fuse_mask_scores(torch.zeros(2, 5), torch.zeros(2, 3)), "have one class more"),
        (lambda: fuse_mask_scores(torch.zeros(2, 4), torch.zeros(2, 3), alpha=1.5), "alpha is 1.5"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
