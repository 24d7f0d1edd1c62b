"""Scores: scikit-learn's values, with and without weights."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from patchloom.statistics import metrics
from patchloom.statistics.metrics import SCORES, per_label_auroc


def draw(n: int = 60, grades: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth, said = rng.integers(0, grades, (2, n))
    return said, truth, rng.integers(0, 4, (5, n))


REFERENCES = {
    "accuracy": sk.accuracy_score,
    "macro_f1": lambda t, p, sample_weight: sk.f1_score(t, p, average="macro", sample_weight=sample_weight),
    "kappa": lambda t, p, sample_weight: sk.cohen_kappa_score(t, p, weights="quadratic", sample_weight=sample_weight),
    "balanced_accuracy": sk.balanced_accuracy_score,
    "mean_grade_error": sk.mean_absolute_error,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_scores_of_classes_are_scikit_learns(name):
    said, truth, weights = draw()
    many = SCORES[name].weighted(said, truth, weights)
    expected = [REFERENCES[name](truth, said, sample_weight=row) for row in weights]
    np.testing.assert_allclose(many, expected, rtol=1e-12)
    assert SCORES[name](said, truth) == pytest.approx(REFERENCES[name](truth, said, sample_weight=None))


def test_areas_are_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    truth, scores, weights = rng.integers(0, 2, 80), rng.integers(0, 9, 80) / 9, rng.integers(0, 4, (5, 80))
    expected = [sk.roc_auc_score(truth, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(metrics.auroc.weighted(scores, truth, weights), expected, rtol=1e-12)


def test_the_mean_area_is_that_of_the_labels_that_occur_and_do_not_always():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 2, (50, 4)).astype(float), rng.random((50, 4))
    truth[:, 1], truth[:, 2] = 0, 1
    truth[:10, 3] = np.nan
    areas = [sk.roc_auc_score(truth[:, 0], scores[:, 0]), sk.roc_auc_score(truth[10:, 3], scores[10:, 3])]
    assert metrics.mean_auroc(scores, truth) == pytest.approx(np.mean(areas))
    found = per_label_auroc(scores, truth)
    assert np.isnan(found).tolist() == [False, True, True, False]
    assert [found[0], found[3]] == pytest.approx(areas)


def test_classes_are_taken_one_against_the_rest():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 3, 90), rng.random((90, 3))
    scores /= scores.sum(1, keepdims=True)
    expected = sk.roc_auc_score(truth, scores, multi_class="ovr", average="macro")
    assert metrics.mean_auroc(scores, truth) == pytest.approx(expected)


def test_f1_of_labels_is_scikit_learns_where_all_is_known():
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 2, (50, 3)).astype(float), rng.random((50, 3))
    weights = rng.integers(0, 3, (4, 50))
    expected = [sk.f1_score(truth, scores >= 0.5, average="macro", sample_weight=row) for row in weights]
    np.testing.assert_allclose(metrics.label_macro_f1.weighted(scores, truth, weights), expected)
    truth[:20, 0] = np.nan
    single = [sk.f1_score(truth[20:, 0], scores[20:, 0] >= 0.5)]
    single += [sk.f1_score(truth[:, label], scores[:, label] >= 0.5) for label in (1, 2)]
    assert metrics.label_macro_f1(scores, truth) == pytest.approx(np.mean(single))


def test_a_class_that_does_not_occur_counts_for_nothing():
    said, truth = np.array([0, 0, 2, 2]), np.array([0, 0, 2, 0])
    assert metrics.balanced_accuracy(said, truth) == pytest.approx((2 / 3 + 1) / 2)


def test_what_is_not_defined_is_nan():
    assert np.isnan(metrics.kappa([1, 1], [1, 1]))
    assert np.isnan(metrics.auroc(np.array([0.2, 0.4]), np.array([1, 1])))
    assert np.isnan(metrics.auroc(np.array([0.2, 0.4]), np.array([np.nan, np.nan])))
