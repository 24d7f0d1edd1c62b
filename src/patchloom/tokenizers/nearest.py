"""Exact nearest-centroid search: what k-means and the centroid tokenizer spend their time on.

The nearest centroid c of a point x has the highest score x·c - |c|²/2. Computing it for every pair costs one
(points, k) matrix product over all d dimensions. Image patches do not need that: nearly all that tells their
centroids apart lies in a few dozen directions. With R an orthonormal basis of the leading r directions of the
codebook, and the remainders x⊥ = x - RRᵀx, c⊥ likewise, the Cauchy-Schwarz inequality bounds the score from above:

    x·c - |c|²/2  <=  (Rᵀx)·(Rᵀc) + |x⊥||c⊥| - |c|²/2

The right-hand side is one product over r + 1 dimensions. Centroids whose bound lies below the score of one good
guess cannot be the nearest; the few that are left (one or two per patch) are compared by their distance itself.
The same inequality carries the rounding errors of float32 (`_ROUNDING`), so that no centroid is passed over
because of them. The answer is the centroid of least float32 distance, the lowest index among equals, whatever
the rank r, the chunk or the batch. Points without such structure are searched at full rank.

>>> import torch
>>> centroids = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
>>> NearestCentroids(centroids).search(torch.tensor([[0.9, 0.8], [0.1, 0.2], [0.5, 0.5]]))
tensor([1, 0, 0])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UsageError

# Relative error allowed for in a float32 inner product of up to some thousand terms: about 64 roundings.
_ROUNDING = 4e-6
# Centroids are screened in groups of this many by their highest bound; a row of a group is one cache line pair.
_GROUP = 64
# Re-comparing one pair costs as much as this many multiply-adds of the screening product, per element.
_PAIR_COST = 24
# Finding a rank to screen at costs some 100 ms of work. It is done once the points searched so far amount to this many
# multiply-adds at full rank, and again, for a table that has changed since, whenever they have grown by the factor.
_WORTH_CHOOSING, _CHOOSE_AGAIN = 1e10, 8
_RANKS = (32, 64, 128, 256)
_PAIRS_AT_ONCE = 1024


class NearestCentroids:
    """Search structure over one codebook.

    Args:
        centroids: (k, d) float32, finite; rows may repeat.
        rank: Number of leading directions to screen in; None finds out what is cheapest, once enough points came by.
        basis: (d, d) orthonormal columns by decreasing importance; None: the codebook's principal directions. Any
            orthonormal basis gives the same answer.

    Raises:
        UsageError: The centroids hold NaN or infinity, or are no matrix.
    """

    def __init__(self, centroids: Tensor, *, rank: int | None = None, basis: Tensor | None = None) -> None:
        if centroids.ndim != 2 or not len(centroids):
            raise UsageError(f"centroids are a matrix (k, d), not a tensor of shape {tuple(centroids.shape)}")
        self._basis = basis
        self._rank = centroids.shape[1] if rank is None else min(rank, centroids.shape[1])
        self._due = _WORTH_CHOOSING if rank is None and centroids.shape[1] >= 2 * _RANKS[0] else math.inf
        self._searched = 0
        self._idle: list[_Buffers] = []
        self.update(centroids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, centroids: Tensor) -> None:
        """Search other centroids of the same shape, as k-means does after every iteration; keeps what was learnt.

        Raises:
            UsageError: The centroids hold NaN or infinity.
        """
        if not bool(torch.isfinite(centroids).all()):
            raise UsageError("the centroids hold NaN or infinite values; fit the codebook again")
        centroids = centroids.detach().float()
        self.num_centroids, self.dim = centroids.shape
        self._original = _first_of_equals(centroids)
        self._centroids = centroids[self._original]
        self._mean = self._centroids.double().mean(0).float()
        self._centred = self._centroids - self._mean
        self._square = self._centred.square().sum(1)
        self._screens: dict[int, _Screen] = {}
        self._changed = True

    @property
    def rank(self) -> int:
        """Number of directions the screening uses; the dimension of the points when it does not pay."""
        return self._rank

    @property
    def num_distinct(self) -> int:
        """Number of centroids that are not equal to an earlier one."""
        return len(self._centroids)

    @torch.inference_mode(False)  # scratch memory outlives the caller's mode, and threads do not inherit it
    @torch.no_grad()
    def search(self, points: Tensor, guess: Tensor | None = None) -> Tensor:
        """Return the index of the nearest centroid of every point.

        Args:
            points: (n, d), any real type on any device; uint8 stands for 0 … 255 divided by 255.
            guess: (n,) int64 indices supposed to be near (last iteration's); saves time, never changes the answer.

        Returns:
            (n,) int64 on the centroids' device; points with NaN get index k, which is out of range.
        """
        device = self._centroids.device
        # an index past the end of `original` means: no candidate, the point was NaN
        original = torch.cat([self._original, self._original.new_tensor([self.num_centroids])])
        ids = torch.empty(len(points), dtype=torch.int64, device=device)
        guess = None if guess is None else guess.to(device)
        self._searched += len(points)
        step = self._chunk(len(points))

        def work(start: int) -> None:
            part = slice(start, start + step)
            with torch.no_grad(), self._spare_buffers() as buffers:
                chunk = as_float(points[part].to(device, non_blocking=True))
                near = None if guess is None else guess[part]
                ids[part] = original[self._nearest(chunk, near, self._rank, buffers)]

        with exact_float32(device):
            if self._changed and self._searched * self.num_centroids * self.dim > self._due:
                sample = as_float(points[:256].to(device))
                with one_thread():
                    self._choose_rank(sample, None if guess is None else guess[:256])
            in_threads(work, range(0, len(points), step), device)
        return ids

    def _chunk(self, points: int) -> int:
        """Points at once: chunk and bounds stay in a core's share of the cache (CPU) or in a gigabyte (GPU)."""
        row = 4 * (len(self._centroids) + self.dim)
        if self._centroids.device.type != "cpu":
            return max(2**30 // row, 256)
        return max(min(2**23 // row, -(-points // torch.get_num_threads())), 128)

    @contextmanager
    def _spare_buffers(self) -> Iterator[_Buffers]:
        """Lend scratch memory that no other thread is using."""
        buffers = self._idle.pop() if self._idle else _Buffers()
        try:
            yield buffers
        finally:
            self._idle.append(buffers)

    def _nearest(self, points: Tensor, guess: Tensor | None, rank: int, buffer: _Buffers) -> Tensor:
        """Return (n,) positions among the distinct centroids, screening at `rank` and above."""
        rows, columns = self._candidates(points, guess, rank, buffer)
        counts = torch.bincount(rows, minlength=len(points))
        nearest = torch.full((len(points),), len(self._centroids), device=points.device)
        nearest[rows] = columns  # right where one candidate is left; the others follow
        finer = self._finer(rank)
        if finer > rank:
            # where screening at the next rank is cheaper than comparing what this one left
            limit = max(len(self._centroids) * finer // (_PAIR_COST * self.dim), 2)
            crowded = (counts > limit).nonzero()[:, 0]
            if rank == self._rank and 2 * len(crowded) > len(points):
                self._rank = finer  # the first points were not typical of the rest
            if len(crowded):
                nearest[crowded] = self._nearest(points[crowded], None, finer, buffer)
            few = (counts > 1) & (counts <= limit)
        else:
            few = counts > 1
        several = few[rows]
        if bool(several.any()):
            rows, columns = rows[several], columns[several]
            nearest[rows] = self._closest(points, rows, columns, buffer)[rows]
        return nearest

    def _finer(self, rank: int) -> int:
        """The rank at which points are screened again that `rank` left many candidates for."""
        return 4 * rank if 8 * rank <= self.dim else self.dim

    def _candidates(self, points: Tensor, guess: Tensor | None, rank: int, buffer: _Buffers) -> tuple[Tensor, Tensor]:
        """Return (row, column) of all pairs that may be nearest, rows ascending, columns ascending in a row."""
        if rank not in self._screens:
            self._screens[rank] = self._make_screen(rank)
        centred = torch.sub(points, self._mean, out=buffer("centred", points, len(points), self.dim))
        leaders = buffer("leaders", points, len(points), self.dim)
        square = torch.mul(centred, centred, out=leaders).sum(1)
        bounds = self._screens[rank].bounds(centred, square, buffer)
        groups = bounds.view(len(points), -1, _GROUP)
        highest = groups.amax(2)
        if guess is None:
            group = highest.argmax(1)
            lead = group * _GROUP + groups[torch.arange(len(points), device=points.device), group].argmax(1)
            lead.clamp_(max=len(self._centroids) - 1)  # a row of NaN may point into the padding
        else:
            lead = self._unique_of(guess)
        lead_square = self._square[lead]
        score = torch.index_select(self._centred, 0, lead, out=leaders).mul_(centred).sum(1)
        # less what float32 may have added to the score of the guess
        score -= lead_square / 2 + _ROUNDING * ((square * lead_square).sqrt() + lead_square)
        rows, group = (highest >= score[:, None]).nonzero(as_tuple=True)
        hits = bounds.view(-1, _GROUP).index_select(0, rows * highest.shape[1] + group) >= score[rows, None]
        which, column = hits.nonzero(as_tuple=True)
        return rows[which], group[which] * _GROUP + column

    def _closest(self, points: Tensor, rows: Tensor, columns: Tensor, buffer: _Buffers) -> Tensor:
        """Return (len(points),) the column of least distance, the lowest among equals; rows without pair: k."""
        distance = torch.empty(len(rows), device=points.device)
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            shape = (len(rows[part]), self.dim)
            left, right = buffer("left", points, *shape), buffer("right", points, *shape)
            torch.index_select(points, 0, rows[part], out=left)
            left -= torch.index_select(self._centroids, 0, columns[part], out=right)
            distance[part] = left.square_().sum(1)
        least = distance.new_full((len(points),), torch.inf).scatter_reduce_(0, rows, distance, "amin")
        winners = distance == least[rows]
        nearest = torch.full((len(points),), len(self._centroids), device=points.device)
        return nearest.scatter_reduce_(0, rows[winners], columns[winners], "amin")

    def _unique_of(self, guess: Tensor) -> Tensor:
        """Positions of original indices among the distinct centroids (of any, where it is itself a repetition)."""
        if len(self._original) == self.num_centroids:
            return guess
        return torch.searchsorted(self._original, guess).clamp_(max=len(self._original) - 1)

    def _choose_rank(self, sample: Tensor, guess: Tensor | None) -> None:
        """Take the rank of least estimated work on a few points; the answer does not depend on it."""
        self._changed = False
        self._due *= _CHOOSE_AGAIN
        scatter = (self._centred.T @ self._centred).double()
        self._basis = torch.linalg.eigh(scatter).eigenvectors.flip(1).float().contiguous()
        self._rank, self._screens, buffers = self.dim, {}, _Buffers()
        k, best = len(self._centroids), float(self.dim) * len(self._centroids)
        for rank in (rank for rank in _RANKS if 2 * rank <= self.dim):
            counts = torch.bincount(self._candidates(sample, guess, rank, buffers)[0], minlength=len(sample))
            # a crowded point costs, at worst, comparisons with all centroids at the higher ranks
            pairs = (_PAIR_COST * self.dim * counts).clamp(max=2 * k * self.dim)
            work = (k + self.dim) * rank + float(pairs.float().mean())
            if work < best:
                best, self._rank = work, rank

    def _make_screen(self, rank: int) -> _Screen:
        k = len(self._centroids)
        padded = -(-k // _GROUP) * _GROUP
        basis = None if rank == self.dim or self._basis is None else self._basis[:, :rank].contiguous()
        part = self._centred if basis is None else self._centred @ basis
        remainder = _remainder(self._square, None if basis is None else part.square().sum(1))
        table = self._centred.new_zeros(padded, part.shape[1] + 1)
        table[:k, :-1], table[:k, -1] = part, remainder
        # the padding can never be a candidate; the bias is raised by what float32 may have taken off it
        bias = self._centred.new_full((padded,), -torch.inf)
        bias[:k] = -self._square / 2 * (1 - _ROUNDING)
        return _Screen(basis, table.T.contiguous(), bias)


class _Screen(NamedTuple):
    """Operands of the screening product at one rank r (basis None: all d directions)."""

    basis: Tensor | None  # (d, r)
    table: Tensor  # (r + 1, k padded): leading coordinates and length of the remainder of every centroid
    bias: Tensor  # (k padded)

    def bounds(self, centred: Tensor, square: Tensor, buffer: _Buffers) -> Tensor:
        """Return (n, k padded) upper bounds of the scores of centred points of squared length `square`."""
        coordinates = buffer("coordinates", centred, len(centred), len(self.table))
        if self.basis is None:
            coordinates[:, :-1] = centred
            coordinates[:, -1] = _remainder(square, None)
        else:
            part = torch.mm(centred, self.basis)
            coordinates[:, :-1] = part
            coordinates[:, -1] = _remainder(square, torch.linalg.vecdot(part, part))
        out = buffer("bounds", centred, len(centred), self.table.shape[1])
        return torch.addmm(self.bias, coordinates, self.table, out=out)


class _Buffers:
    """Scratch memory kept between chunks: allocating it anew costs as much as the arithmetic done in it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, template: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor of `shape`, valid until the same name is asked for again."""
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = template.new_empty(size)
        return self._held[name][:size].view(shape)


def _remainder(square: Tensor, leading: Tensor | None) -> Tensor:
    """Length of what the leading directions leave, lengthened so that the bound holds in float32.

    With e = `_ROUNDING`, sqrt(x⊥² + e x²) sqrt(c⊥² + e c²) >= |x⊥||c⊥| + e|x||c|: the second term is the error of the
    inner product. It also covers the cancellation in x⊥² = x² - |Rᵀx|².
    """
    rest = 0 if leading is None else (square - leading).clamp_(min=0)
    return (rest + _ROUNDING * square).sqrt()


def as_float(points: Tensor) -> Tensor:
    """Return points as float32; uint8 values become fractions of 255."""
    return points.float().div_(255) if points.dtype == torch.uint8 else points.float()


def _first_of_equals(centroids: Tensor) -> Tensor:
    """Return ascending int64 indices of the first of each set of equal rows."""
    rows = np.ascontiguousarray((centroids + 0.0).cpu().numpy())  # + 0.0: no negative zeros
    whole = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first = np.unique(whole, return_index=True)
    return torch.from_numpy(np.sort(first)).to(centroids.device)


def in_threads(work: Callable[[int], None], items: Sequence[int], device: torch.device) -> None:
    """Do pieces of work, on a CPU each piece in one thread rather than every operation in all threads.

    The operations of a piece are short. Run by all threads they would wait for the slowest at every one of them, which
    on a busy machine costs many times the work.
    """
    threads = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1
    if threads <= 1:
        for item in items:
            work(item)
        return
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations of this thread, and of threads started meanwhile, do not spread over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32: no autocast, and none of the reduced precisions a user may have set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
