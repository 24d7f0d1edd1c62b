"""Unequal classes: how many images each has, which are kept, what each weighs, and how groups of them fare.

Counts, weights by the effective number of samples (Cui et al. 2019, arXiv 1901.05555), deferred re-weighting (Cao et
al. 2019, arXiv 1906.07413) and groups are those of DeiT-LT (Rangwani et al. 2024, arXiv 2404.02900) and its published
code.

>>> long_tail_counts(10, 5000, 100)
[5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
>>> class_groups([50, 5000, 645])
{'head': [1], 'mid': [2], 'tail': [0]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchloom.base.ranges import Fraction, checked
from patchloom.errors import UsageError


def long_tail_counts(
    num_classes: int, max_count: int, imbalance_ratio: float, kind: Literal["exp", "step"] = "exp"
) -> list[int]:
    """Return the images of each class of a long-tailed set, the most frequent first.

    Args:
        num_classes: C, at least 2.
        max_count: Images of the most frequent class.
        imbalance_ratio: How many times as many these are as those of the rarest; 1 leaves all alike.
        kind: `exp` falls geometrically; `step` gives the second half of the classes the least.

    Raises:
        UsageError: A ratio below 1, or one that leaves the rarest class without image.
    """
    if num_classes < 2 or imbalance_ratio < 1:
        raise UsageError(
            f"imbalance is {imbalance_ratio:g} over {num_classes} classes; it must be at least 1, over two"
        )
    counts = [int(max_count * share) for share in long_tail_shares(num_classes, imbalance_ratio, kind)]
    if counts[-1] < 1:
        raise UsageError(
            f"imbalance {imbalance_ratio:g} leaves the rarest class none of {max_count} images; {max_count} is the most"
        )
    return counts


def long_tail_shares(num_classes: int, imbalance_ratio: float, kind: Literal["exp", "step"] = "exp") -> list[float]:
    """Return the images of each class over those of the most frequent, see `long_tail_counts`."""
    least = 1 / imbalance_ratio
    if kind == "step":
        return [1.0 if c < num_classes // 2 else least for c in range(num_classes)]
    return [least ** (c / (num_classes - 1.0)) for c in range(num_classes)]


def long_tail_subset(labels: np.ndarray, counts: Sequence[int], seed: int = 0) -> np.ndarray:
    """Return the indices of `counts[c]` images of each class c, class by class, drawn as published.

    Args:
        labels: (n,) classes 0 … C - 1.
        counts: Images to keep of each.
        seed: Of NumPy's legacy generator.

    Raises:
        UsageError: A class has fewer images than are to be kept.
    """
    generator = np.random.RandomState(seed)  # the published subsets come from this one
    kept = []
    for number, count in enumerate(counts):
        indices = np.flatnonzero(np.asarray(labels) == number)
        if len(indices) < count:
            raise UsageError(f"class {number} has {len(indices)} images and {count} are to be kept")
        generator.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept)


@checked
def effective_number_weights(counts: Sequence[float], beta: Fraction = 0.9999) -> Tensor:
    """Return the weight of each class by its effective number of images (Cui et al. 2019); the weights sum to C.

    Args:
        counts: Training images of each class, at least 1.
        beta: Overlap of images, in [0, 1).

    Raises:
        UsageError: A class without image, whose weight would be infinite.
    """
    if empty := [number for number, count in enumerate(counts) if count < 1]:
        raise UsageError(f"class {empty[0]} has no training image; remove the class or give it one")
    effective = 1.0 - np.power(beta, np.asarray(counts, dtype=np.float64))
    weights = (1.0 - beta) / effective
    return torch.tensor(weights / weights.sum() * len(counts), dtype=torch.float32)


def class_groups(
    counts: Sequence[int], boundaries: tuple[int, int] | None = None, by: Literal["rank", "count"] = "rank"
) -> dict[str, list[int]]:
    """Return the classes of head, middle and tail, the most frequent first.

    Args:
        counts: Training images of each class.
        boundaries: With `by="rank"`: first rank of the middle and of the tail (3 and 7 of CIFAR-10's ten, 36 and 71 of
            a hundred; default: those shares). With `by="count"`: images above which a class is head, and below which
            it is tail (default: 100 and 20).
        by: Whether ranks or counts tell the groups apart.
    """
    order = [int(c) for c in np.argsort(-np.asarray(counts), kind="stable")]
    if by == "count":
        high, low = boundaries or (100, 20)
        return {
            "head": [c for c in order if counts[c] > high],
            "mid": [c for c in order if low <= counts[c] <= high],
            "tail": [c for c in order if counts[c] < low],
        }
    # The published cuts: 3 and 7 of 10, 36 and 71 of 100.
    first, second = boundaries or (
        (36, 71) if len(order) == 100 else (round(0.34 * len(order)), round(0.7 * len(order)))
    )
    return {"head": order[:first], "mid": order[first:second], "tail": order[second:]}


def group_accuracy(per_class: Sequence[float], groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return the mean over the classes of each group of their accuracies; groups without class are left out."""
    return {name: float(np.mean([per_class[c] for c in group])) for name, group in groups.items() if len(group)}
