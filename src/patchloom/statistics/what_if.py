"""What might have been among the images drawn: without it a bootstrap takes what never went wrong for certain.

A classifier right on all 20 test images is right in every draw of them, so the plain bootstrap says [1, 1]. Agresti
and Coull's interval of a share (1998, The American Statistician 52) mends this by adding images told rightly and
wrongly to the sample. The same is done here for any score: a few images that were not seen are drawn now and then
beside those that were, about once or twice a draw, so that they matter where images are few and vanish where they are
many.

>>> kind = of_classes(np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
>>> kind.worst.tolist(), kind.targets.tolist()
([1, 0], [0, 1])
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray

# Kinds of wrong answers that are thought of, at most.
MOST_KINDS = 1024
# How often the unseen images are drawn, per draw: chosen by simulation, see benchmarks/coverage.py.
WRONG, SHRUNK, OF_VALUES = 1.0, 1.0, 0.25


class WhatIf(NamedTuple):
    """Kinds of images that were not seen: at the worst and at the best, alike in what is true of them."""

    worst: Array
    """(q, …) predictions where things go wrong."""
    best: Array
    """(q, …) predictions where they go well."""
    targets: Array
    """(q, …) what is true of them."""
    wrong: Array
    """(q,) how often each is drawn at the worst, per draw of as many units as there are."""
    right: Array
    """(q,) how often at the best."""
    differs: Array
    """(q,) how often, of two encoders, one is at the worst and the other at the best; and as often the reverse."""


def of_classes(predicted: Array, truth: Array, units: int) -> WhatIf:
    """Return images of each class that occurs, told as each other class or rightly.

    A class told rightly (or wrongly) throughout is drawn towards the share of all classes together by one image, as
    few images of a class say little of it; and one wrong and one right answer are added to all.

    Args:
        predicted: (n,) classes.
        truth: (n,) classes.
        units: Images, or groups of them, in a draw.
    """
    n, classes = len(truth), int(max(predicted.max(initial=0), truth.max(initial=0))) + 1
    shown = np.bincount(truth, minlength=classes)
    accuracy = (float((predicted == truth).sum()) + 2) / (n + 4)
    predicted_counts = np.bincount(predicted, minlength=classes) + 1.0
    occurring = np.flatnonzero(shown)
    # The answers given most often, where there are too many to think of each.
    likely = np.sort(np.argsort(-predicted_counts, kind="stable")[: max(2, MOST_KINDS // len(occurring))])
    true, answer = (part.ravel() for part in np.meshgrid(occurring, likely, indexing="ij"))
    wrong = true != answer
    true, answer = true[wrong], answer[wrong]
    if not len(true):  # one class, and no other to take it for
        true, answer = occurring, occurring + 1
        predicted_counts = np.append(predicted_counts, 1.0)
    share = predicted_counts[answer] / np.bincount(true, weights=predicted_counts[answer], minlength=classes)[true]
    of_class, shrunk = shown[true] / n, SHRUNK * units / n
    return WhatIf(
        answer,
        true,
        true,
        share * (WRONG * of_class + shrunk * (1 - accuracy)),
        share * (WRONG * of_class + shrunk * accuracy),
        share * WRONG * of_class,
    )


def of_values(values: Array, truth: Array, units: int) -> WhatIf:
    """Return a value of 0 and one of 1: values lie between. Arguments as for `of_classes`, values (n,)."""
    mass = np.array([OF_VALUES])
    return WhatIf(np.zeros(1), np.ones(1), np.zeros(1, dtype=truth.dtype), mass, mass, mass)


def of_scores(scores: Array, truth: Array, units: int) -> WhatIf:
    """Return images that are ranked as badly, or as well, as can be.

    Args:
        scores: (n, L), or (n,) of one label.
        truth: (n,) classes or, of one label, 0 and 1; or (n, L) 0 or 1 and NaN where unknown.
        units: As for `of_classes`.
    """
    if scores.ndim == 1:
        found = of_scores(scores[:, None], truth, units)
        return found._replace(worst=found.worst[:, 0], best=found.best[:, 0])
    lowest, highest = scores.min(0) - 1, scores.max(0) + 1
    if truth.ndim == 1:
        occurring, counts = np.unique(truth, return_counts=True)
        present = occurring[:, None] == (np.arange(scores.shape[1]) if scores.shape[1] > 1 else 1)
        targets, mass = occurring, WRONG * counts / len(truth)
    else:
        occurs = float((truth > 0.5).mean())
        present = np.stack([np.ones(scores.shape[1], dtype=bool), np.zeros(scores.shape[1], dtype=bool)])
        targets, mass = present.astype(np.float64), WRONG * np.array([occurs, 1 - occurs])
    worst, best = np.where(present, lowest, highest), np.where(present, highest, lowest)
    return WhatIf(worst, best, targets, mass, np.zeros_like(mass), mass / 2)


def of_areas(tables: Array, truth: Array, units: int) -> WhatIf:
    """Return an image of mean areas in which nothing overlaps, and one in which all does.

    Args:
        tables: (n, 3, …) intersection and two areas of each image.
        truth: (n,), not looked at.
        units: As for `of_classes`.
    """
    mean = tables.mean(0, keepdims=True)
    worst, best = mean.copy(), mean.copy()
    worst[:, 0] = 0
    best[:, :] = mean[:, 2:3]
    mass = np.array([OF_VALUES])
    return WhatIf(worst, best, np.zeros(1, dtype=truth.dtype), mass, mass, mass)
