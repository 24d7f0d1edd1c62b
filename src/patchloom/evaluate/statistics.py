"""How sure a score is, and whether two encoders differ: bootstrap, DeLong, Holm.

Everything starts from what was predicted for each image, so two encoders measured on the same images are compared
image by image. Radiology specification, section 2.9; Phikon-v2 specification, section 2.8.

>>> import numpy as np
>>> from patchloom.evaluate.metrics import accuracy
>>> truth = np.arange(100) % 2
>>> right_in_90 = np.where(np.arange(100) < 90, truth, 1 - truth)
>>> found = bootstrap_interval(accuracy, right_in_90, truth)
>>> round(found.value, 2), found.low < 0.9 < found.high
(0.9, True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan, sqrt
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np

from patchloom.errors import UsageError, unknown_name

Array = np.ndarray
ScoreFunction = Callable[[Any, Any], float]
"""Takes predictions and targets of the same n images and returns one number; NaN where it is not defined."""
Kind = Literal["percentile", "basic"]

LEVEL = 0.95
# Weights of all images held at a time, in numbers.
MOST_WEIGHTS = 2**24
# A score that is undefined for this share of the draws has no interval worth the name.
MOST_TRIES = 10


class Interval(NamedTuple):
    """A score and the interval that holds its true value with 95 % confidence."""

    value: float
    low: float
    high: float
    redrawn: int = 0
    """Draws for which the score was not defined (one class only, say) and that were drawn again."""


class Difference(NamedTuple):
    """The second score less the first, on the same images."""

    value: float
    low: float
    high: float
    p_value: float
    """Probability of a difference at least as large, either way, were there none."""
    redrawn: int = 0


def bootstrap_interval(
    score: ScoreFunction,
    predictions: Any,
    targets: Any,
    *,
    strata: Array | Sequence[int] | None = None,
    groups: Array | Sequence[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    kind: Kind = "percentile",
) -> Interval:
    """Return a score with its bootstrap interval: the images are drawn again, with replacement, many times.

    Args:
        score: Function of predictions and targets, indexed alike along their first dimension. The scores of
            `evaluate.metrics` take all draws at once; any other function is called once per draw.
        predictions: (n, …) array, one row per image.
        targets: (n, …) array of the true values.
        strata: (n,) each value is drawn as often as it occurs; default: the targets where they are classes (integers
            in one dimension). Give zeros to draw from all images alike.
        groups: (n,) patient or slide of each image: whole groups are drawn, not images, and nothing is stratified.
        draws: How many times.
        seed: Seed of the draws.
        level: Confidence, in (0, 1).
        kind: `percentile`, or `basic` (reflected at the score).

    Raises:
        UsageError: No image, lengths that differ, or settings outside their range.
    """
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    _check(kind, level, draws)
    value = float(score(predictions, targets))
    if isnan(value):
        return Interval(value, value, value)
    drawn, redrawn = _drawn([(score, predictions)], targets, strata, groups, draws, seed)
    low, high = _ends(drawn[0], value, level, kind)
    return Interval(value, low, high, redrawn)


def paired_bootstrap(
    score: ScoreFunction,
    first: Any,
    second: Any,
    targets: Any,
    *,
    strata: Array | Sequence[int] | None = None,
    groups: Array | Sequence[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    kind: Kind = "percentile",
) -> Difference:
    """Return by how much the second predictions score higher than the first, on the same draws of the same images.

    The p-value is two-sided: twice the share of draws on the other side of zero, each count increased by one, so
    that it is never 0 (Davison and Hinkley 1997, section 4.2).

    Args:
        score: As for `bootstrap_interval`.
        first: (n, …) predictions of one encoder.
        second: (n, …) predictions of another, of the same images in the same order.
        targets: (n, …) true values.
        strata: As for `bootstrap_interval`.
        groups: As for `bootstrap_interval`.
        draws: How many times.
        seed: Seed of the draws.
        level: Confidence, in (0, 1).
        kind: `percentile` or `basic`.

    Raises:
        UsageError: As for `bootstrap_interval`.
    """
    first, second, targets = np.asarray(first), np.asarray(second), np.asarray(targets)
    _check(kind, level, draws)
    value = float(score(second, targets)) - float(score(first, targets))
    if isnan(value):
        return Difference(value, value, value, value)
    drawn, redrawn = _drawn([(score, first), (score, second)], targets, strata, groups, draws, seed)
    differences = drawn[1] - drawn[0]
    low, high = _ends(differences, value, level, kind)
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    p_value = min(1.0, 2 * (min(below, above) + 1) / (draws + 1))
    return Difference(value, low, high, p_value, redrawn)


def delong(first: Any, second: Any, targets: Any, *, level: float = LEVEL) -> Difference:
    """Return the difference of two AUROCs on the same images, by DeLong's test.

    DeLong et al. 1988, Biometrics 44; computed from mid-ranks (Sun and Xu 2014).

    Args:
        first: (n,) scores of one encoder, higher where the finding is more likely.
        second: (n,) scores of another.
        targets: (n,) 0 or 1; NaN where unknown, which is left out.
        level: Confidence of the interval.

    Raises:
        UsageError: Lengths that differ, other targets than 0 and 1, or one class only.
    """
    areas, covariance = delong_covariance([first, second], targets)
    value = float(areas[1] - areas[0])
    deviation = sqrt(max(0.0, float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    reach = _quantile(level) * deviation
    if deviation == 0:
        p_value = 1.0 if value == 0 else 0.0
    else:
        p_value = 2 * NormalDist().cdf(-abs(value) / deviation)
    return Difference(value, value - reach, value + reach, p_value)


def delong_interval(scores: Any, targets: Any, *, level: float = LEVEL) -> Interval:
    """Return an AUROC with DeLong's interval, within 0 … 1; arguments as for `delong`."""
    areas, covariance = delong_covariance([scores], targets)
    value, reach = float(areas[0]), _quantile(level) * sqrt(float(covariance[0, 0]))
    return Interval(value, max(0.0, value - reach), min(1.0, value + reach))


