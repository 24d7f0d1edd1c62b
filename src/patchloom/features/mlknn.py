"""ML-kNN: the labels of an image by Bayes' rule from how many of its nearest neighbours have them.

Zhang and Zhou: "ML-KNN: A lazy learning approach to multi-label learning", Pattern Recognition 40 (2007), as
the DINOv2 radiology benchmark (arXiv 2312.02366) uses it. Neighbours are found by cosine similarity, as for the
weighted vote.

>>> train = torch.eye(3).repeat(4, 1)
>>> labels = (torch.arange(12)[:, None] % 3 == torch.arange(3)).float()
>>> mlknn_predict(train, labels, torch.eye(3), ks=(4,))[4].argmax(1)
tensor([0, 1, 2])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.base.ranges import Positive, checked
from patchloom.errors import UsageError
from patchloom.features.knn import check_neighbours, nearest_neighbours

KS = (5, 20, 50, 100, 200)


@torch.no_grad()
@checked
def mlknn_predict(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    ks: Sequence[int] = KS,
    smoothing: Positive = 1.0,
    exclude_self: bool = False,
    leave_one_out: bool = False,
    block: int = 1024,
    train_block: int | None = None,
    device: torch.device | str | None = None,
) -> dict[int, Tensor]:
    """Return the probability of each label of each test feature, for several numbers of neighbours.

    Args:
        train: (n, D) features.
        train_labels: (n, L) in [0, 1], NaN where unknown: such an image says nothing of the label, and as a neighbour
            counts as one without it.
        test: (m, D) features.
        ks: Numbers of neighbours; those above n count as n, and double ones once.
        smoothing: s of Laplace's rule, added to every count; published: 1.
        exclude_self: While counting what goes with a label, no training feature is its own neighbour. Published
            evaluations count it, which makes labels of training images look surer than those of others.
        leave_one_out: `test` is `train`: no feature is its own neighbour, nor is its own label counted.
        block: Features compared at a time, at most.
        train_block: Training features compared at a time, at most.
        device: Where to compute; default: where `train` is.

    Returns:
        (m, L) float64 where it was computed, by k in rising order.

    Raises:
        UsageError: No training features, one label each, k below 1, a smoothing not above 0, or `leave_one_out` with
            other test features than training features.
    """
    check_neighbours(train, train_labels, ks, leave_one_out, len(test))
    if train_labels.ndim != 2:
        raise UsageError("ML-kNN is for several labels each, (n, L); take the vote of neighbours for classes")
    apart = exclude_self or leave_one_out
    most = len(train) - apart
    if most < 1:
        raise UsageError("a single training feature has no neighbour but itself; leave exclude_self out")
    neighbour_counts = sorted({min(k, most) for k in ks})
    search: dict[str, Any] = {"block": block, "train_block": train_block, "device": device}
    _, among = nearest_neighbours(train, train, neighbour_counts[-1], leave_one_out=apart, **search)
    near = among if leave_one_out else nearest_neighbours(train, test, neighbour_counts[-1], **search)[1]
    labels = train_labels.to(near.device)
    has, lacks = labels > 0.5, labels <= 0.5  # neither where unknown
    # Of an image that is told by all others, its own label is taken out of what was counted.
    mine_has, mine_lacks = (rows.double() if leave_one_out else 0.0 for rows in (has, lacks))
    # In float64: a whole number and a Python float make float32, which the likelihoods are not in.
    known = has.sum(0).double() + lacks.sum(0) - mine_has - mine_lacks
    prior = (smoothing + has.sum(0).double() - mine_has) / (2 * smoothing + known)
    probabilities = {}
    for k, counted, counts in zip(
        neighbour_counts, _positives(among, has, neighbour_counts), _positives(near, has, neighbour_counts), strict=True
    ):
        positive = prior * _likelihood(_table(counted, has, k), counts, mine_has, smoothing)
        absent = (1 - prior) * _likelihood(_table(counted, lacks, k), counts, mine_lacks, smoothing)
        probabilities[k] = positive / (positive + absent)
    return probabilities


def _positives(near: Tensor, present: Tensor, ks: Sequence[int]) -> Iterator[Tensor]:
    """Yield how many of the nearest k have each label, (m, L) int64, for each k of a rising list."""
    weight = present.double()
    counts, before = torch.zeros(len(near), present.shape[1], dtype=torch.int64, device=near.device), 0
    for k in ks:
        counts = counts + F.embedding_bag(near[:, before:k], weight, mode="sum").long()
        before = k
        yield counts


def _table(counts: Tensor, rows: Tensor, k: int) -> Tensor:
    """Return how often a label's count was 0 … k, (L, k + 1) float64, over the images in `rows` (n, L) bool."""
    number = rows.shape[1]
    places = counts + (k + 1) * torch.arange(number, device=counts.device)
    return places[rows].bincount(minlength=number * (k + 1)).view(number, k + 1).double()


def _likelihood(table: Tensor, counts: Tensor, mine: Tensor | float, smoothing: float) -> Tensor:
    """Return the probability (m, L) of counts (m, L), given the label or its absence, by Laplace's rule."""
    hits = table.gather(1, counts.T).T
    return (smoothing + hits - mine) / (smoothing * table.shape[1] + table.sum(1) - mine)
