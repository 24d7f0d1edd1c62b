"""Which image of a stream is read when, and by whom: every image once, whatever the shards' sizes.

The shards stand in one line, in a new order each epoch, and each reader (worker of a rank) is given a stretch of
it that is as long as the batches it makes. So a stretch begins and ends within a shard where that makes them even,
and each shard is still read from front to back, by as few readers as possible.

Where the images do not come out even with the steps, an epoch leaves some out or goes through some once more. Which
ones moves on from epoch to epoch, so that no image falls behind another by more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from patchloom.data.order import Steps, draw_seed

GOLDEN = 0.6180339887


class Visit(NamedTuple):
    """Images of one shard, to be read from front to back."""

    turn: int
    """How often the images came before, within this epoch."""
    shard: int
    numbers: np.ndarray
    """(k,) int64 numbers of the images within the shard, ascending."""


class Reading(NamedTuple):
    """What one reader reads, and in which order it lets it out."""

    visits: Iterator[Visit]
    """The reader's images, in the order in which they are read."""
    order: ShuffleBuffer
    """Places among them, in the order in which they are let out."""


class ShuffleBuffer(Iterator[int]):
    """The order in which a shuffle buffer lets out the places 0 … count - 1, each once.

    The buffer holds the first `size` places; each time, one of those held is let out at random and the next one
    takes its seat. So place i never comes out as number i - size or earlier.

    Attributes:
        held: Places in the buffer.
        coming: The place that comes in next; those before it are held, or out.
    """

    def __init__(self, count: int, size: int, rng: np.random.Generator) -> None:
        self.count = count
        self.held = list(range(min(size, count)))
        self.coming = len(self.held)
        self._rng = rng
        self._draws: list[float] = []

    def __next__(self) -> int:
        """Return the place that is let out next."""
        if not self.held:
            raise StopIteration
        if not self._draws:
            self._draws = self._rng.random(1024).tolist()
        seat = int(self._draws.pop() * len(self.held))
        place = self.held[seat]
        if self.coming < self.count:
            self.held[seat] = self.coming
            self.coming += 1
        else:
            self.held[seat] = self.held[-1]
            self.held.pop()
        return place


