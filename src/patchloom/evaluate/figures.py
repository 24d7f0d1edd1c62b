"""Figures of a classification: accuracy, what it is worth, and where it fails.

>>> [round(end, 3) for end in wilson(0.9, 100)]
[0.826, 0.945]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from torch import Tensor

from patchloom.features.extract import Features


def classification_figures(
    predicted: Tensor, train: Features, test: Features, class_names: list[str]
) -> dict[str, Any]:
    """Return accuracy with its interval, balanced and per-class accuracy, counts and unreadable images.

    Args:
        predicted: (n,) int64 classes.
        train: What was learnt from.
        test: The n features `predicted` was made from, with the true classes.
        class_names: Names by class.

    Returns:
        Shares are fractions. Balanced accuracy is the mean over the classes that occur in the test images.
    """
    right, classes = predicted == test.labels, len(class_names)
    shown = test.labels.bincount(minlength=classes).double()
    shares = test.labels[right].bincount(minlength=classes) / shown
    present = shown > 0
    per_class = {name: float(shares[number]) for number, name in enumerate(class_names) if present[number]}
    share, n = float(right.double().mean()), len(right)
    skipped = train.skipped + test.skipped
    return {
        "accuracy": share,
        "interval": wilson(share, n),
        "balanced_accuracy": float(shares[present].mean()),
        "per_class_accuracy": per_class,
        "n": n,
        "train_images": len(train.labels),
        "dim": int(test.vectors.shape[1]),
        "unreadable_images": len(skipped),
        "skipped": [{"file": key, "reason": reason} for key, reason in skipped],
    }


def wilson(share: float, n: int) -> list[float]:
    """Return the 95 % confidence interval of a share measured on n images (Wilson 1927).

    Args:
        share: 0 … 1.
        n: At least 1.

    Returns:
        Lower and upper end, within 0 … 1.
    """
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]
