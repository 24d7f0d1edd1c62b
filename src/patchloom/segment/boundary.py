"""How well the borders of a segmentation lie: the boundary F-score of each class in each image.

Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?" (BMVC): precision is the share of the
predicted border that lies within a tolerance of the true one, recall the reverse.

>>> truth = torch.zeros(8, 8, dtype=torch.uint8)
>>> truth[2:6, 2:6] = 1
>>> boundary_f(truth, truth, 2).tolist()
[1.0, 1.0]
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.segment.metrics import IGNORED

TOLERANCE = 0.0075
"""Share of the image's diagonal; theirs and that of the Berkeley benchmark."""


def boundary_f(
    predicted: Tensor, target: Tensor, num_classes: int, tolerance: float = TOLERANCE, ignore_index: int = IGNORED
) -> Tensor:
    """Return the F-score (K,) float64 of each class's border in one image.

    Args:
        predicted: (H, W) classes; others than 0 … K - 1 are none.
        target: (H, W), `ignore_index` where unknown: borders there, and towards there, count nowhere.
        num_classes: K.
        tolerance: Share of the image's diagonal within which a border is right; at least one pixel.
        ignore_index: Value of unknown pixels.

    Returns:
        NaN where neither has a border of the class, 0 where one has.

    Raises:
        UsageError: Shapes differ.
    """
    if predicted.shape != target.shape:
        raise UsageError(f"the prediction has shape {tuple(predicted.shape)} and the mask {tuple(target.shape)}")
    said, truth = predicted.cpu().numpy(), target.cpu().numpy()
    reach = max(1.0, tolerance * math.hypot(*truth.shape))
    known = None
    if (unknown := truth == ignore_index).any():
        from scipy.ndimage import binary_dilation

        known = ~binary_dilation(unknown, np.ones((3, 3), bool))
    margin = int(reach)
    borders = [_borders(values, known, num_classes, margin) for values in (said, truth)]
    steps = _steps(reach, borders[0].shape[1])
    counts, shares = [], []
    for one, other in (borders, borders[::-1]):
        places = np.flatnonzero(one >= 0).astype(np.int32)
        classes = one.ravel()[places]
        counts.append(np.bincount(classes, minlength=num_classes))
        missed = np.bincount(_out_of_reach(places, classes, other.ravel(), steps), minlength=num_classes)
        shares.append(1 - missed / counts[-1].clip(min=1))
    (precision, recall), total = shares, counts[0] + counts[1]
    found = (
        counts[0].clip(max=1) * counts[1].clip(max=1) * 2 * precision * recall / (precision + recall).clip(min=1e-12)
    )
    return torch.from_numpy(np.where(total > 0, found, math.nan))


def _borders(values: np.ndarray, known: np.ndarray | None, num_classes: int, margin: int) -> np.ndarray:
    """Return the class of pixels that touch another, -1 elsewhere, in a margin; the image's edge is no border."""
    border = np.zeros(values.shape, bool)
    for ours, theirs in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        differ = values[ours] != values[theirs]
        border[ours] |= differ
        border[theirs] |= differ
    if known is not None:
        border &= known
    return np.pad(
        np.where(border & (values < num_classes), values.astype(np.int16), np.int16(-1)), margin, constant_values=-1
    )


def _steps(reach: float, width: int) -> list[int]:
    """Return the ways to all places within reach, nearest first, in an array of rows of a width."""
    most = int(reach)
    rows, columns = (part.ravel() for part in np.mgrid[-most : most + 1, -most : most + 1])
    squares = rows**2 + columns**2
    order = [place for place in np.argsort(squares, kind="stable") if math.sqrt(squares[place]) <= reach]
    return [int(rows[place]) * width + int(columns[place]) for place in order]


def _out_of_reach(places: np.ndarray, classes: np.ndarray, other: np.ndarray, steps: list[int]) -> np.ndarray:
    """Return the classes of those places (n,) that are within reach of no border of their class."""
    # All classes at once, and most are found after a few steps: distances would be taken class by class.
    for step in steps:
        if not len(places):
            break
        missed = other[places + step] != classes
        places, classes = places[missed], classes[missed]
    return classes
