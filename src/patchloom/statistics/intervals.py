"""How sure a score is, and whether two encoders differ: bootstrap, Student's t, Holm.

Everything starts from what was predicted for each image, so two encoders measured on the same images are compared
image by image.

Images (or whole groups of them) are drawn again with replacement. Two things make the plain percentile bootstrap too
sure of itself where images are few, and are mended: what never went wrong in the sample never goes wrong in a draw
(`what_if` adds what might have been, as Agresti and Coull's interval does for a share), and the spread of
draws is that of n - 1 rather than n images (the percentiles are moved out by Student's t, Hesterberg 2015,
"What teachers should know about the bootstrap", section 4.3). Shares and the AUROC have exact or closed forms, which
are taken where images are independent. `benchmarks/coverage.py` holds all of it against simulation.

>>> import numpy as np
>>> from patchloom.statistics.metrics import accuracy
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
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from patchloom.errors import UsageError, unknown_name

Array = np.ndarray
ScoreFunction = Callable[[Any, Any], float]
"""Takes predictions and targets of the same n images and returns one number; NaN where it is not defined."""
Kind = Literal["auto", "percentile", "basic"]
"""Interval: `auto`, which holds where images are few; or the plain bootstrap's, percentile or basic."""

LEVEL = 0.95
# Weights of all images held at a time, in numbers.
MOST_WEIGHTS = 2**24
# Fewer groups than this say too little of how groups differ.
FEW_GROUPS = 5
# A score that is undefined for this share of the draws has no interval worth the name.
MOST_TRIES = 10


class Interval(NamedTuple):
    """A score and the interval that holds its true value with 95 % confidence."""

    value: float
    low: float
    high: float
    redrawn: int = 0
    """Draws for which the score was not defined (one class only, say) and that were drawn again."""

    @property
    def ends(self) -> list[float | None]:
        """Both ends as they go into results: None where there is no interval."""
        return [None if isnan(end) else float(end) for end in (self.low, self.high)]