def delong_covariance(scores: Sequence[Any], targets: Any) -> tuple[Array, Array]:
    """Return the AUROC of each of k scores on the same images, (k,), and their covariance (k, k).

    Args:
        scores: k arrays (n,).
        targets: (n,) 0 or 1; NaN where unknown.

    Raises:
        UsageError: As for `delong`.
    """
    truth = np.asarray(targets, dtype=np.float64)
    table = np.stack([np.asarray(one, dtype=np.float64) for one in scores])
    if truth.ndim != 1 or table.shape[1:] != truth.shape:
        raise UsageError(f"scores of shape {table.shape[1:]} do not belong to {truth.shape} targets")
    known = ~np.isnan(truth)
    truth, table = truth[known], table[:, known]
    if not np.isin(truth, (0, 1)).all():
        raise UsageError("DeLong's test compares scores of one finding that is there (1) or not (0)")
    present, absent = table[:, truth == 1], table[:, truth == 0]
    m, n = present.shape[1], absent.shape[1]
    if not m or not n:
        raise UsageError("an AUROC needs images with the finding and images without it")
    both = midranks(np.concatenate([present, absent], 1))
    # How often each image is on the right side of those of the other class; ties count half.
    of_present = (both[:, :m] - midranks(present)) / n
    of_absent = 1 - (both[:, m:] - midranks(absent)) / m
    return of_present.mean(1), _covariance(of_present) / m + _covariance(of_absent) / n


def midranks(values: Array) -> Array:
    """Return the rank of each value in its row, from 1; equal values share the mean of theirs.

    Args:
        values: (k, n).
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=1), dtype=np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many there are, in their order (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    raised = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)).clip(max=1)
    corrected = np.empty_like(given)
    corrected[order] = raised
    return [float(value) for value in corrected]


def mean_interval(values: Sequence[float] | Array, level: float = LEVEL) -> Interval:
    """Return the mean of independent measurements (episodes, seeds) with its normal interval.

    Args:
        values: At least one; a single one has no interval (NaN).
        level: Confidence.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) == 0:
        raise UsageError("a mean needs at least one value")
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, float("nan"), float("nan"))
    reach = _quantile(level) * float(numbers.std(ddof=1)) / sqrt(len(numbers))
    return Interval(mean, mean - reach, mean + reach)


