"""Figures of a classification: accuracy, how sure it is, and where it fails.

>>> [round(end, 3) for end in wilson(0.9, 100)]
[0.826, 0.945]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch

from patchloom.evaluate.metrics import accuracy, balanced_accuracy, macro_f1, mean_auroc
from patchloom.evaluate.predictions import Predictions
from patchloom.evaluate.statistics import Interval
from patchloom.features.extract import NO_LABEL, Features

# Beyond this many classes the area under the curve of each against the rest says little and costs much.
MOST_AREAS = 20


def classification_figures(
    said: Predictions, train: Features, test: Features, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return accuracy with its interval, balanced and per-class accuracy, counts and unreadable images.

    Args:
        said: Predicted classes of the n test images; with `scores` (votes, probabilities or logits by class) the mean
            AUROC of each class against the rest is given too.
        train: What was learnt from.
        test: The n features that was said of.
        draws: Bootstrap draws of each interval.
        seed: Seed of the draws.

    Returns:
        Shares are fractions. Balanced accuracy is the mean over the classes that occur in the test images. `interval`
        is that of `score`, the accuracy: by the bootstrap, or Wilson's where all or no images are told rightly and
        draws of them cannot differ.
    """
    class_names = said.class_names
    right, classes = torch.from_numpy(said.predicted) == test.labels, len(class_names)
    shown = test.labels.bincount(minlength=classes).double()
    shares = test.labels[right].bincount(minlength=classes) / shown
    present = shown > 0
    per_class = {name: float(shares[number]) for number, name in enumerate(class_names) if present[number]}
    found = {score.name: said.interval(score, draws=draws, seed=seed) for score in (accuracy, balanced_accuracy)}
    found["macro_f1"] = said.interval(macro_f1, draws=draws, seed=seed)
    if said.scores is not None and 2 <= classes <= MOST_AREAS:
        found["auroc"] = said.interval(mean_auroc, draws=draws, seed=seed)
    share, n = found["accuracy"].value, len(right)
    if share in (0.0, 1.0):
        low, high = wilson(share, n)
        found["accuracy"] = Interval(share, low, high)
    return {
        "score": share,
        "score_name": "accuracy",
        "interval": [found["accuracy"].low, found["accuracy"].high],
        **{name: interval.value for name, interval in found.items()},
        "intervals": {name: [interval.low, interval.high] for name, interval in found.items()},
        "per_class_accuracy": per_class,
        **counts(train, test),
    }


def counts(train: Features, test: Features) -> dict[str, Any]:
    """Return the numbers of images, the width of the features, and the images left out with the reason."""
    skipped = train.skipped if train is test else train.skipped + test.skipped
    return {
        "n": len(test.labels),
        "train_images": len(train.labels),
        "dim": int(test.vectors.shape[1]),
        "unreadable_images": sum(reason != NO_LABEL for _, reason in skipped),
        "unlabelled_images": sum(reason == NO_LABEL for _, reason in skipped),
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
