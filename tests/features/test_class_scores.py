"""Accuracy beside balanced accuracy and the commonest class's share."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from patchloom.features.class_scores import class_scores


def test_naming_the_commonest_class_is_no_skill():
    labels = torch.tensor([1] * 69 + [0] * 31)
    found = class_scores(torch.ones_like(labels), labels)
    assert found == (pytest.approx(0.69), pytest.approx(0.5), pytest.approx(0.69))


def test_figures_are_scikit_learns_over_the_classes_that_occur():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (50,), generator=generator) * 2  # classes 1 and 3 never occur
    predicted = torch.randint(0, 5, (50,), generator=generator)
    found = class_scores(predicted, labels)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found.majority_share == pytest.approx(max((labels == c).sum().item() for c in range(5)) / 50)


def test_images_of_unknown_class_are_left_out():
    labels = torch.tensor([0, 0, 1, -1, -1])
    predicted = torch.tensor([0, 1, 1, 0, 1])
    assert class_scores(predicted, labels) == class_scores(predicted[:3], labels[:3])
    assert all(math.isnan(value) for value in class_scores(predicted, torch.full((5,), -1)))
