"""Scores of predictions, each able to score many bootstrap draws at once.

A score is called as `score(predictions, targets)`; `score.weighted(predictions, targets, weights)` gives the score of
every row of weights, where a weight says how often an image was drawn. The values are scikit-learn's (a test holds
them against it); what is ours is only that a thousand draws cost little more than one.

>>> import numpy as np
>>> accuracy(np.array([0, 1, 1]), np.array([0, 1, 0]))
0.6666666666666666
>>> accuracy.weighted(np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([[1, 1, 1], [2, 0, 1], [1, 2, 0]]))
array([0.66666667, 0.66666667, 1.        ])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import sparse

from patchloom.statistics.delong import delong_interval
from patchloom.statistics.what_if import WhatIf, of_areas, of_classes, of_scores, of_values

Array = np.ndarray
Weighted = Callable[[Array, Array, Array], Array]
ClosedForm = Callable[[Array, Array, float], tuple[float, float] | None]
UNSEEN = {"classes": of_classes, "values": of_values, "scores": of_scores, "areas": of_areas}


@dataclass(frozen=True)
class Score:
    """A figure of predictions."""

    name: str
    """As it stands in results."""
    weighted: Weighted
    """Takes predictions (n, …), targets (n, …) and weights (r, n), returns (r,); NaN where it is not defined."""
    needs: str
    """What predictions are: `classes`, (n,) integers; `scores`, (n, L), higher where a label is more likely;
    `values`, (n,) in [0, 1], such as the precision of each query; or `areas`, (n, 3, …), of images."""
    closed: ClosedForm | None = None
    """Interval without draws for independent images: of predictions, targets and level; None where it has no say."""
    closed_by_class: bool = False
    """Whether that interval is the same whatever the shares of the classes."""

    def what_if(self, predictions: Array, targets: Array, units: int) -> WhatIf:
        """Return images that were not seen, for draws of so many units; see `what_if`."""
        return UNSEEN[self.needs](predictions, targets, units)

    def what_if_pair(self, first: Array, second: Array, targets: Array, units: int) -> tuple[WhatIf, WhatIf]:
        """Return the same for two encoders, row by row of the same images."""
        if self.needs != "classes":
            return self.what_if(first, targets, units), self.what_if(second, targets, units)
        # The answers thought of are those of both.
        both = self.what_if(np.concatenate([first, second]), np.concatenate([targets, targets]), units)
        return both, both

    def __call__(self, predictions: Any, targets: Any) -> float:
        """Return the score of all images, each counted once."""
        predictions, targets = np.asarray(predictions), np.asarray(targets)
        weights = np.ones((1, len(targets)), dtype=np.int64)
        return float(self.weighted(predictions, targets, weights)[0])


def _accuracy(predicted: Array, truth: Array, weights: Array) -> Array:
    return share(weights @ (predicted == truth), weights.sum(1))


def _balanced_accuracy(predicted: Array, truth: Array, weights: Array) -> Array:
    """Mean over the classes that occur of the share of their images told rightly."""
    right = predicted == truth
    members = _one_hot(truth, _count(truth))
    shown = weights @ members
    return mean_over(share((weights * right) @ members, shown), shown > 0)


def _macro_f1(predicted: Array, truth: Array, weights: Array) -> Array:
    """Mean over the classes that occur, or are predicted, of F1."""
    classes = _count(predicted, truth)
    right = (weights * (predicted == truth)) @ _one_hot(truth, classes)
    twice = weights @ _one_hot(truth, classes) + weights @ _one_hot(predicted, classes)
    return mean_over(share(2.0 * right, twice), twice > 0)


def _kappa(predicted: Array, truth: Array, weights: Array) -> Array:
    """Cohen's kappa with quadratic weights: 1 less the disagreement over what chance would give."""
    grades = _count(predicted, truth)
    rows, columns = weights @ _one_hot(truth, grades), weights @ _one_hot(predicted, grades)
    apart = np.square(np.arange(grades)[:, None] - np.arange(grades)[None]).astype(np.float64)
    observed = weights @ np.square(predicted.astype(np.float64) - truth)
    by_chance = np.einsum("ri,ij,rj->r", rows, apart, columns) / weights.sum(1)
    return 1 - share(observed, by_chance)


