"""How well segmentations overlap with their masks, with intervals: mean IoU, Dice and Jaccard, from areas by image.

Images and volumes share it. Mean IoU is mmsegmentation's; Dice and Jaccard are those of the DINOv2 radiology benchmark
(arXiv 2312.02366), but for false positives on background, which its code leaves out and which count here.

>>> ones = torch.ones(4, 3, dtype=torch.int64)
>>> scores_with_intervals(Areas(ones, 2 * ones, 2 * ones), ["background", "lung", "heart"])["foreground_dice"]
0.5
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.segment.metrics import IGNORED, Areas, areas, segmentation_scores
from patchloom.statistics.intervals import bootstrap_interval
from patchloom.statistics.metrics import Score, share

Array = np.ndarray
BACKGROUND = 0


def counted_areas(predicted: Tensor, truth: Tensor, num_classes: int, as_published: bool = False) -> Areas:
    """Return the areas that Dice and Jaccard are counted from.

    Args:
        predicted: Class of each pixel.
        truth: The truth, of the same shape.
        num_classes: K.
        as_published: Leave out pixels whose truth is background, as the radiology benchmark's scores do: what is
            predicted there then goes unseen.
    """
    return areas(predicted, torch.where(truth == BACKGROUND, IGNORED, truth) if as_published else truth, num_classes)


def iou_of(sums: Array) -> Array:
    """Return the IoU (r, K) of areas (r, 3, K), NaN where a class is neither there nor predicted."""
    return share(sums[:, 0], sums[:, 1] + sums[:, 2] - sums[:, 0])


def dice_of(sums: Array) -> Array:
    """Return Dice (r, K) of areas (r, 3, K), NaN where a class is neither there nor predicted."""
    return share(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def _mean_drawn(
    tables: Array, truth: Array, weights: Array, of: Callable[[Array], Array] = iou_of, first: int = 0
) -> Array:
    """Return the mean over classes from `first` on for each draw; `tables` (n, 3, K) holds the areas of each image."""
    return nanmean(of(_drawn_areas(tables, weights))[:, first:], axis=1)


def _iou_of_one(tables: Array, truth: Array, weights: Array) -> Array:
    """Return the IoU of one class, areas (n, 3), for each draw."""
    return iou_of(_drawn_areas(tables[:, :, None], weights))[:, 0]


def _right_drawn(tables: Array, truth: Array, weights: Array) -> Array:
    """Return the share that is right for each draw: what overlaps of what is there, over all classes together."""
    sums = _drawn_areas(tables.reshape(len(tables), 3, -1), weights).sum(2)
    return share(sums[:, 0], sums[:, 2])


mean_iou_score = Score("miou", _mean_drawn, "areas")
class_iou_score = Score("iou", _iou_of_one, "areas")
right_score = Score("right", _right_drawn, "areas")
# Means over the classes but the background.
FOREGROUND_SCORES = {
    name: Score(name, partial(_mean_drawn, of=of, first=BACKGROUND + 1), "areas")
    for name, of in (("foreground_dice", dice_of), ("foreground_jaccard", iou_of))
}


def scores_with_intervals(
    image_areas: Areas, class_names: list[str], seed: int = 0, draws: int = 1000, counted: Areas | None = None
) -> dict[str, Any]:
    """Return the scores of a whole set with bootstrap intervals over its images.

    Args:
        image_areas: Areas (n, K) of each image.
        class_names: K names, the background first if there is one.
        seed: Seed of the draws.
        draws: How many.
        counted: Areas that Dice and Jaccard are counted from, see `counted_areas`; default: the same.
    """
    scores = segmentation_scores(image_areas.total())
    tables, of_overlap = _tables(image_areas), _tables(counted or image_areas)
    nobody = np.zeros(len(tables))

    interval = partial(interval_of, draws=draws, seed=seed)
    names = dict(enumerate(class_names))
    absent = [names[number] for number, count in enumerate(image_areas.true.sum(0).tolist()) if not count]
    figures: dict[str, Any] = {
        "score": scores["miou"],
        "score_name": "miou",
        "miou": scores["miou"],
        "interval": interval(mean_iou_score, tables),
        "pixel_accuracy": scores["pixel_accuracy"],
        "pixel_accuracy_interval": interval(right_score, tables),
        "class_accuracy": scores["class_accuracy"],
        "per_class_iou": {names[number]: plain(value) for number, value in enumerate(scores["iou"])},
        "per_class_interval": {
            names[number]: interval(class_iou_score, tables[:, :, number])
            for number, value in enumerate(scores["iou"])
            if plain(value) is not None
        },
        "classes_not_in_test": absent,
    }
    for name, score in FOREGROUND_SCORES.items():
        figures |= {name: plain(score(of_overlap, nobody)), f"{name}_interval": interval(score, of_overlap)}
    by_class = dice_of(of_overlap.sum(0)[None])[0]
    return figures | {"per_class_dice": by_foreground_class(by_class[BACKGROUND + 1 :], class_names)}


def interval_of(score: Score, tables: Array, draws: int = 1000, seed: int = 0) -> list[float | None]:
    """Return the ends of a score's interval from areas (n, 3, …) of images; None where it has none."""
    try:
        # Images are drawn alike, whatever is on them.
        return bootstrap_interval(score, tables, np.zeros(len(tables)), draws=draws, seed=seed).ends
    except UsageError:  # so rare a class that hardly any draw has it
        return [None, None]


def by_foreground_class(values: Array, class_names: list[str]) -> dict[str, float | None]:
    """Return values of the classes but the background by name."""
    return {name: plain(value) for name, value in zip(class_names[BACKGROUND + 1 :], values, strict=True)}


def nanmean(values: Array, axis: int) -> Array:
    """Return the mean of what is defined, NaN where nothing is."""
    known = ~np.isnan(values)
    return share(np.where(known, values, 0).sum(axis), known.sum(axis))


def plain(value: float) -> float | None:
    """Return a number as it goes into results: None where it is not defined."""
    return float(value) if np.isfinite(value) else None


def _tables(image_areas: Areas) -> Array:
    return torch.stack(list(image_areas), dim=1).numpy().astype(np.float64)


def _drawn_areas(tables: Array, weights: Array) -> Array:
    n = len(tables)
    return (weights.astype(np.float64) @ tables.reshape(n, -1)).reshape(len(weights), *tables.shape[1:])
