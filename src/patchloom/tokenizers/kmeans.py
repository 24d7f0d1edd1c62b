"""Exact Lloyd k-means for many points in many dimensions, in bounded memory, on one device or several ranks.

Objective, start and treatment of empty clusters follow faiss's `Clustering`, with which CCViT's codebooks were made
(arXiv 2303.04664 and its published code): the objective of an iteration is the sum of squared distances at its
assignment step, before the centroids move; an empty cluster takes half of a big one.

Assignments are exact (see `nearest`); sums of points and the objective are accumulated in float64. Sums are corrected
for the points that changed cluster rather than computed anew, which in float64 loses nothing and is soon a small
share of the work.

>>> import torch
>>> points = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
>>> result = kmeans(points, 2, iters=5, init=torch.tensor([[0.0], [1.0]]))
>>> result.centroids.tolist(), result.counts.tolist(), result.objective[-1]
([[0.5], [9.5]], [2, 2], 1.0)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UsageError, unknown_name
from patchloom.tokenizers.nearest import NearestCentroids, as_float, in_threads
from patchloom.tokenizers.points import Points, Ranks, as_points, check_finite

# faiss's threshold: with fewer points per centroid the codebook describes the sample rather than the images.
MIN_POINTS_PER_CENTROID = 39
# faiss: the two halves of a split cluster lie this share apart, in opposite senses in even and odd dimensions.
_SPLIT = 1 / 1024
# Draws made at once when clusters to split are looked for.
_DRAWS_AHEAD = 100_000
# Points converted to float64 at once.
_SUM_ROWS = 4096
# Dimensions one thread sums.
_SUM_COLUMNS = 96

Progress = Callable[[int, int, float], None]
"""Called after every iteration with (iterations done, iterations in all, objective)."""


@dataclass(frozen=True)
class KMeansResult:
    """What k-means found."""

    centroids: Tensor
    """(k, d) float32, after the last iteration's update."""
    objective: list[float]
    """Sum of squared distances to the nearest centroid, one per iteration, before that iteration's update."""
    counts: Tensor
    """(k,) int64, points per cluster at the last assignment, before empty clusters were given points."""
    repaired: int
    """Empty clusters that were given half of another one, over all iterations."""