class Difference(NamedTuple):
    """The second score less the first, on the same images."""

    value: float
    low: float
    high: float
    p_value: float
    """Probability of a difference at least as large, either way, were there none."""
    redrawn: int = 0

    @property
    def ends(self) -> list[float | None]:
        """Both ends as they go into results: None where there is no interval."""
        return Interval(*self[:3]).ends


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
    kind: Kind = "auto",
) -> Interval:
    """Return a score with its bootstrap interval: the images are drawn again, with replacement, many times.

    Args:
        score: Function of predictions and targets, indexed alike along their first dimension. The scores of
            `metrics` take all draws at once; any other function is called once per draw.
        predictions: (n, …) array, one row per image.
        targets: (n, …) array of the true values.
        strata: (n,) each value is drawn as often as it occurs, which takes the shares of the classes as given; default:
            all images are drawn alike.
        groups: (n,) patient or slide of each image: whole groups are drawn, not images, and nothing is stratified.
        draws: How many times.
        seed: Seed of the draws.
        level: Confidence, in (0, 1).
        kind: `auto`; or the plain bootstrap, `percentile` or `basic` (reflected at the score), which are too narrow
            where images or those of a class are few, and have no width where no draw can differ.

    Returns:
        NaN for both ends where there is one image (one group), of which nothing can be drawn.

    Raises:
        UsageError: No image, lengths that differ, or settings outside their range.
    """
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    _check(kind, level, draws, targets, [predictions])
    value = float(score(predictions, targets))
    nothing = Interval(value, float("nan"), float("nan"))
    if isnan(value):
        return nothing
    closed = _closed(score, predictions, targets, level) if kind == "auto" else None
    if closed is not None and strata is None and groups is None:
        return Interval(value, *closed)
    sample = _sample([(score, predictions)], targets, strata, groups, kind)
    if sample.units < 2:
        return nothing
    drawn, redrawn = sample.drawn(draws, seed)
    low, high = _ends(drawn[0], value, level, kind, sample.units)
    if closed is not None and (groups is not None or getattr(score, "closed_by_class", False)):
        # Never surer than were all images independent: draws see little of what few images of a class leave open.
        low, high = min(low, closed[0]), max(high, closed[1])
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
    kind: Kind = "auto",
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
        kind: As for `bootstrap_interval`.

    Raises:
        UsageError: As for `bootstrap_interval`.
    """
    first, second, targets = np.asarray(first), np.asarray(second), np.asarray(targets)
    _check(kind, level, draws, targets, [first, second])
    value = float(score(second, targets)) - float(score(first, targets))
    nan = float("nan")
    if isnan(value):
        return Difference(nan, nan, nan, nan)
    sample = _sample([(score, first), (score, second)], targets, strata, groups, kind)
    if sample.units < 2:
        return Difference(value, nan, nan, nan)
    drawn, redrawn = sample.drawn(draws, seed)
    differences = drawn[1] - drawn[0]
    low, high = _ends(differences, value, level, kind, sample.units)
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    p_value = min(1.0, 2 * (min(below, above) + 1) / (draws + 1))
    return Difference(value, low, high, p_value, redrawn)


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
    """Return the mean of independent measurements (episodes, seeds, folds) with its interval by Student's t.

    Args:
        values: At least one; a single one has no interval (NaN).
        level: Confidence.

    Raises:
        UsageError: No value.
    """
    from scipy.stats import t

    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n == 0:
        raise UsageError("a mean needs at least one value")
    mean = float(numbers.mean())
    if n < 2:
        return Interval(mean, float("nan"), float("nan"))
    reach = float(t.ppf(0.5 + level / 2, n - 1)) * float(numbers.std(ddof=1)) / sqrt(n)
    return Interval(mean, mean - reach, mean + reach)


def _closed(score: Any, predictions: Array, targets: Array, level: float) -> tuple[float, float] | None:
    """Return the interval of independent images that a score has without draws, None where it has none."""
    form = getattr(score, "closed", None)
    ends: tuple[float, float] | None = None if form is None else form(predictions, targets, level)
    return ends


class Sample(NamedTuple):
    """What draws are made from: units (images or groups), and images that were not seen."""

    scored: list[tuple[ScoreFunction, Array]]
    """Pairs of a score and predictions (n + q, …)."""
    targets: Array
    """(n + q, …)."""
    chances: Array
    """(q,) how often each unseen image is drawn, where each of the u units is drawn once."""
    members: Array | None
    """(n,) unit of each image; None where each is its own."""
    layers: list[Array]
    """Numbers, rising, of the u + q that are drawn from one another: of each layer as many as it has of the u."""
    units: int
    """u."""

    def drawn(self, draws: int, seed: int) -> tuple[list[Array], int]:
        """Return for each pair of score and predictions the score of every draw, and how many were drawn again."""
        rng = np.random.default_rng(seed)
        kept: list[list[Array]] = [[] for _ in self.scored]
        got = redrawn = 0
        while got < draws:
            count = min(draws - got, max(1, MOST_WEIGHTS // len(self.targets)))
            weights = self.weights(count, rng)
            values = [_scores_of(score, predictions, self.targets, weights) for score, predictions in self.scored]
            defined = ~np.isnan(np.stack(values)).any(0)
            for held, one in zip(kept, values, strict=True):
                held.append(one[defined])
            got += int(defined.sum())
            redrawn += int((~defined).sum())
            if redrawn > MOST_TRIES * draws:
                raise UsageError(f"the score is not defined for {redrawn} of {got + redrawn} draws of the images")
        return [np.concatenate(held) for held in kept], redrawn

    def weights(self, draws: int, rng: np.random.Generator) -> Array:
        """Return how often each image is drawn, (draws, n + q); splitting draws over calls changes nothing."""
        weights = np.zeros((draws, self.units + len(self.chances)), dtype=np.int64)
        sizes = [int((layer < self.units).sum()) for layer in self.layers]
        beyond = [
            np.cumsum(self.chances[layer[size:] - self.units]) for layer, size in zip(self.layers, sizes, strict=True)
        ]
        for row in weights:
            for layer, size, ends in zip(self.layers, sizes, beyond, strict=True):
                # Each unit seen takes up 1, what was not seen its chance.
                places = rng.random(size) * (size + (ends[-1] if len(ends) else 0.0))
                chosen = places.astype(np.int64)
                if len(ends):
                    unseen = places >= size
                    chosen[unseen] = size + np.searchsorted(ends[:-1], places[unseen] - size, side="right")
                row[layer] = np.bincount(chosen, minlength=len(layer))
        if self.members is None:
            return weights
        # An image that was not seen stands for a group of the usual size.
        standing = weights[:, self.units :] * (len(self.members) / self.units)
        return np.concatenate([weights[:, self.members], standing], axis=1)


def _check(kind: Kind, level: float, draws: int, targets: Array, predicted: Sequence[Array]) -> None:
    if kind not in get_args(Kind):
        raise unknown_name("kind of interval", kind, get_args(Kind))
    if not 0 < level < 1:
        raise UsageError(f"level is {level}; it must be between 0 and 1")
    if draws < 2:
        raise UsageError(f"draws is {draws}; a bootstrap needs at least 2, and 1000 for a steady interval")
    if len(targets) == 0:
        raise UsageError("a score needs at least one image")
    for predictions in predicted:
        if len(predictions) != len(targets):
            raise UsageError(f"{len(predictions)} predictions do not belong to {len(targets)} targets")


def _sample(
    scored: list[tuple[ScoreFunction, Array]],
    targets: Array,
    strata: Array | Sequence[int] | None,
    groups: Array | Sequence[Any] | None,
    kind: Kind,
) -> Sample:
    n = len(targets)
    members = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if members is not None and len(members) != n:
        raise UsageError(f"{len(members)} groups do not belong to {n} images")
    units = n if members is None else int(members.max()) + 1
    strata = None if strata is None or members is not None else np.asarray(strata)
    if strata is not None and strata.shape != (n,):
        raise UsageError(f"strata of shape {strata.shape} do not belong to {n} images")
    chances, unseen = np.zeros(0), np.zeros(0)
    if kind == "auto" and hasattr(scored[0][0], "what_if"):
        scored, unseen, chances = _with_unseen(scored, targets, units)
        targets = np.concatenate([targets, unseen])
    everything = np.arange(units + len(chances))
    if strata is None:
        return Sample(scored, targets, chances, members, [everything], units)
    # An unseen image belongs to the layer of its class; where layers are no classes, to any.
    names, layer_of = np.unique(strata, return_inverse=True)
    place = np.searchsorted(names, unseen).clip(max=len(names) - 1) if unseen.ndim == 1 else np.zeros(len(unseen), int)
    layer_of = np.concatenate([layer_of, place])
    return Sample(scored, targets, chances, members, [everything[layer_of == k] for k in range(len(names))], units)


def _with_unseen(
    scored: list[tuple[ScoreFunction, Array]], targets: Array, units: int
) -> tuple[list[tuple[ScoreFunction, Array]], Array, Array]:
    """Return the pairs with predictions of images that were not seen, and these images' targets and chances."""
    score: Any = scored[0][0]
    if len(scored) == 1:
        first = other = score.what_if(scored[0][1], targets, units)
        chances = np.concatenate([first.wrong, first.right])
    else:
        first, other = score.what_if_pair(scored[0][1], scored[1][1], targets, units)
        chances = np.concatenate([first.differs, first.differs])
    parts = [[first.worst, first.best], [other.best, other.worst]]
    extended = [
        (one, np.concatenate([predictions, *unseen])) for (one, predictions), unseen in zip(scored, parts, strict=False)
    ]
    return extended, np.concatenate([first.targets, first.targets]), chances