def _mean_grade_error(predicted: Array, truth: Array, weights: Array) -> Array:
    return share(weights @ np.abs(predicted.astype(np.float64) - truth), weights.sum(1))


def auroc_weighted(scores: Array, truth: Array, weights: Array) -> Array:
    """Return the area under the ROC curve of one label for each row of weights, ties counting half.

    Args:
        scores: (n,).
        truth: (n,) 0 or 1, NaN where unknown.
        weights: (r, n).

    Returns:
        (r,); NaN where the label always or never occurs.
    """
    known = ~np.isnan(truth.astype(np.float64))
    scores, truth, weights = scores[known], truth[known] > 0.5, weights[:, known]
    if not len(scores):
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    drawn, present = weights[:, order].astype(np.float64), truth[order]
    positive = np.add.reduceat(drawn * present, starts, axis=1)
    negative = np.add.reduceat(drawn * ~present, starts, axis=1)
    # Negatives below each value, and half of those level with it.
    below = negative.cumsum(1) - negative / 2
    return share((positive * below).sum(1), positive.sum(1) * negative.sum(1))


def _binary_auroc(scores: Array, truth: Array, weights: Array) -> Array:
    return auroc_weighted(scores.reshape(len(scores), -1)[:, -1], truth.reshape(-1), weights)


def _mean_auroc(scores: Array, truth: Array, weights: Array) -> Array:
    """Mean over the labels that occur and do not always occur; classes are taken one against the rest."""
    if truth.ndim == 1:
        truth = truth[:, None] == np.arange(scores.shape[1])
    areas = np.stack([auroc_weighted(scores[:, label], truth[:, label], weights) for label in range(scores.shape[1])])
    return mean_over(areas.T, ~np.isnan(areas.T))


def _label_macro_f1(scores: Array, truth: Array, weights: Array) -> Array:
    """Mean over the labels that occur of F1 at probability 0.5; unknown labels are left out."""
    known = ~np.isnan(truth)
    predicted, present = (scores >= 0.5) & known, np.nan_to_num(truth) > 0.5
    occur = weights @ present.astype(np.int64)
    twice = occur + weights @ predicted.astype(np.int64)
    return mean_over(share(2.0 * (weights @ (predicted & present).astype(np.int64)), twice), occur > 0)


def exact_share(right: int, n: int, level: float) -> tuple[float, float]:
    """Return the interval of a share that holds at any n (Clopper and Pearson 1934).

    >>> [round(end, 3) for end in exact_share(40, 40, 0.95)]
    [0.912, 1.0]
    """
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def _accuracy_ends(predicted: Array, truth: Array, level: float) -> tuple[float, float]:
    return exact_share(int((predicted == truth).sum()), len(truth), level)


def _balanced_ends(predicted: Array, truth: Array, level: float) -> tuple[float, float]:
    """Return the ends of a mean of shares, of classes with few images too; the wider of two on either side.

    The limits of each class (Jeffreys) put together by their distances from its share (Zou and Donner 2008, Statistics
    in Medicine 27) hold where a class is all right or all wrong. The normal interval holds where classes are many; its
    variances are of shares drawn towards that of all images, as of one or two images they would be 0.
    """
    from scipy.stats import beta

    shown = np.bincount(truth)
    right = np.bincount(truth[predicted == truth], minlength=len(shown))[shown > 0]
    shown = shown[shown > 0]
    share, tail = right / shown, (1 - level) / 2
    low = np.where(right > 0, beta.ppf(tail, right + 0.5, shown - right + 0.5), 0)
    high = np.where(right < shown, beta.ppf(1 - tail, right + 0.5, shown - right + 0.5), 1)
    drawn = (right + 2 * (right.sum() + 1) / (shown.sum() + 2)) / (shown + 2)
    reach = NormalDist().inv_cdf(1 - tail) * np.sqrt((drawn * (1 - drawn) / shown).sum())
    below, above = np.sqrt(np.square(share - low).sum()), np.sqrt(np.square(high - share).sum())
    mean, classes = float(share.mean()), len(shown)
    return max(0.0, mean - max(below, reach) / classes), min(1.0, mean + max(above, reach) / classes)


