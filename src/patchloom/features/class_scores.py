"""Accuracy and the two figures it is read beside: without them the commonest class looks like skill.

>>> class_scores(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
ClassScores(accuracy=0.75, balanced_accuracy=0.5, majority_share=0.75)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassScores(NamedTuple):
    """What was predicted of n images, as shares in [0, 1]; NaN where no image has a known class."""

    accuracy: float
    """Share of the images told rightly."""
    balanced_accuracy: float
    """Mean over the classes that occur of the share of their images told rightly; 1 / classes by chance."""
    majority_share: float
    """Share of the commonest class: the accuracy of naming it every time."""

    def named(self, prefix: str = "") -> dict[str, float]:
        """Return the figures by name, the accuracy first, so that they stand beside one another in tables."""
        return {f"{prefix}{name}": value for name, value in self._asdict().items()}


def class_scores(predicted: Tensor, labels: Tensor) -> ClassScores:
    """Return accuracy, balanced accuracy and the commonest class's share.

    Args:
        predicted: (n,) int64 classes.
        labels: (n,) int64 true classes; images below 0 have none and are left out.
    """
    known = labels >= 0
    predicted, labels = predicted[known], labels[known]
    if not len(labels):
        return ClassScores(float("nan"), float("nan"), float("nan"))
    right = predicted == labels
    shown = labels.bincount().double()
    shares = torch.bincount(labels[right], minlength=len(shown)) / shown
    return ClassScores(float(right.double().mean()), float(shares[shown > 0].mean()), float(shown.max() / len(labels)))