@torch.inference_mode(False)  # threads, which add to the sums, do not inherit the caller's mode
@torch.no_grad()
def kmeans(
    points: Tensor | np.ndarray | str | Path | Points,
    k: int,
    *,
    iters: int = 20,
    seed: int = 1,
    init: Literal["random", "kmeans++"] | Tensor = "random",
    device: str | torch.device | None = None,
    memory_mb: int = 256,
    distributed: bool = True,
    progress: Progress | None = None,
) -> KMeansResult:
    """Cluster points by Lloyd's algorithm.

    When `torch.distributed` is initialised, every rank calls this with its own points and gets the same result, the
    one a single process finds on the ranks' points laid end to end.

    Args:
        points: (n, d) float or uint8 (fractions of 255), a `.npy` file of such, or anything with the methods of
            `Points`; only blocks of it are copied.
        k: Number of clusters.
        iters: Iterations; once no point changes cluster the rest is skipped, with its objective filled in.
        seed: Of the start.
        init: "random": k random points, no two alike. "kmeans++": each next one drawn with probability proportional
            to its squared distance from those before, on a sample of points. Or a (k, d) tensor to start from.
        device: Where to compute; default: where the points are.
        memory_mb: Mebibytes for blocks of points in float32 and float64, apart from the points themselves, the
            assignments (4 bytes per point) and some tables of the codebook's size.
        distributed: Work with the other ranks when `torch.distributed` is initialised; False when this process
            alone makes the call.
        progress: Called after every iteration.

    Raises:
        UsageError: Too few points, or too few distinct ones, for k clusters; NaN among them; a start of another
            shape.
    """
    source, ranks = as_points(points), Ranks(distributed)
    n, d = source.shape
    total = ranks.total(n)
    _check(total, k, iters)
    where = torch.device(device) if device is not None else _device_of(points)
    generator = torch.Generator().manual_seed(seed)
    centroids = _start(source, ranks, total, k, init, generator).to(where)

    state = _Sums(k, d, where)
    assigned = torch.full((n,), -1, dtype=torch.int32, device=where)
    rows = min(max(memory_mb * 2**20 // (16 * d), 1024), 65536)
    objective: list[float] = []
    repaired, search = 0, NearestCentroids(centroids)
    for iteration in range(iters):
        search.update(centroids)
        moved = 0
        start = 0
        for block in source.blocks(rows):
            part = slice(start, start + len(block))
            batch = as_float(block.to(where, non_blocking=True))
            if iteration == 0:
                check_finite(batch, start)
            before = assigned[part].long()
            after = search.search(batch, guess=before if iteration else None)
            moved += state.move(batch, before, after)
            assigned[part] = after.int()
            start += len(block)
        sums, counts, squares = state.sums, state.counts.clone(), state.squares
        ranks.reduce(sums, counts, squares)
        objective.append(_objective(centroids.double(), sums, counts, squares))
        if progress is not None:
            progress(iteration + 1, iters, objective[-1])
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids.double()).float()
        splits = _split_big_clusters(centroids, sums, counts, squares)
        repaired += splits
        if not splits and not ranks.total(moved):
            objective += objective[-1:] * (iters - len(objective))
            break
    empty = int((counts == 0).sum()) - splits
    if empty:
        warnings.warn(f"{empty} of {k} clusters hold no point and there was nothing to split", stacklevel=2)
    return KMeansResult(centroids, objective, counts.long(), repaired)


class _Sums:
    """Number, sum and squared length of the points of every cluster, in float64.

    Kept for blocks of dimensions, each of which one thread at a time adds to.
    """

    def __init__(self, k: int, d: int, device: torch.device) -> None:
        self._columns = [slice(start, min(start + _SUM_COLUMNS, d)) for start in range(0, d, _SUM_COLUMNS)]
        self._sums = [
            torch.zeros(k, part.stop - part.start, dtype=torch.float64, device=device) for part in self._columns
        ]
        self._squares = torch.zeros(len(self._columns), k, dtype=torch.float64, device=device)
        self.counts = torch.zeros(k, dtype=torch.float64, device=device)

    @property
    def sums(self) -> Tensor:
        """(k, d), a new tensor."""
        return torch.cat(self._sums, 1)

    @property
    def squares(self) -> Tensor:
        """(k,), a new tensor."""
        return self._squares.sum(0)

    def move(self, points: Tensor, before: Tensor, after: Tensor) -> int:
        """Move points between clusters, `before` -1 meaning from nowhere; return how many moved."""
        changed = (before != after).nonzero()[:, 0]
        before, after = before[changed], after[changed]
        known = (before >= 0).nonzero()[:, 0]
        ones = torch.ones(len(changed), dtype=torch.float64, device=points.device)
        self.counts.index_add_(0, after, ones)
        self.counts.index_add_(0, before[known], ones[known], alpha=-1)

        def work(block: int) -> None:
            columns = points[:, self._columns[block]]
            for start in range(0, len(changed), _SUM_ROWS):
                part = slice(start, start + _SUM_ROWS)
                batch = columns[changed[part]].double()
                self._add(block, after[part], batch, 1)
                if len(known):
                    old = before[part] >= 0
                    self._add(block, before[part][old], batch[old], -1)

        if len(changed):
            in_threads(work, range(len(self._columns)), points.device)
        return len(changed)

    def _add(self, block: int, cluster: Tensor, points: Tensor, sign: int) -> None:
        self._sums[block].index_add_(0, cluster, points, alpha=sign)
        self._squares[block].index_add_(0, cluster, points.square().sum(1), alpha=sign)


def _objective(centroids: Tensor, sums: Tensor, counts: Tensor, squares: Tensor) -> float:
    """Sum over points of |x - c|² = |x|² - 2 x·c + |c|², gathered by cluster; all float64."""
    per_cluster = squares - 2 * (sums * centroids).sum(1) + counts * centroids.square().sum(1)
    return max(float(per_cluster.sum()), 0.0)


def _split_big_clusters(centroids: Tensor, sums: Tensor, counts: Tensor, squares: Tensor) -> int:
    """Give every empty cluster half of another one, in place; return how many were.

    As faiss, draw for draw, so that both make the same choices: the clusters are gone through in turn, one of size s
    being taken with probability (s - 1) / (n - k); both halves get its centroid with the dimensions scaled by
    1 ± 1/1024 in opposite senses, and share its count. Unlike faiss, clusters of equal points are passed over: one
    half of such a cluster would be empty again (flat black patches make them).
    """
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if not empty:
        return 0
    sizes = counts.float().cpu().numpy()
    spread = (squares - sums.square().sum(1) / counts.clamp(min=1)).cpu()
    splittable = (spread > 1e-9 * squares.cpu()).numpy()
    rest = max(int(counts.sum()) - len(counts), 1)
    scale = torch.full((centroids.shape[1],), 1 + _SPLIT, device=centroids.device)
    scale[1::2] = 1 - _SPLIT
    draws, done = _Draws(), 0
    for cluster in empty:
        chance = np.where(splittable, (sizes - 1) / np.float32(rest), 0).astype(np.float32)
        if not (chance > 0).any():
            break
        big = draws.first_success(chance)
        centroids[cluster] = centroids[big] * scale
        centroids[big] *= 2 - scale
        sizes[cluster] = sizes[big] / 2
        sizes[big] -= sizes[cluster]
        splittable[cluster] = True
        done += 1
    return done


class _Draws:
    """faiss's stream of uniform draws for splitting: C++'s mt19937(1234), as float32 in [0, 1]."""

    def __init__(self) -> None:
        self._generator = np.random.MT19937()
        self._generator._legacy_seeding(1234)
        self._ahead = np.empty(0, np.float32)

    def first_success(self, chance: np.ndarray) -> int:
        """Go round trials of these chances, one draw each, until one succeeds; return its number."""
        while True:
            if len(self._ahead) < len(chance):
                raw = self._generator.random_raw(max(len(chance), _DRAWS_AHEAD)).astype(np.float32)
                self._ahead = np.concatenate([self._ahead, raw / np.float32(2**32 - 1)])
            hits = np.flatnonzero(self._ahead[: len(chance)] < chance)
            # draws after the success belong to the next cluster
            self._ahead = self._ahead[hits[0] + 1 if len(hits) else len(chance) :]
            if len(hits):
                return int(hits[0])


def _start(source: Points, ranks: Ranks, total: int, k: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
    """Return (k, d) float32 centroids to start from, on the CPU."""
    if isinstance(init, Tensor):
        if tuple(init.shape) != (k, source.shape[1]):
            raise UsageError(
                f"a start for {k} centroids of {source.shape[1]} dimensions has shape ({k}, {source.shape[1]}), "
                f"not {tuple(init.shape)}"
            )
        return init.detach().float().cpu().clone()
    if init not in ("random", "kmeans++"):
        raise unknown_name("start of k-means", init, ("random", "kmeans++"))
    order = torch.randperm(total, generator=generator)
    if init == "kmeans++":
        sample = ranks.take(source, order[: min(total, max(8 * k, 20_000))])
        check_finite(sample, 0)
        chosen = _plus_plus(sample, k, generator)
    else:
        chosen = torch.empty(0, source.shape[1])
    return _fill_up(chosen, source, ranks, order, k)


def _fill_up(chosen: Tensor, source: Points, ranks: Ranks, order: Tensor, k: int) -> Tensor:
    """Add points in the given order until there are k, passing over those equal to one already there."""
    distinct = {row.tobytes() for row in (chosen + 0.0).numpy()}
    rows = list(chosen)
    for batch in order.split(max(k, 1024)):
        if len(rows) >= k:
            break
        points = ranks.take(source, batch) + 0.0  # no negative zeros, which compare equal and look different
        check_finite(points, 0)
        for point in points:
            key = point.numpy().tobytes()
            if key not in distinct and len(rows) < k:
                distinct.add(key)
                rows.append(point)
    if len(rows) < k:
        raise UsageError(
            f"k = {k} clusters need as many different points, but only {len(rows)} of the {len(order)} points differ; "
            f"take k <= {len(rows)} or more images"
        )
    return torch.stack(rows)


def _plus_plus(sample: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw up to k points, each with probability proportional to its squared distance from those drawn before.

    Drawn in batches: from the distances at the start of a batch, accepting a draw with the probability that its
    distance has not been shortened by the ones accepted before it in the same batch. That is the same distribution.
    Fewer than k are returned when all points coincide with one drawn, within rounding.
    """
    first = int(torch.randint(len(sample), (1,), generator=generator))
    centred = sample - sample.mean(0)
    square = centred.square().sum(1)
    chosen = [first]
    distance = _distance_to(centred, square, torch.tensor([first]))[:, 0]
    while len(chosen) < k and float(distance.sum()) > 0:
        batch = min(max(len(chosen) // 4, 1), 512)
        draws = torch.multinomial(distance.double(), batch, replacement=True, generator=generator)
        chance = torch.rand(batch, generator=generator) * distance[draws]
        between = _distance_to(centred[draws], square[draws], torch.arange(batch))
        accepted: list[int] = []
        for number in range(batch):
            nearest_new = between[number, accepted].min() if accepted else torch.inf
            if chance[number] < min(float(distance[draws[number]]), float(nearest_new)):
                accepted.append(number)
        accepted = accepted[: k - len(chosen)]
        new = draws[accepted]
        chosen += new.tolist()
        for part in new.split(256):
            distance = torch.minimum(distance, _distance_to(centred, square, part).amin(1))
    return sample[chosen]


def _distance_to(centred: Tensor, square: Tensor, chosen: Tensor) -> Tensor:
    """Return (n, len(chosen)) squared distances to some of the points, those within rounding of zero as zero."""
    scale = square[:, None] + square[chosen]
    distance = torch.addmm(scale, centred, centred[chosen].T, alpha=-2)
    return torch.where(distance > 1e-6 * scale, distance, 0)


def _check(total: int, k: int, iters: int) -> None:
    if k < 1 or iters < 1:
        raise UsageError(f"k-means takes at least one cluster and one iteration, not k = {k} and iters = {iters}")
    if k > total:
        raise UsageError(f"k = {k} clusters need at least {k} points, but there are {total}; take a smaller k")
    if total < MIN_POINTS_PER_CENTROID * k:
        warnings.warn(
            f"{total} points for k = {k} clusters are fewer than {MIN_POINTS_PER_CENTROID} each: the codebook will "
            "follow the sample; take more images or a smaller k",
            stacklevel=3,
        )


def _device_of(points: object) -> torch.device:
    return points.device if isinstance(points, Tensor) else torch.device("cpu")