def _value_ends(values: Array, truth: Array, level: float) -> tuple[float, float] | None:
    """Return the ends where values are shares of one image: found or not."""
    return exact_share(int(values.sum()), len(values), level) if np.isin(values, (0, 1)).all() else None


def _auroc_ends(scores: Array, truth: Array, level: float) -> tuple[float, float] | None:
    """Return the ends of the AUROC of a single label, or of two classes that are each other's reverse."""
    scores = scores.reshape(len(scores), -1)
    if truth.ndim == 1 and scores.shape[1] == 2:
        once = np.ones((1, len(truth)), dtype=np.int64)
        margin = scores[:, 1] - scores[:, 0]
        areas = [
            float(auroc_weighted(one, positive, once)[0])
            for one, positive in ((scores[:, 0], truth == 0), (scores[:, 1], truth == 1), (margin, truth == 1))
        ]
        if not np.ptp(areas) < 1e-9:
            return None
        scores, truth = margin[:, None], truth == 1
    truth = truth.reshape(-1)
    if scores.shape[1] != 1 or len(np.unique(truth[~np.isnan(truth.astype(np.float64))])) != 2:
        return None
    interval = delong_interval(scores[:, 0], truth, level=level)
    return interval.low, interval.high


def _mean_value(values: Array, truth: Array, weights: Array) -> Array:
    return share(weights @ values.astype(np.float64), weights.sum(1))


accuracy = Score("accuracy", _accuracy, "classes", _accuracy_ends)
balanced_accuracy = Score("balanced_accuracy", _balanced_accuracy, "classes", _balanced_ends, True)
macro_f1 = Score("macro_f1", _macro_f1, "classes")
kappa = Score("kappa", _kappa, "classes")
mean_grade_error = Score("mean_grade_error", _mean_grade_error, "classes")
auroc = Score("auroc", _binary_auroc, "scores", _auroc_ends, True)
mean_auroc = Score("mean_auroc", _mean_auroc, "scores", _auroc_ends, True)
label_macro_f1 = Score("label_macro_f1", _label_macro_f1, "scores")
mean_value = Score("mean_value", _mean_value, "values", _value_ends)

SCORES = {
    score.name: score
    for score in (
        accuracy,
        balanced_accuracy,
        macro_f1,
        kappa,
        mean_grade_error,
        auroc,
        mean_auroc,
        label_macro_f1,
        mean_value,
    )
}


def per_label_auroc(scores: Array, truth: Array) -> list[float]:
    """Return the AUROC of each label, NaN where it always or never occurs.

    Args:
        scores: (n, L).
        truth: (n, L) 0 or 1, NaN where unknown.
    """
    once = np.ones((1, len(truth)), dtype=np.int64)
    return [float(auroc_weighted(scores[:, label], truth[:, label], once)[0]) for label in range(truth.shape[1])]


def _count(*classes: Array) -> int:
    return max(int(one.max(initial=0)) for one in classes) + 1


def _one_hot(classes: Array, count: int) -> sparse.csr_matrix:
    """Return (n, count) with a one in the column of each image's class."""
    n = len(classes)
    return sparse.csr_matrix((np.ones(n, dtype=np.int64), classes, np.arange(n + 1)), shape=(n, count))


def share(part: Array, whole: Array) -> Array:
    """Return part / whole, NaN where whole is zero."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole != 0)


def mean_over(values: Array, counted: Array) -> Array:
    """Return the mean of each row over what is counted."""
    return share(np.where(counted, values, 0).sum(1), counted.sum(1))
