"""Dice of volumes: by class and volume, with intervals over volumes.

Equal to MONAI's `DiceMetric`: a class that a volume does not have counts nowhere in it.

>>> areas = [Areas(torch.tensor([8, 2]), torch.tensor([9, 3]), torch.tensor([9, 3])) for _ in range(3)]
>>> round(volume_scores(areas, ["background", "lung"])["dice"], 4)
0.6667
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from patchloom.segment.metrics import Areas, dice

DRAWS = 1000
LEVEL = (2.5, 97.5)


def volume_scores(areas: Sequence[Areas], class_names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Return the scores of a set of volumes.

    Args:
        areas: Voxels by class of each volume.
        class_names: K names, the background first.
        seed: Seed of the draws of intervals.

    Returns:
        `dice`, the mean over the classes but the background of each volume, then over volumes, with `dice_interval`;
        `dice_with_background`, likewise over all classes; `per_class_dice` and `per_class_interval`, over the volumes
        that have the class. Intervals hold 95 % of the means of volumes drawn anew.
    """
    table = torch.stack([dice(each).where(each.true > 0, torch.nan) for each in areas]).double().numpy()
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(table), size=(DRAWS, len(table)))
    by_volume, all_classes = _means(table[:, 1:], 1), _means(table, 1)
    mean = float(_means(by_volume[None], 1)[0])
    return {
        "dice": mean,
        "dice_interval": _interval(by_volume, drawn),
        "dice_with_background": float(_means(all_classes[None], 1)[0]),
        "per_class_dice": dict(zip(class_names, map(_plain, _means(table, 0)), strict=True)),
        "per_class_interval": {name: _interval(table[:, n], drawn) for n, name in enumerate(class_names)},
        "volumes": len(table),
    }


def _means(values: np.ndarray, axis: int) -> np.ndarray:
    """Return means of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    counts = known.sum(axis)
    return np.divide(np.where(known, values, 0).sum(axis), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def _interval(values: np.ndarray, drawn: np.ndarray) -> list[float | None]:
    means = _means(values[drawn], 1)
    means = means[~np.isnan(means)]
    if not len(means):
        return [None, None]
    return [float(end) for end in np.percentile(means, LEVEL)]


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
