"""A few labelled images to learn from, drawn as published evaluations do.

The evaluation code of DINOv2 (arXiv 2304.07193), of DINOv3 (arXiv 2508.10104) and of the DINOv2 radiology benchmark
(arXiv 2312.02366).

>>> few_shot_subset(torch.tensor([2, 0, 0, 2, 2, 0]), 1, seed=3).shape
torch.Size([2])
>>> few_shot_subset(torch.zeros(10), 4, protocol="radiology")
tensor([0, 2, 5, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data.groups import read_groups
from patchloom.errors import UsageError
from patchloom.evaluate.subset_config import Protocol, SubsetConfig, check_shots
from patchloom.evaluate.target import labelled_features
from patchloom.features.extract import Features


def learning_features(
    config: SubsetConfig, *, may_be_same: bool = False, **how: Any
) -> tuple[Features, Features, list[str]]:
    """Return the features to learn from, those to measure on, and the names; arguments as for `labelled_features`.

    Raises:
        UsageError: As there; or a part of the training images is asked for and the test images are the same.
    """
    train, test, names = labelled_features(config, may_be_same=may_be_same, **how)
    if config.shots is None:
        return train, test, names
    if train is test:
        raise UsageError(f"shots takes a part of {config.train} to learn from; measure on other images")
    patients = None if config.patients is None else read_groups(config.patients, train.keys)
    chosen = few_shot_subset(train.labels, config.shots, protocol=config.shots_by, seed=config.seed, patients=patients)
    return taken(train, chosen), test, names


def taken(features: Features, chosen: Tensor) -> Features:
    """Return the features of the images at `chosen` (m,)."""
    keys = [features.keys[number] for number in chosen.tolist()]
    return Features(features.vectors[chosen], features.labels[chosen], keys, features.skipped)


def few_shot_subset(
    labels: Tensor | np.ndarray,
    shots: float,
    *,
    protocol: Protocol = "dinov2",
    seed: int = 0,
    patients: Tensor | np.ndarray | None = None,
) -> Tensor:
    """Return the indices (m,) int64 of the images to learn from.

    Args:
        labels: (n,) int64 classes, -1 where unknown; or (n, L) in [0, 1], NaN where unknown, for several labels each.
        shots: K images of each class, all where it has fewer.
        protocol: `dinov2`: for one class after the other, K of a permutation; in that order. `dinov3`: likewise with
            a share of each class where K is below 1, at least one image, and with those that have the label where
            there are several each; in the order of the data. `radiology`: K images in all, evenly spaced, whatever
            their labels; with `patients`, of each label the first K patients all of whose images have it, all their
            images. `nested`: more shots of a seed contain fewer ones; in the order of the data.
        seed: Of the draw, the published number of the try; `radiology` draws nothing.
        patients: (n,) number of each image's patient, in the order of their names.

    Raises:
        UsageError: An unknown protocol, a number of shots it does not know, several labels each where it draws by
            class, patients without `radiology`, or no image to choose from.
    """
    labels = torch.as_tensor(labels)
    check_shots(shots, protocol, patients is not None)
    if labels.ndim == 2 and protocol in ("dinov2", "nested"):
        raise UsageError(
            f"{protocol} draws images of each class and these have several labels each; take dinov3 or radiology"
        )
    if protocol == "nested":
        return torch.from_numpy(nested_shots(labels.numpy(), int(shots), seed))
    if protocol == "radiology":
        if patients is None:
            return evenly_spaced(len(labels), int(shots))
        chosen = _first_patients(labels, int(shots), torch.as_tensor(patients))
    else:
        # The stream is that of torch.manual_seed, which DINOv2 draws from.
        draw = torch.Generator().manual_seed(seed)
        chosen = []
        for members in _members(labels):
            count = max(int(len(members) * shots), 1) if shots < 1 else int(shots)
            chosen.append(members[torch.randperm(len(members), generator=draw)[:count]])
    if not chosen:
        raise UsageError("no image can be chosen: none is labelled, or no patient's images share a label")
    indices = torch.cat(chosen)
    return indices.unique() if protocol == "dinov3" else indices


def shot_neighbours(ks: Sequence[int], shots: float | None, protocol: str) -> list[int]:
    """Return the numbers of neighbours that k-NN is measured with, of K shots a class: those up to K, and K itself."""
    if shots is None or shots < 1 or protocol not in ("dinov2", "dinov3"):
        return list(ks)
    return [*(k for k in ks if k <= shots), int(shots)]


def evenly_spaced(n: int, count: int) -> Tensor:
    """Return `count` of n indices at equal distances from the first on, rounded; all where there are no more."""
    if count >= n:
        return torch.arange(n)
    return torch.from_numpy(np.arange(0, n, n / count)[:count].round().astype(np.int64))


def nested_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Return the indices of up to `shots` images per class; more shots of a seed contain fewer ones.

    Args:
        labels: (n,) classes.
        shots: Images per class; a class with fewer gives all it has.
        seed: Of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    chosen = [order[shuffled == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def _members(labels: Tensor) -> list[Tensor]:
    """Return the indices of the images of each class that occurs, or of each label that does, in ascending order."""
    if labels.ndim == 2:
        found = [column.nonzero().flatten() for column in (labels > 0.5).T]
    else:
        found = [(labels == label).nonzero().flatten() for label in labels[labels >= 0].unique()]
    return [members for members in found if len(members)]


def _first_patients(labels: Tensor, shots: int, patients: Tensor) -> list[Tensor]:
    """Return the images of each patient chosen; one that an earlier label brought is not replaced by another."""
    present = labels > 0.5 if labels.ndim == 2 else labels[:, None] == labels[labels >= 0].unique()
    _, number = patients.unique(return_inverse=True)
    images = number.bincount()
    having = torch.zeros(len(images), present.shape[1], dtype=torch.int64).index_add_(0, number, present.long())
    chosen: dict[int, None] = {}
    for shared in (having == images[:, None]).T:
        chosen |= dict.fromkeys(shared.nonzero().flatten()[:shots].tolist())
    return [(number == patient).nonzero().flatten() for patient in chosen]
