"""Figures of a classification: accuracy, how sure it is, and where it fails."""

from __future__ import annotations

from typing import Any

import torch

from patchloom.evaluate.config import Resample
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.features.extract import NO_LABEL, Features
from patchloom.statistics.metrics import accuracy, balanced_accuracy, macro_f1, mean_auroc

# Beyond this many classes the area under the curve of each against the rest says little and costs much.
MOST_AREAS = 20


def classification_figures(
    predictions: Predictions,
    train: Features,
    test: Features,
    *,
    draws: int = 1000,
    seed: int = 0,
    resample: Resample = "images",
) -> dict[str, Any]:
    """Return accuracy with its interval, balanced and per-class accuracy, counts and unreadable images.

    Args:
        predictions: Predicted classes of the n test images; with `scores` (votes, probabilities or logits by class) the
            mean AUROC of each class against the rest is given too.
        train: What was learnt from.
        test: The n features that was said of.
        draws: Bootstrap draws of each interval.
        seed: Seed of the draws.
        resample: What is drawn, see `EvaluationConfig`.

    Returns:
        Shares are fractions. Balanced accuracy is the mean over the classes that occur in the test images;
        `majority_share` is the accuracy of naming the commonest of them every time. `interval` is that of `score`, the
        accuracy.
    """
    class_names = predictions.class_names
    right, classes = torch.from_numpy(predictions.predicted) == test.labels, len(class_names)
    drawn: dict[str, Any] = {"draws": draws, "seed": seed, "resample": resample}
    shown = test.labels.bincount(minlength=classes).double()
    shares = test.labels[right].bincount(minlength=classes) / shown
    present = shown > 0
    per_class = {name: float(shares[number]) for number, name in enumerate(class_names) if present[number]}
    intervals = {score.name: predictions.interval(score, **drawn) for score in (accuracy, balanced_accuracy, macro_f1)}
    if predictions.scores is not None and 2 <= classes <= MOST_AREAS:
        intervals["auroc"] = predictions.interval(mean_auroc, **drawn)
    values = {name: interval.value for name, interval in intervals.items()}
    return {
        "score": values.pop("accuracy"),
        "score_name": "accuracy",
        "interval": intervals["accuracy"].ends,
        "accuracy": intervals["accuracy"].value,
        "balanced_accuracy": values.pop("balanced_accuracy"),
        "majority_share": float(shown.max() / shown.sum()),
        **values,
        "intervals": {name: interval.ends for name, interval in intervals.items()},
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
