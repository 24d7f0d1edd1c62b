"""Weighted k-nearest-neighbour classification of features, as DINO evaluates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.errors import UsageError

MOST_SIMILARITIES = 2**27


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

    Neighbours are found by cosine similarity; each votes with weight exp(similarity / temperature).

    Args:
        train: (n, D) features.
        train_labels: (n,) int64 class indices.
        test: (m, D) features.
        k: Neighbours that vote; at most n.
        temperature: Lower lets near neighbours dominate.
        num_classes: Number of classes; default: as many as the labels name.
        block: Test features compared at a time, at most; fewer where their similarities would fill 512 MB.

    Returns:
        (m,) int64; the lowest class where votes tie.

    Raises:
        UsageError: No training features, k below 1, a temperature not above 0, or a label outside the classes.
    """
    if len(train) == 0:
        raise UsageError("k-NN needs at least one training image")
    if k < 1:
        raise UsageError(f"k is {k}; at least one neighbour has to vote")
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}; it must be above 0")
    k = min(k, len(train))
    classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    if not 0 <= int(train_labels.min()) <= int(train_labels.max()) < classes:
        raise UsageError(
            f"training labels go from {int(train_labels.min())} to {int(train_labels.max())}; "
            f"with {classes} classes they must lie in 0 … {classes - 1}"
        )
    block = max(1, min(block, MOST_SIMILARITIES // len(train)))
    train = F.normalize(train.float(), dim=1)
    said = []
    for part in test.split(block):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        # Subtracting the largest changes no ranking and keeps the exponential finite.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, train_labels[nearest], weights)
        said.append(votes.argmax(1))
    return torch.cat(said) if said else torch.empty(0, dtype=torch.int64)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the share of test features that `knn_predict` classifies rightly; arguments as there."""
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    said = knn_predict(train, train_labels, test, k=k, temperature=temperature, num_classes=classes)
    return float((said == test_labels).double().mean())