def _scores_of(score: ScoreFunction, predictions: Array, targets: Array, weights: Array) -> Array:
    """Return the score of each draw: all at once where the score can, else by repeating images."""
    weighted = getattr(score, "weighted", None)
    if weighted is not None:
        return np.asarray(weighted(predictions, targets, weights), dtype=np.float64)
    everything = np.arange(len(targets))
    return np.array([_of_draw(score, predictions, targets, np.repeat(everything, row)) for row in weights])


def _of_draw(score: ScoreFunction, predictions: Array, targets: Array, chosen: Array) -> float:
    return float(score(predictions[chosen], targets[chosen]))


def _ends(drawn: Array, value: float, level: float, kind: Kind, units: int) -> tuple[float, float]:
    tail = (1 - level) / 2
    if kind == "auto":
        from scipy.stats import t

        # The draws spread as n images do whose mean is known; ours was measured on them (Hesterberg 2015).
        tail = NormalDist().cdf(float(t.ppf(tail, units - 1)) * sqrt(units / (units - 1)))
    low, high = (float(end) for end in np.quantile(drawn, [tail, 1 - tail]))
    if kind == "basic":
        return 2 * value - high, 2 * value - low
    return (min(low, value), max(high, value)) if kind == "auto" else (low, high)


def normal_quantile(level: float) -> float:
    """Return how many standard deviations hold a share of a normal distribution: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + level / 2)
