"""Parts of a pile that share no copy, no patient and no scene, with the classes of the whole in each.

Groups are dealt out by scikit-learn's `StratifiedGroupKFold` in twentieths, which are joined to the shares asked for.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from patchloom.curation.compare import compared
from patchloom.curation.config import SplitConfig
from patchloom.curation.listing import as_files, checked_table, write_listing
from patchloom.curation.pairs import groups_of
from patchloom.data import open_source
from patchloom.data.groups import read_groups
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device

FOLDS = 20


def run_split(config: SplitConfig) -> dict[str, Any]:
    """Divide images into parts.

    Returns:
        Images of each part, by class where there are classes (`parts`), the number of `groups` that stay together, and
        the file (`out`).

    Raises:
        UsageError: No such data, the images are no files, a file exists, or fewer groups than parts.
    """
    path = checked_table(config.out, config.overwrite)
    facts: dict[str, Any] = {}
    if config.together:
        images = compared(config)
        source, facts = as_files(images.source, "data split"), images.facts
        places = images.look.places
        copies = groups_of(images.vectors, images.threshold, torch_device(config.device))
        skipped = images.look.skipped
    else:
        opened = open_source(config.data, in_chans=config.in_chans, by_index=True, **config.source_options())
        source, copies, skipped = as_files(opened, "data split"), [], []
        places = np.arange(len(source))
    keys = [source.key(int(place)) for place in places]
    told = np.arange(len(keys)) if config.groups is None else read_groups(config.groups, keys)
    groups = joined(told, copies)
    labels = None if source.labels is None or source.multilabel else source.labels[places]
    if source.multilabel:
        notice(f"{source.name} has several labels an image: parts are drawn without regard to them")
    shares = config.shares()
    part = parts_of(groups, labels, list(shares.values()), config.seed)
    names = list(shares)
    write_listing(
        path,
        source,
        places.tolist(),
        {"split": {int(place): names[number] for place, number in zip(places, part, strict=True)}},
    )
    rows = []
    for number, name in enumerate(names):
        row: dict[str, Any] = {"part": name, "images": int((part == number).sum())}
        row["share"] = row["images"] / len(part)
        if labels is not None and source.class_names is not None and len(source.class_names) <= 12:
            row |= {c: int((labels[part == number] == k).sum()) for k, c in enumerate(source.class_names)}
        rows.append(row)
    return {
        "parts": rows,
        "groups": int(groups.max()) + 1,
        "largest_group": int(np.bincount(groups).max()),
        "broken": len(skipped),
        **facts,
        "out": str(path),
    }


def joined(groups: np.ndarray, ties: list[np.ndarray]) -> np.ndarray:
    """Return groups (n,) in which images that are tied are in one, and with them their groups.

    >>> joined(np.array([0, 0, 1, 2]), [np.array([1, 2])])
    array([0, 0, 0, 1], dtype=int32)
    """
    first = [groups[tie[0]] for tie in ties for _ in tie[1:]]
    second = [groups[number] for tie in ties for number in tie[1:]]
    size = int(groups.max()) + 1
    edges = coo_array((np.ones(len(first), np.bool_), (first, second)), shape=(size, size))
    return connected_components(edges, directed=False)[1][groups]


def parts_of(groups: np.ndarray, labels: np.ndarray | None, shares: list[float], seed: int) -> np.ndarray:
    """Return the part (n,) of each image: whole groups, about the shares asked for, and of each class alike.

    Args:
        groups: (n,) int, images with one number stay together.
        labels: (n,) class numbers, -1 where unknown; or None.
        shares: Of the parts; sum to 1.
        seed: Of the draw.

    Raises:
        UsageError: Fewer groups than parts.
    """
    count = len(np.unique(groups))
    if count < len(shares):
        raise UsageError(f"the images are {count} groups that stay together, too few for {len(shares)} parts")
    folds = min(FOLDS, count)
    if labels is not None:
        largest = int(np.unique(labels, return_counts=True)[1].max())
        folds, labels = (min(folds, largest), labels) if largest >= len(shares) else (folds, None)
    dealer = (
        GroupKFold(folds, shuffle=True, random_state=seed)
        if labels is None
        else StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    )
    fold = np.zeros(len(groups), dtype=np.int64)
    classes = np.zeros(len(groups)) if labels is None else labels
    with warnings.catch_warnings():
        # A class of fewer images than folds is in as many of them as it can be.
        warnings.filterwarnings("ignore", message="The least populated class")
        for number, (_, chosen) in enumerate(dealer.split(np.zeros((len(groups), 1)), classes, groups)):
            fold[chosen] = number
    sizes = np.bincount(fold, minlength=folds) / len(groups)
    # Each fold goes where most is missing, the largest first, so that none of the parts stays empty.
    part_of_fold, missing = np.zeros(folds, dtype=np.int64), np.array(shares, dtype=float)
    for number in np.argsort(-sizes, kind="stable"):
        part_of_fold[number] = int(missing.argmax())
        missing[part_of_fold[number]] -= sizes[number]
    return part_of_fold[fold]
