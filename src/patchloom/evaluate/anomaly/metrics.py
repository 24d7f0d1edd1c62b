"""Figures of scores and maps: area under ROC, average precision, F1, and the overlap of defects, region by region.

All are exact: what a threshold at every value would give, ties counting half. AUPRO: Bergmann et al. 2021, "The MVTec
Anomaly Detection Dataset", IJCV 129.

>>> good, bad = np.array([0.1, 0.2, 0.3]), np.array([0.25, 0.9])
>>> Ranking(good, bad).auroc(), round(Ranking(good, bad).average_precision(), 3)
(0.8333333333333334, 0.833)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from patchloom.errors import UsageError
from patchloom.statistics.intervals import Interval, bootstrap_interval

Array = np.ndarray
FPR_LIMIT = 0.3
DRAWS = 1000
BINS = 1000
"""Values that maps are cut to for the draws of an interval; the figure itself is of all values."""
NAN = float("nan")


@dataclass(frozen=True)
class Ranking:
    """Scores of what is good and of what is not, images or pixels.

    Every figure is NaN where one of the two is missing.
    """

    good: Array
    """(n,)"""
    bad: Array
    """(m,)"""

    @cached_property
    def ordered(self) -> tuple[Array, Array]:
        """Both, rising."""
        return np.sort(self.good), np.sort(self.bad)

    @property
    def defined(self) -> bool:
        """Whether there is something of both."""
        return bool(len(self.good) and len(self.bad))

    def auroc(self) -> float:
        """Return the probability that something bad scores above something good."""
        return float(covered(self.bad, self.ordered[0], 1.0).mean()) if self.defined else NAN

    def average_precision(self) -> float:
        """Return the mean, over what is bad, of the precision at its score."""
        if not self.defined:
            return NAN
        found, false = self._told()
        return float((found / (found + false)).mean())

    def best_f1(self) -> float:
        """Return the greatest F1 of any threshold."""
        if not self.defined:
            return NAN
        found, false = self._told()
        return float((2 * found / (found + false + len(self.bad))).max())

    def f1(self, threshold: float) -> float:
        """Return F1 where all that scores at least the threshold is called bad."""
        if not self.defined:
            return NAN
        found, false = int((self.bad >= threshold).sum()), int((self.good >= threshold).sum())
        return 2 * found / (found + false + len(self.bad))

    def _told(self) -> tuple[Array, Array]:
        """Return, at the score of each bad one, how many bad and good ones score at least as high."""
        good, bad = self.ordered
        found = len(bad) - np.searchsorted(bad, bad, side="left")
        return found, len(good) - np.searchsorted(good, bad, side="left")


def covered(bad: Array, good: Array, limit: float) -> Array:
    """Return the area below the step that each bad value adds to a ROC curve, up to a false positive rate, (m,).

    Where values are level with good ones the step is a ramp, as between the points of a curve.

    Args:
        bad: (m,).
        good: (n,), rising.
        limit: False positive rate, in (0, 1].
    """
    n = len(good)
    above = (n - np.searchsorted(good, bad, side="right")) / n
    level = (n - np.searchsorted(good, bad, side="left")) / n
    return _ramp(above, level, limit)


def _ramp(above: Array, level: Array, limit: float) -> Array:
    """Return the area up to `limit` of a rise from 0 at `above` to 1 at `level`."""
    width = np.where(level > above, level - above, 1.0)
    part = np.clip(limit - above, 0, None) ** 2 / (2 * width)
    return np.where(level <= limit, limit - (above + level) / 2, part)


def region_weights(mask: Array) -> tuple[Array, int]:
    """Return 1 / size of the region that each pixel of a mask (H, W) is in (0 outside), and how many regions there are.

    Pixels that touch at a corner are of one region.
    """
    from scipy.ndimage import label

    numbers, count = label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1).astype(np.float64)
    weights = 1 / np.maximum(sizes, 1)
    weights[0] = 0
    return weights[numbers], int(count)


class PixelFigures:
    """Figures of maps against masks.

    Args:
        maps: (H, W) each, higher where a defect is more likely.
        masks: (H, W) bool each; None for an image that is good all over.

    Raises:
        UsageError: A map and its mask are of different sizes.
    """

    def __init__(self, maps: Sequence[Array], masks: Sequence[Array | None]) -> None:
        self.good: list[Array] = []
        self.bad: list[Array] = []
        self.weights: list[Array] = []
        self.regions: list[int] = []
        for values, mask in zip(maps, masks, strict=True):
            values = np.asarray(values, np.float32)
            if mask is None or not mask.any():
                self._add(values.ravel(), values[:0].ravel(), np.zeros(0), 0)
                continue
            if mask.shape != values.shape:
                raise UsageError(f"a mask of {mask.shape} does not belong to a map of {values.shape}")
            weights, count = region_weights(mask)
            inside = mask.astype(bool)
            self._add(values[~inside], values[inside], weights[inside], count)
        nothing = [np.zeros(0, np.float32)]
        self.ranking = Ranking(np.concatenate(self.good or nothing), np.concatenate(self.bad or nothing))

    def _add(self, good: Array, bad: Array, weights: Array, regions: int) -> None:
        self.good.append(good)
        self.bad.append(bad)
        self.weights.append(weights)
        self.regions.append(regions)

    def aupro(self, limit: float = FPR_LIMIT) -> float:
        """Return the mean overlap of a defect's region with what is found, over false positive rates up to a limit.

        In [0, 1]; 1 where every pixel of a defect scores above all good ones.
        """
        if not self.ranking.defined:
            return NAN
        areas = covered(self.ranking.bad, self.ranking.ordered[0], limit)
        return float((np.concatenate(self.weights) * areas).sum() / (limit * sum(self.regions)))

    def intervals(self, threshold: float, limit: float = FPR_LIMIT, seed: int = 0) -> dict[str, Interval]:
        """Return AUROC, AUPRO, average precision and F1 at a threshold with their 95 % intervals.

        Images are drawn, not pixels, and those with a defect apart from the others. In the draws, not in the figures,
        maps are cut to `BINS` values.

        Returns:
            `pixel_auroc`, `aupro`, `pixel_ap` and `pixel_f1`; without a defect or without a good pixel all are NaN.
        """
        ranking = self.ranking
        values = {
            "pixel_auroc": ranking.auroc(),
            "aupro": self.aupro(limit),
            "pixel_ap": ranking.average_precision(),
            "pixel_f1": ranking.f1(threshold),
        }
        if not ranking.defined:
            return {name: Interval(NAN, NAN, NAN) for name in values}
        binned = _Binned(self, limit, threshold)
        number = np.arange(len(self.good))
        has_defect = np.array([count > 0 for count in self.regions]).astype(np.int64)
        found = {}
        for name, value in values.items():
            drawn = bootstrap_interval(
                _OfDraws(binned, name), number, has_defect, strata=has_defect, draws=DRAWS, seed=seed
            )
            # The draws are of the maps cut to bins: they are moved by what that changes.
            shift = value - drawn.value
            low, high = (float(np.clip(end + shift, 0, 1)) for end in drawn[1:3])
            found[name] = Interval(value, low, high)
        return found


class _Binned:
    """Maps cut to few values: how often each occurs in every image."""

    def __init__(self, figures: PixelFigures, limit: float, threshold: float) -> None:
        good, bad = figures.ranking.ordered
        shares = np.linspace(0, 1, BINS // 2)
        edges = np.unique(np.concatenate([np.quantile(good, shares), np.quantile(bad, shares), [threshold]]))
        bins = len(edges) + 1

        def counts(values: Array, weights: Array | None = None) -> Array:
            return np.bincount(np.searchsorted(edges, values, side="right"), weights, minlength=bins)

        self.good = np.stack([counts(values) for values in figures.good]).astype(np.float32)
        self.bad = np.stack([counts(values) for values in figures.bad]).astype(np.float32)
        pairs = zip(figures.bad, figures.weights, strict=True)
        self.shares = np.stack([counts(values, weights) for values, weights in pairs]).astype(np.float32)
        self.regions = np.array(figures.regions, np.float64)
        self.limit = limit
        self.first_told = int(np.searchsorted(edges, threshold, side="right"))

    def figures(self, weights: Array) -> dict[str, Array]:
        """Return the figures of every row of weights (r, n), which say how often each image was drawn."""
        weights = weights.astype(np.float32)
        # From the highest value down.
        good, bad, shares = (
            (weights @ part)[:, ::-1].astype(np.float64) for part in (self.good, self.bad, self.shares)
        )
        level = good.cumsum(1)
        above = level - good
        n, m, regions = level[:, -1:], bad.sum(1), weights @ self.regions
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc = (bad * _ramp(above / n, level / n, 1.0)).sum(1) / m
            aupro = (shares * _ramp(above / n, level / n, self.limit)).sum(1) / (self.limit * regions)
            found = bad.cumsum(1)
            precision = np.where(found > 0, found / np.maximum(found + level, 1e-12), 0)
            told = slice(0, good.shape[1] - self.first_told)
            right, wrong = bad[:, told].sum(1), good[:, told].sum(1)
            f1 = 2 * right / (right + wrong + m)
        return {"pixel_auroc": auroc, "aupro": aupro, "pixel_ap": (bad * precision).sum(1) / m, "pixel_f1": f1}


@dataclass(frozen=True)
class _OfDraws:
    """A figure of images by number, of all draws at once."""

    binned: _Binned
    name: str

    def weighted(self, predictions: Any, targets: Any, weights: Array) -> Array:
        """Return the figure of every row of weights."""
        return self.binned.figures(weights)[self.name]

    def __call__(self, predictions: Any, targets: Any) -> float:
        """Return the figure of all images."""
        return float(self.weighted(predictions, targets, np.ones((1, len(predictions)), dtype=np.int64))[0])


class AUPRO(Metric):
    """Mean overlap of defects with what is found, over false positive rates up to a limit, as a metric of torchmetrics.

    Args:
        fpr_limit: Greatest false positive rate, in (0, 1]; the area is divided by it.

    Raises:
        UsageError: A limit outside its range.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    maps: list[Tensor]
    masks: list[Tensor]

    def __init__(self, fpr_limit: float = FPR_LIMIT, **settings: Any) -> None:
        super().__init__(**settings)
        if not 0 < fpr_limit <= 1:
            raise UsageError(f"fpr_limit is {fpr_limit}; it must be in (0, 1]")
        self.fpr_limit = fpr_limit
        self.add_state("maps", [], dist_reduce_fx="cat")
        self.add_state("masks", [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add maps (B, H, W) or (B, 1, H, W) and masks of the same shape, above 0 where there is a defect."""
        shape = (len(maps), *maps.shape[-2:])
        self.maps.append(maps.detach().reshape(shape))
        self.masks.append(masks.detach().reshape(shape) > 0)

    def compute(self) -> Tensor:
        """Return the area, a scalar; NaN without a defect or without a good pixel."""
        from torchmetrics.utilities import dim_zero_cat

        maps, masks = (dim_zero_cat(held).cpu().numpy() for held in (self.maps, self.masks))
        return torch.tensor(PixelFigures(list(maps), list(masks)).aupro(self.fpr_limit))