def resample_weights(
    n: int, draws: int, rng: np.random.Generator, *, strata: Array | None = None, groups: Array | None = None
) -> Array:
    """Return how often each image is drawn, (draws, n) int64; see `bootstrap_interval`.

    Args:
        n: Number of images.
        draws: Number of draws.
        rng: Where the draws come from; splitting them over calls changes nothing.
        strata: (n,) integers; each value is drawn as often as it occurs.
        groups: (n,) integers 0 … G - 1; whole groups are drawn.
    """
    units = n if groups is None else int(groups.max()) + 1
    order, starts, sizes = np.arange(units), np.zeros(units, dtype=np.int64), np.full(units, units)
    if groups is None and strata is not None:
        order = np.argsort(strata, kind="stable")
        _, first, counts = np.unique(strata[order], return_index=True, return_counts=True)
        starts, sizes = np.repeat(first, counts), np.repeat(counts, counts)
    weights = np.empty((draws, units), dtype=np.int64)
    for row in weights:
        drawn = starts + (rng.random(units) * sizes).astype(np.int64)
        row[order] = np.bincount(drawn, minlength=units)
    return weights if groups is None else weights[:, groups]


def _check(kind: Kind, level: float, draws: int) -> None:
    if kind not in ("percentile", "basic"):
        raise unknown_name("kind of interval", kind, ("percentile", "basic"))
    if not 0 < level < 1:
        raise UsageError(f"level is {level}; it must be between 0 and 1")
    if draws < 2:
        raise UsageError(f"draws is {draws}; a bootstrap needs at least 2, and 1000 for a steady interval")


def _drawn(
    scored: list[tuple[ScoreFunction, Array]],
    targets: Array,
    strata: Array | Sequence[int] | None,
    groups: Array | Sequence[Any] | None,
    draws: int,
    seed: int,
) -> tuple[list[Array], int]:
    """Return for each pair of score and predictions the score of every draw, and how many draws were drawn again."""
    n = len(targets)
    if n == 0:
        raise UsageError("a score needs at least one image")
    for _, predictions in scored:
        if len(predictions) != n:
            raise UsageError(f"{len(predictions)} predictions do not belong to {n} targets")
    layers = _layers(targets, strata, n)
    clusters = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if clusters is not None and len(clusters) != n:
        raise UsageError(f"{len(clusters)} groups do not belong to {n} images")
    rng = np.random.default_rng(seed)
    kept: list[list[Array]] = [[] for _ in scored]
    got = redrawn = 0
    while got < draws:
        count = min(draws - got, max(1, MOST_WEIGHTS // n))
        weights = resample_weights(n, count, rng, strata=layers, groups=clusters)
        values = [_scores_of(score, predictions, targets, weights) for score, predictions in scored]
        defined = ~np.isnan(np.stack(values)).any(0)
        for held, one in zip(kept, values, strict=True):
            held.append(one[defined])
        got += int(defined.sum())
        redrawn += int((~defined).sum())
        if redrawn > MOST_TRIES * draws:
            raise UsageError(f"the score is not defined for {redrawn} of {got + redrawn} draws of the images")
    return [np.concatenate(held) for held in kept], redrawn


def _scores_of(score: ScoreFunction, predictions: Array, targets: Array, weights: Array) -> Array:
    """Return the score of each draw: all at once where the score can, else by repeating images."""
    weighted = getattr(score, "weighted", None)
    if weighted is not None:
        return np.asarray(weighted(predictions, targets, weights), dtype=np.float64)
    everything = np.arange(len(targets))
    return np.array([_of_draw(score, predictions, targets, np.repeat(everything, row)) for row in weights])


def _of_draw(score: ScoreFunction, predictions: Array, targets: Array, chosen: Array) -> float:
    return float(score(predictions[chosen], targets[chosen]))


def _layers(targets: Array, strata: Array | Sequence[int] | None, n: int) -> Array | None:
    if strata is None:
        is_class = targets.ndim == 1 and (targets.dtype.kind in "iub")
        return targets if is_class else None
    layers = np.asarray(strata)
    if layers.shape != (n,):
        raise UsageError(f"strata of shape {layers.shape} do not belong to {n} images")
    return layers


def _ends(drawn: Array, value: float, level: float, kind: Kind) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = (float(end) for end in np.quantile(drawn, [tail, 1 - tail]))
    return (low, high) if kind == "percentile" else (2 * value - high, 2 * value - low)


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def _covariance(values: Array) -> Array:
    """Return the covariance (k, k) of the rows of (k, n); zero for a single column."""
    n = values.shape[1]
    if n < 2:
        return np.zeros((len(values), len(values)))
    centred = values - values.mean(1, keepdims=True)
    covariance: Array = centred @ centred.T / (n - 1)
    return covariance
