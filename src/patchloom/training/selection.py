"""Which labelled images are learnt from and which are measured on.

A held-out part first, then a share or a number of images per class of the rest; every draw is of a seed, so the same
images are held out whatever the label budget.

>>> from patchloom.data import open_source
>>> train, held_out = hold_out(open_source("digits"), share=0.2, seed=0)
>>> few = limit_labels(train, shots=5, seed=0)
>>> len(train), len(held_out), len(few)
(1078, 269, 50)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedGroupKFold, StratifiedShuffleSplit
from torch import Tensor

from patchloom.data.base import Source
from patchloom.data.groups import read_groups
from patchloom.data.subset import SubsetSource
from patchloom.errors import UsageError
from patchloom.training.long_tail import long_tail_counts, long_tail_shares, long_tail_subset


def hold_out(source: Source, share: float, seed: int, groups: str | None = None) -> tuple[SubsetSource, SubsetSource]:
    """Split a source into images to learn from and images to measure on.

    Args:
        source: Labelled images.
        share: Share held out, in (0, 1).
        seed: Seed of the draw.
        groups: CSV file with the columns `key` and `group`; images of one group (a patient, a slide, a scene) all
            fall on one side. Without it every class is split alike.

    Raises:
        UsageError: Too few images or groups, or a group file that does not cover the images.
    """
    everything = np.arange(len(source))
    labels = None if source.labels is None or source.labels.ndim > 1 else source.labels
    if groups is not None:
        numbers = read_groups(groups, [source.key(index) for index in range(len(source))])
        if len(np.unique(numbers)) < 2:
            raise UsageError(f"{groups} puts all images in one group, so no group is left to measure on")
        learnt, held = _by_group(everything, labels, numbers, share, seed)
    else:
        count = max(1, round(share * len(source)))
        if len(source) - count < 1:
            raise UsageError(f"{source.name} has {len(source)} images, too few to hold out {share:.0%}; give test")
        sizes = np.zeros(0) if labels is None else np.unique(labels, return_counts=True)[1]
        # Each class on both sides, where there are images enough for that.
        fits = len(sizes) > 0 and sizes.min() >= 2 and len(sizes) <= min(count, len(source) - count)
        splitter = (StratifiedShuffleSplit if fits else ShuffleSplit)(1, test_size=count, random_state=seed)
        learnt, held = next(splitter.split(everything, labels))
    return SubsetSource(source, np.sort(learnt)), SubsetSource(source, np.sort(held))


def limit_labels(source: Source, *, fraction: float = 1.0, shots: int | None = None, seed: int = 0) -> Source:
    """Return part of a source: a share of each class, or so many images of each.

    Args:
        source: Labelled images.
        fraction: Share of the images of each class, in (0, 1]; at least one of each is kept. Of a multi-label source
            a share of all images.
        shots: Images of each class instead.
        seed: Seed of the draw; a larger budget contains a smaller one.

    Raises:
        UsageError: Fewer images in a class than `shots`, or several labels per image with `shots`.
    """
    if fraction >= 1 and shots is None:
        return source
    labels = source.labels
    if labels is None:
        raise UsageError(f"{source.name} has no labels at hand, so label_fraction and shots cannot be met; leave them")
    generator = np.random.default_rng(seed)
    if labels.ndim > 1:
        if shots is not None:
            raise UsageError("shots counts images per class; with several labels per image use label_fraction")
        order = generator.permutation(len(source))
        return SubsetSource(source, np.sort(order[: max(1, int(fraction * len(source)))]))
    chosen = []
    for number in np.unique(labels[labels >= 0]):
        members = generator.permutation(np.flatnonzero(labels == number))
        if shots is not None and len(members) < shots:
            name = source.class_names[number] if source.class_names else str(number)
            raise UsageError(f"the class {name} has {len(members)} images to learn from, fewer than shots={shots}")
        # The tolerance keeps 0.3 of 10 at 3.
        chosen.append(members[: shots if shots is not None else max(1, int(fraction * len(members) + 1e-9))])
    return SubsetSource(source, np.sort(np.concatenate(chosen)))


def long_tailed(source: Source, ratio: float, kind: Literal["exp", "step"] = "exp") -> SubsetSource:
    """Return part of a source, its classes made unequal: as many images of the first as fit, the fewest of the last.

    The images are those of seed 0, whatever a run's seed, so that a teacher and its student learn from the same ones.

    Args:
        source: Images of one class each.
        ratio: How many times as many images the first class has as the last.
        kind: `exp`: geometrically fewer from class to class, in the order of their numbers; `step`: the second half of
            the classes has the fewest.

    Raises:
        UsageError: Several labels per image, a ratio below 1, or one that leaves a class without image.
    """
    if source.labels is None or source.labels.ndim > 1:
        raise UsageError(f"imbalance counts images per class, and {source.name} has several labels per image")
    images_by_class = class_counts(source).tolist()
    shares = long_tail_shares(len(images_by_class), ratio, kind)
    most = int(min(count / share for count, share in zip(images_by_class, shares, strict=True)))
    counts = long_tail_counts(len(images_by_class), most, ratio, kind)
    return SubsetSource(source, np.sort(long_tail_subset(source.labels, counts)))


def class_counts(source: Source) -> Tensor:
    """Return the number of images of each class, or of images that show each label, (C,) int64.

    Raises:
        UsageError: A class without an image: nothing could be learnt of it.
    """
    assert source.labels is not None
    assert source.class_names is not None
    if source.labels.ndim > 1:
        counts = np.nansum(source.labels > 0.5, axis=0)
    else:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names))
    missing = [name for name, count in zip(source.class_names, counts, strict=True) if count == 0]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"no image to learn from shows {', '.join(missing[:3])}{more}; add images, raise label_fraction, or drop "
            f"the class"
        )
    return torch.from_numpy(counts.astype(np.int64))


def _by_group(
    everything: np.ndarray, labels: np.ndarray | None, groups: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    folds = min(max(2, round(1 / share)), len(np.unique(groups)))
    if labels is not None and np.unique(labels, return_counts=True)[1].min() >= folds:
        stratified = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        learnt, held = next(stratified.split(everything, labels, groups))
        if len(held) and len(learnt):
            return learnt, held
    whole: tuple[np.ndarray, np.ndarray] = next(
        GroupShuffleSplit(1, test_size=share, random_state=seed).split(everything, labels, groups)
    )
    return whole
