"""The AUROC without draws: DeLong's test of a difference, and an interval that holds where images are few.

>>> import numpy as np
>>> truth = np.arange(20) % 2
>>> found = delong_interval(truth + 0.0, truth)  # all told apart, and yet not certain
>>> found.value, round(found.low, 2), found.high
(1.0, 0.8, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from patchloom.errors import UsageError
from patchloom.statistics.intervals import LEVEL, Difference, Interval, normal_quantile

Array = np.ndarray


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
    areas, parts, sizes = _areas_and_parts([first, second], targets)
    if np.array_equal(first, second):  # one encoder twice
        return Difference(0.0, 0.0, 0.0, 1.0)
    value, covariance = float(areas[1] - areas[0]), parts.sum(0)
    deviation = sqrt(max(0.0, float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    reach = normal_quantile(level) * deviation
    if deviation == 0:
        # Both rank all images alike: what two discordant pairs in n + 2 would leave open (Bonett and Price 2012).
        reach = normal_quantile(level) * sqrt(2) / (min(sizes) + 2)
        p_value = 1.0 if value == 0 else 0.0
    else:
        p_value = 2 * NormalDist().cdf(-abs(value) / deviation)
    return Difference(value, max(-1.0, value - reach), min(1.0, value + reach), p_value)


def delong_interval(scores: Any, targets: Any, *, level: float = LEVEL) -> Interval:
    """Return an AUROC with an interval within 0 … 1; arguments as for `delong`.

    The wider end, on either side, of two intervals. DeLong's, on the scale of the logit and with Student's t, whose
    degrees of freedom follow from both variances (Welch and Satterthwaite), is right for any distribution of scores
    once both classes have images enough. Newcombe's (2006, Statistics in Medicine 25, method 5) takes the variance
    from the area alone, so that an area of 1 is not certain.
    """
    from scipy.stats import t

    areas, parts, sizes = _areas_and_parts([scores], targets)
    area, variances = float(areas[0]), parts[:, 0, 0]
    low, high = newcombe(area, *sizes, level=level)
    variance = float(variances.sum())
    if variance > 0 and 0 < area < 1:
        shares = [v * v / (size - 1) for v, size in zip(variances, sizes, strict=True) if size > 1]
        freedom = max(1.0, variance * variance / sum(shares))
        logit, slope = np.log(area / (1 - area)), area * (1 - area)
        reach = float(t.ppf(0.5 + level / 2, freedom)) * sqrt(variance) / slope
        ends = 1 / (1 + np.exp(np.clip([reach - logit, -reach - logit], -700, 700)))
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return Interval(area, low, high)


def newcombe(area: float, present: int, absent: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of an AUROC that follows from its value and the sizes of both classes alone.

    Args:
        area: 0 … 1.
        present: Images with the finding.
        absent: Images without.
        level: Confidence.
    """
    # Every true area from which the one found is at most so many standard deviations away.
    tried = np.linspace(0, 1, 10001)
    others = max(0.0, (present + absent) / 2 - 1)
    spread = 1 + others * ((1 - tried) / (2 - tried) + tried / (1 + tried))
    deviation = np.sqrt(tried * (1 - tried) * spread / (present * absent))
    kept = tried[np.abs(tried - area) <= normal_quantile(level) * deviation + 1e-12]
    return (min(area, float(kept.min())), max(area, float(kept.max()))) if len(kept) else (area, area)


def _areas_and_parts(scores: Sequence[Any], targets: Any) -> tuple[Array, Array, tuple[int, int]]:
    """Return areas (k,), the parts (2, k, k) of their covariance from both classes, and the sizes of these."""
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
    parts = np.stack([_covariance(of_present) / m, _covariance(of_absent) / n])
    return of_present.mean(1), parts, (m, n)


def midranks(values: Array) -> Array:
    """Return the rank of each value in its row, from 1; equal values share the mean of theirs.

    Args:
        values: (k, n).
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=1), dtype=np.float64)


def _covariance(values: Array) -> Array:
    """Return the covariance (k, k) of the rows of (k, n); zero for a single column."""
    n = values.shape[1]
    if n < 2:
        return np.zeros((len(values), len(values)))
    centred = values - values.mean(1, keepdims=True)
    covariance: Array = centred @ centred.T / (n - 1)
    return covariance
