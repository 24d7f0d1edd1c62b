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
    from scipy.ndimage import binary_dilation, distance_transform_edt

    if predicted.shape != target.shape:
        raise UsageError(f"the prediction has shape {tuple(predicted.shape)} and the mask {tuple(target.shape)}")
    said, truth = predicted.cpu().numpy(), target.cpu().numpy()
    reach = max(1.0, tolerance * math.hypot(*truth.shape))
    known = ~binary_dilation(truth == ignore_index, np.ones((3, 3), bool))
    scores = torch.full((num_classes,), math.nan, dtype=torch.float64)
    for number in np.union1d(np.unique(said), np.unique(truth)):
        if not 0 <= number < num_classes:
            continue
        borders = [_border(values == number) & known for values in (said, truth)]
        counts = [int(border.sum()) for border in borders]
        if not any(counts):
            continue
        if not all(counts):
            scores[int(number)] = 0.0
            continue
        near = [distance_transform_edt(~border) <= reach for border in borders]
        precision, recall = (int((borders[i] & near[1 - i]).sum()) / counts[i] for i in (0, 1))
        scores[int(number)] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return scores


def _border(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask that touch another class; the edge of the image is no border."""
    border = np.zeros_like(mask)
    border[:-1] |= mask[:-1] & ~mask[1:]
    border[1:] |= mask[1:] & ~mask[:-1]
    border[:, :-1] |= mask[:, :-1] & ~mask[:, 1:]
    border[:, 1:] |= mask[:, 1:] & ~mask[:, :-1]
    return border
