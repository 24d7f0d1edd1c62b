"""A balanced choice of many images by hierarchical k-means (Vo et al. 2024, arXiv 2405.15613).

Features are clustered, the centres are clustered again, and so on. What is common in the pile fills many clusters of
the first level, which fall together higher up; so equal shares for the clusters of the top, dealt out level by level
to the clusters below, take as much of what is rare as of what is common. As in the paper each level above the first is
made again from the points next to its centres, which evens the clusters out ("resampling-clustering").
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchloom.base.progress import Meter
from patchloom.curation.compare import compared
from patchloom.curation.config import CurateConfig
from patchloom.curation.listing import as_files, checked_table, write_listing
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.tokenizers.kmeans import KMeansResult, kmeans
from patchloom.tokenizers.nearest import NearestCentroids

NEAREST = 4
"""Points next to a centre that stand for its cluster when the level above is made again."""


class Level(NamedTuple):
    """Clusters of one level."""

    centres: Tensor
    """(k, d)."""
    member_of: np.ndarray
    """(n,) the cluster of each point of the level below, images at the first."""


def run_curate(config: CurateConfig) -> dict[str, Any]:
    """Choose images, as many from each corner of what there is.

    Returns:
        `images` there are and `chosen`, clusters of each of the `levels`; how even the choice is: the effective number
        of clusters of the top level (exponential of the entropy) before and after; and the file.

    Raises:
        UsageError: No encoder or data, the images are no files, the file exists, or fewer images than are to be chosen.
    """
    path = checked_table(config.out, config.overwrite)
    if config.encoder is None:
        raise UsageError(
            "data curate needs an encoder that knows what is alike; give --encoder, such as a timm model or a run of "
            "patchloom pretrain on these images"
        )
    images = compared(config)
    source, vectors = as_files(images.source, "data curate"), images.vectors
    if config.count >= len(vectors):
        raise UsageError(f"count is {config.count}; choose fewer than the {len(vectors)} images that open")
    sizes = config.levels or usual_levels(len(vectors))
    if sizes[0] > len(vectors):
        raise UsageError(f"levels begin with {sizes[0]} clusters; there are {len(vectors)} images")
    levels = hierarchy(
        vectors, sizes, iters=config.iters, resampling=config.resampling, seed=config.seed, device=config.device
    )
    chosen = balanced(levels, config.count, config.seed)
    write_listing(path, source, sorted(images.look.places[chosen].tolist()))
    top = levels[0].member_of
    for level in levels[1:]:
        top = level.member_of[top]
    return {
        "images": len(vectors),
        "chosen": len(chosen),
        "levels": list(sizes),
        "effective_clusters_before": effective(np.bincount(top, minlength=sizes[-1])),
        "effective_clusters_after": effective(np.bincount(top[chosen], minlength=sizes[-1])),
        "out": str(path),
    }


def usual_levels(count: int) -> tuple[int, ...]:
    """Return numbers of clusters: a quarter of the images, then a tenth of the level below, down to 10.

    >>> usual_levels(20_000)
    (5000, 500, 50)
    """
    sizes = [max(1, count // 4)]
    while sizes[-1] // 10 >= 10 and len(sizes) < 4:
        sizes.append(sizes[-1] // 10)
    return tuple(sizes)


def hierarchy(
    vectors: Tensor, sizes: Sequence[int], *, iters: int = 20, resampling: int = 3, seed: int = 0, device: str = "auto"
) -> list[Level]:
    """Cluster vectors, then the centres, and so on.

    Args:
        vectors: (n, d).
        sizes: Clusters of each level, falling.
        iters: Iterations of k-means.
        resampling: Times each level above the first is made again.
        seed: Of the starts.
        device: Where to compute.
    """
    where = torch_device(device)

    points, levels = vectors, list[Level]()

    def clustered(points: Tensor, size: int) -> KMeansResult:
        with warnings.catch_warnings():
            # Few points to a cluster are what is wanted here.
            warnings.filterwarnings("ignore", message=".*fewer than 39 each")
            # At random two of a few large clusters would often begin in one; among many small ones it does not matter.
            init: Literal["random", "kmeans++"] = "kmeans++" if levels else "random"
            return kmeans(points, size, iters=iters, seed=seed, init=init, device=where, distributed=False)

    meter = Meter("clusters", len(sizes), unit="level")
    for number, size in enumerate(sizes):
        result = clustered(points, size)
        centres, member_of = result.centroids.cpu(), NearestCentroids(result.centroids).search(points).cpu()
        for _ in range(resampling if number else 0):
            near = _nearest_members(points, centres, member_of)
            if len(near) < size:
                break
            again = clustered(points[near], size)
            centres, member_of = again.centroids.cpu(), NearestCentroids(again.centroids).search(points).cpu()
        levels.append(Level(centres, member_of.numpy()))
        points = centres
        meter.reach(number + 1)
    meter.close()
    return levels


def _nearest_members(points: Tensor, centres: Tensor, member_of: Tensor) -> Tensor:
    """Return the numbers of the points next to their centre, `NEAREST` of each cluster."""
    distance = (points - centres[member_of]).square().sum(1)
    order = torch.from_numpy(np.lexsort((distance.numpy(), member_of.numpy())))
    sorted_members = member_of[order]
    first = torch.searchsorted(sorted_members, sorted_members)
    return order[torch.arange(len(order)) - first < NEAREST].sort().values


def balanced(levels: Sequence[Level], count: int, seed: int) -> np.ndarray:
    """Return the numbers of images, ascending: equal shares for the clusters of the top, dealt out level by level.

    Where a cluster holds less than its share the others get the rest; within those of the first level images are drawn
    at random.
    """
    generator = np.random.default_rng(seed)
    holds = [np.bincount(levels[0].member_of, minlength=len(levels[0].centres))]
    for level in levels[1:]:
        holds.append(np.bincount(level.member_of, weights=holds[-1], minlength=len(level.centres)).astype(np.int64))
    quota = shares(holds[-1], count, generator)
    for number in range(len(levels) - 1, 0, -1):
        below = np.zeros(len(holds[number - 1]), dtype=np.int64)
        for cluster, share in enumerate(quota):
            members = np.flatnonzero(levels[number].member_of == cluster)
            if len(members):
                below[members] = shares(holds[number - 1][members], int(share), generator)
        quota = below
    order = generator.permutation(len(levels[0].member_of))
    by_cluster = order[np.argsort(levels[0].member_of[order], kind="stable")]
    starts = np.cumsum(holds[0]) - holds[0]
    return np.sort(np.concatenate([by_cluster[at : at + share] for at, share in zip(starts, quota, strict=True)]))


def shares(holds: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return how many to take of each cluster: the same of all, but for what a cluster does not hold.

    >>> shares(np.array([2, 100, 100]), 20, np.random.default_rng(0)).tolist()
    [2, 9, 9]
    """
    taken = np.zeros(len(holds), dtype=np.int64)
    left = min(count, int(holds.sum()))
    while left:
        open_ = np.flatnonzero(taken < holds)
        each = left // len(open_)
        if each == 0:
            taken[generator.permutation(open_)[:left]] += 1
            break
        more = np.minimum(each, holds[open_] - taken[open_])
        taken[open_] += more
        left -= int(more.sum())
    return taken


def effective(counts: np.ndarray) -> float:
    """Return the exponential of the entropy of counts: the number of clusters if all were as large."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
