"""Weighted k-nearest-neighbour classification of features, as DINO evaluates.

Neighbours are found by cosine similarity; each votes with weight exp(similarity / temperature). Training features are
compared a block at a time and the best so far are kept, so memory is bounded whatever their number. Caron et
al. 2021, arXiv 2104.14294; `eval/knn.py` of DINOv2's published code.

>>> train, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
>>> votes = knn_votes(train, labels, torch.tensor([[0.9, 0.1, 0.0]]), ks=(1, 8))
>>> votes[8].argmax(1)
tensor([0])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.base.ranges import Positive, checked
from patchloom.errors import UsageError
from patchloom.features.class_scores import ClassScores, class_scores

# Similarities held at a time: 512 MB.
MOST_SIMILARITIES = 2**27
# Training features compared at a time, unless the caller says otherwise.
TRAIN_BLOCK = 2**16
# Similarities in flight that a processor's caches still help with.
CACHED = 2**24
# Columns that share a maximum in the search for the highest ones.
GROUP = 8


def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    block: int = 1024,
) -> Tensor:
    """Return the class of each test feature by the votes of its nearest training features.

    Args:
        train: (n, D) features.
        train_labels: (n,) int64 class indices.
        test: (m, D) features.
        k: Neighbours that vote; at most n.
        temperature: Lower lets near neighbours dominate.
        num_classes: Number of classes; default: as many as the labels name.
        block: Test features compared at a time, at most.

    Returns:
        (m,) int64; the lowest class where votes tie.

    Raises:
        UsageError: No training features, k below 1, a temperature not above 0, or a label outside the classes.
    """
    votes = knn_votes(train, train_labels, test, ks=(k,), temperature=temperature, num_classes=num_classes, block=block)
    return next(iter(votes.values())).argmax(1)


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> ClassScores:
    """Return how well `knn_predict` classifies test features, and the commonest class's share; arguments as there.

    Images whose label is below 0 have none: they neither vote nor count.
    """
    known = train_labels >= 0
    train, train_labels = train[known], train_labels[known]
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    predicted = knn_predict(train, train_labels, test, k=k, temperature=temperature, num_classes=classes)
    return class_scores(predicted, test_labels)


@checked
def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    ks: Sequence[int] = (20,),
    temperature: Positive = 0.07,
    num_classes: int | None = None,
    leave_one_out: bool = False,
    block: int = 1024,
    train_block: int | None = None,
    device: torch.device | str | None = None,
) -> dict[int, Tensor]:
    """Return the votes for each class of each test feature, for several numbers of neighbours at once.

    The weights are a softmax of similarity / temperature over the nearest max(ks) training features; for a smaller k
    those of the nearest k count, so votes sum to 1 for the largest k only.

    Args:
        train: (n, D) features.
        train_labels: (n,) int64 class indices, or (n, L) float in [0, 1], NaN where unknown, for several labels each.
        test: (m, D) features.
        ks: Numbers of neighbours; those above n count as n, and double ones once.
        temperature: Lower lets near neighbours dominate.
        num_classes: Number of classes; default: as many as the labels name.
        leave_one_out: `test` is `train`: no feature is its own neighbour.
        block: Test features compared at a time, at most.
        train_block: Training features compared at a time, at most.
        device: Where to compute; default: where `train` is.

    Returns:
        Votes (m, C) float32 on the CPU or where `train` is, by k in rising order.

    Raises:
        UsageError: As for `knn_predict`; or `leave_one_out` with other test features than training features.
    """
    check_neighbours(train, train_labels, ks, leave_one_out, len(test))
    classes = _class_count(train_labels, num_classes)
    most = len(train) - leave_one_out
    neighbour_counts = sorted({min(k, most) for k in ks})
    similarity, nearest = nearest_neighbours(
        train,
        test,
        neighbour_counts[-1],
        leave_one_out=leave_one_out,
        block=block,
        train_block=train_block,
        device=device,
    )
    weights = (similarity.double() / temperature).softmax(1).float()
    labels = train_labels.to(weights.device)
    votes = torch.zeros(len(test), classes, device=weights.device)
    by_count, before = {}, 0
    for k in neighbour_counts:
        part = slice(before, k)
        if labels.ndim == 1:
            votes.scatter_add_(1, labels[nearest[:, part]], weights[:, part])
        else:
            votes += _label_votes(labels, nearest[:, part], weights[:, part])
        by_count[k], before = votes.clone(), k
    return by_count


@torch.no_grad()
def nearest_neighbours(
    train: Tensor,
    test: Tensor,
    k: int,
    *,
    leave_one_out: bool = False,
    block: int = 1024,
    train_block: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cosine similarities (m, k), falling, and the indices (m, k) of the nearest training features.

    Args:
        train: (n, D) features; may be mapped from disk, a block is in memory at a time.
        test: (m, D) features.
        k: How many; at most n, or n - 1 where each feature's own is left out.
        leave_one_out: `test` is `train`: no feature is its own neighbour.
        block: Test features compared at a time, at most; fewer where their similarities would not fit.
        train_block: Training features compared at a time.
        device: Where to compute; the result lies there.
    """
    target = torch.device(device) if device is not None else train.device
    columns = min(len(train), max(k, train_block or TRAIN_BLOCK))
    held = CACHED if target.type == "cpu" else MOST_SIMILARITIES
    rows = max(1, min(block, min(held, MOST_SIMILARITIES) // columns, len(test)))
    best = torch.full((len(test), k), -torch.inf, device=target)
    which = torch.zeros(len(test), k, dtype=torch.int64, device=target)
    buffer = torch.empty(rows, columns, device=target)
    queries = F.normalize(test.to(target).float(), dim=1)
    for start in range(0, len(train), columns):
        part = F.normalize(train[start : start + columns].to(target).float(), dim=1).T
        for at in range(0, len(test), rows):
            asked = queries[at : at + rows]
            similar = torch.mm(asked, part, out=buffer[: len(asked)] if part.shape[1] == columns else None)
            if leave_one_out:
                _hide_own(similar, at, start)
            values, indices = _highest(similar, min(k, similar.shape[1]))
            indices += start
            if start:
                values, order = torch.cat([best[at : at + rows], values], 1).topk(k, dim=1)
                indices = torch.cat([which[at : at + rows], indices], 1).gather(1, order)
            best[at : at + rows, : values.shape[1]] = values
            which[at : at + rows, : values.shape[1]] = indices
    return best, which


def _highest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `values.topk(k, dim=1)` does.

    On a processor, the highest k lie in the k groups of columns with the highest maxima, which are found and searched
    in half the time of all columns.
    """
    groups = values.shape[1] // GROUP
    if values.device.type != "cpu" or groups < 4 * k:
        return values.topk(k, dim=1)
    body = values[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    chosen = body.amax(1).topk(k, dim=1, sorted=False).indices
    steps = torch.arange(GROUP) * groups
    columns = (chosen[:, None] + steps[:, None]).flatten(1)
    rest = torch.arange(groups * GROUP, values.shape[1]).expand(len(values), -1)
    columns = torch.cat([columns, rest], 1)
    found, order = values.gather(1, columns).topk(k, dim=1)
    return found, columns.gather(1, order)


def _hide_own(similar: Tensor, row: int, column: int) -> None:
    """Take each feature's similarity to itself out of a block that starts at `row` and `column`."""
    low, high = max(row, column), min(row + similar.shape[0], column + similar.shape[1])
    if low < high:
        columns = torch.arange(low, high, device=similar.device)
        similar[columns - row, columns - column] = -torch.inf


def _label_votes(labels: Tensor, nearest: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean (m, L) of several labels each, over the neighbours of which a label is known."""
    votes = []
    for near, weight in zip(nearest.split(1024), weights.split(1024), strict=True):
        theirs = labels[near].to(weight.dtype)
        known = ~theirs.isnan()
        total = torch.einsum("mk,mkl->ml", weight, theirs.nan_to_num(0.0))
        known_weight = torch.einsum("mk,mkl->ml", weight, known.to(weight.dtype))
        whole = weight.sum(1, keepdim=True)
        votes.append(torch.where(known_weight > 0, total / known_weight.clamp_min(1e-30) * whole, 0.0))
    return torch.cat(votes)


def check_neighbours(train: Tensor, labels: Tensor, ks: Sequence[int], leave_one_out: bool, tests: int) -> None:
    """Refuse what has no nearest neighbours; arguments as for `knn_votes`, `tests` being m.

    Raises:
        UsageError: Names what is wrong.
    """
    if len(train) < 1 + leave_one_out:
        raise UsageError("k-NN needs at least one training image" + (" besides the one asked about" * leave_one_out))
    if len(train) != len(labels):
        raise UsageError(f"{len(labels)} labels do not belong to {len(train)} training features")
    if not ks:
        raise UsageError("ks is empty; name at least one number of neighbours")
    for k in ks:
        if k < 1:
            raise UsageError(f"k is {k}; at least one neighbour has to vote")
    if leave_one_out and tests != len(train):
        raise UsageError("leave_one_out compares training features with one another; give them as test too")


def _class_count(labels: Tensor, num_classes: int | None) -> int:
    if labels.ndim == 2:
        return labels.shape[1]
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(
            f"training labels go from {int(labels.min())} to {int(labels.max())}; "
            f"with {classes} classes they must lie in 0 … {classes - 1}"
        )
    return classes