class Line:
    """The images of one epoch, shard after shard.

    Args:
        sizes: Images of each shard.
        total: Places in the line. Fewer than there are images: some are left out. More: the line goes through
            the shards again, each time in another order, and the last time through as many as are called for.
        epoch: Number of the epoch.
        seed: Seed of the shards' order.
        shuffle: Shuffle the shards, and begin within the first of them; otherwise they come as they are named.
    """

    def __init__(self, sizes: Sequence[int], total: int, *, epoch: int, seed: int, shuffle: bool) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.firsts = np.cumsum(self.sizes) - self.sizes
        self.total = total
        self.epoch = epoch
        self.seed = seed
        self.shuffle = shuffle
        self.num_images = int(self.sizes.sum())

    def visits(self, low: int, high: int, mine: Callable[[np.ndarray], np.ndarray] | None = None) -> Iterator[Visit]:
        """Yield the images at the places `low` to `high`, of those only the ones whose place `mine` says yes to."""
        end = 0
        for turn, shard, first, last in self._runs():
            if end >= high:
                return
            part = self._takes_part(turn, shard, first, last)
            size = last - first if part is None else int(part.sum())
            start, end = end, end + size
            if end <= low or not size:
                continue
            numbers = np.arange(first, last) if part is None else first + np.flatnonzero(part)
            numbers = numbers[max(0, low - start) : high - start]
            if mine is not None:
                numbers = numbers[mine(max(start, low) + np.arange(len(numbers)))]
            if len(numbers):
                yield Visit(turn, shard, numbers)

    def _runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (turn, shard, first image, end) along the line."""
        for turn in range(-(-self.total // self.num_images)):
            shards = np.arange(len(self.sizes))
            cut = 0
            if self.shuffle:
                rng = np.random.default_rng(draw_seed(self.seed, self.epoch, turn, "shards"))
                rng.shuffle(shards)
                # The line begins within a shard: stretches end at other images each time, even of a single shard.
                cut = int(rng.random() * self.sizes[shards[0]])
            yield turn, int(shards[0]), cut, int(self.sizes[shards[0]])
            for shard in shards[1:].tolist():
                yield turn, shard, 0, int(self.sizes[shard])
            yield turn, int(shards[0]), 0, cut

    def _takes_part(self, turn: int, shard: int, first: int, last: int) -> np.ndarray | None:
        """Return which images of a run are in the line, None for all: where it is no whole number of passes.

        The images have places on a circle, neighbours far apart; each epoch takes the next `wanted` along it.
        """
        wanted = self.total - turn * self.num_images
        if wanted >= self.num_images:
            return None
        index = int(self.firsts[shard]) + np.arange(first, last)
        if not self.shuffle:
            return index < wanted
        stride = _coprime(self.num_images)
        begin = (self.epoch * wanted + draw_seed(self.seed, 0, turn, "circle")) % self.num_images
        place = index * pow(stride, -1, self.num_images) % self.num_images
        return (place - begin) % self.num_images < wanted


class StreamOrder(Steps):
    """The batches of one rank from a stream: batch k is made of the images of lane k mod lanes.

    In training a lane is a stretch of the line, shuffled for itself. Without shuffling the lanes take the line's
    batches in turn, so that the images come in order, whatever the number of lanes. As many lanes as there are
    workers give each worker one; other numbers give the same batches at more reading.

    Args:
        sizes: Images of each shard.
        batch_size: Images per batch and rank.
        seed: Seed of the order.
        lanes: Readings into which a rank's part is divided, at least 1.
        buffer_size: Images among which the next one is drawn.
        **steps: What `Steps` takes.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, *, seed: int, lanes: int, buffer_size: int, **steps: Any
    ) -> None:
        super().__init__(sum(sizes), batch_size, **steps)
        self.sizes = sizes
        self.seed = seed
        self.lanes = lanes
        self.buffer_size = buffer_size

    def reading(self, epoch: int, lane: int) -> Reading:
        """Return the images of a lane's batches in an epoch."""
        line = Line(self.sizes, self.total, epoch=epoch, seed=self.seed, shuffle=self.shuffle)
        stream = self.rank * self.lanes + lane
        rng = np.random.default_rng(draw_seed(self.seed, epoch, 0, f"buffer {stream}"))
        count = self._count(lane)
        if not self.shuffle:
            visits = line.visits(0, self.total, lambda places: self._in_lane(places, lane))
            return Reading(visits, ShuffleBuffer(count, 1, rng))
        # Training gives every rank as much.
        each = [self._count(other) for other in range(self.lanes)]
        low = self.rank * sum(each) + sum(each[:lane])
        return Reading(line.visits(low, low + count), ShuffleBuffer(count, self.buffer_size, rng))

    def _count(self, lane: int) -> int:
        """Return how many images the batches of a lane hold."""
        low, high = self.last_share()
        last = high - low if self.full % self.lanes == lane else 0
        return len(range(lane, self.full, self.lanes)) * self.batch_size + last

    def _in_lane(self, places: np.ndarray, lane: int) -> np.ndarray:
        """Return which places of the line are in batches of this rank and lane."""
        step, within = np.divmod(places, self.world_size * self.batch_size)
        low, high = self.last_share()
        first = np.where(step < self.full, self.rank * self.batch_size, low)
        end = np.where(step < self.full, (self.rank + 1) * self.batch_size, high)
        return (step % self.lanes == lane) & (within >= first) & (within < end)


def _coprime(number: int) -> int:
    """Return a stride that leads around a circle of `number` places through all of them, neighbours far apart."""
    stride = max(1, round(GOLDEN * number))
    while gcd(stride, number) > 1:
        stride += 1
    return stride
