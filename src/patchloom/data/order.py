"""Which image comes when: the order of an epoch as a pure function of seed, epoch, rank and world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Slot(NamedTuple):
    """One place in a batch."""

    epoch: int
    turn: int
    """How often the image came before, within this epoch."""
    image: int
    """Index of the image within the source."""


def draw_seed(seed: int, epoch: int, turn: int, image: int | str) -> int:
    """Return the seed of one image's augmentation draws in one epoch: a hash, so neighbours share nothing."""
    text = f"{seed}/{epoch}/{turn}/{image}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Steps:
    """How the images of an epoch divide into batches of equal number on every rank.

    All ranks cut the same global sequence: at each step rank r takes places `r·b … r·b + b` of the next
    `world_size · b`, so one process with batch 2b and two processes with batch b see the same global batch.

    Args:
        num_images: Images in the source.
        batch_size: Images per batch and rank.
        shuffle: Training: the last global batch is filled up to a multiple of the ranks, so that all ranks have as
            many batches and equally large ones. Without it: every image once, in order, the last global batch
            shared out as evenly as it goes (a rank may have one batch fewer when there are fewer images left than
            ranks).
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave out an incomplete last global batch, unless it is the only one.
        epoch_length: Images per epoch over all ranks; None: `num_images`. With `shuffle` an epoch may be longer
            than the source: it then goes through it several times. Without, it can only be shorter.
        accumulate: Batches that make one step; with `drop_last` those that do not fill one are left out, unless there
            are no more.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        epoch_length: int | None = None,
        accumulate: int = 1,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.length = num_images if epoch_length is None else epoch_length
        if not shuffle:
            self.length = min(self.length, num_images)
        self.full, self.rest = divmod(self.length, world_size * batch_size)
        if drop_last and self.full:
            self.rest = 0
            if self.full >= accumulate:
                self.full -= self.full % accumulate

    @property
    def num_batches(self) -> int:
        """Batches of this rank in an epoch."""
        low, high = self.last_share()
        return self.full + (high > low)

    @property
    def total(self) -> int:
        """Images of an epoch over all ranks: `length`, less what is left out or with what is repeated."""
        even = -(-self.rest // self.world_size) * self.world_size
        return self.full * self.world_size * self.batch_size + (even if self.shuffle else self.rest)

    @property
    def left_out(self) -> int:
        """Images of the source that an epoch leaves out."""
        return max(0, self.num_images - self.total)

    @property
    def repeated(self) -> int:
        """Places of an epoch that are taken by images which came before."""
        return max(0, self.total - self.num_images)

    def last_share(self) -> tuple[int, int]:
        """Return the places, within the last global batch, that are this rank's."""
        if self.shuffle:
            each = -(-self.rest // self.world_size)
            return self.rank * each, (self.rank + 1) * each
        return (
            self.rest * self.rank // self.world_size,
            self.rest * (self.rank + 1) // self.world_size,
        )


class EpochOrder(Steps):
    """The batches of one rank, of images by index.

    With `shuffle` every epoch has a new permutation, and what the last global batch lacks of a multiple of the ranks
    is taken from its start; for the rest see `Steps`.

    Args:
        num_images: Images in the source.
        batch_size: Images per batch and rank.
        seed: Seed of the permutations.
        shuffle: Training, see `Steps`, like all that follow but the last.
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave out an incomplete last global batch.
        epoch_length: Images per epoch over all ranks.
        accumulate: Batches that make one step.
        repeats: With `shuffle`, how often each image comes in a row, each time augmented anew (repeated augmentation,
            arXiv 1901.09335); the epoch stays as long, so it goes through one part in `repeats` of the source.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        epoch_length: int | None = None,
        accumulate: int = 1,
        repeats: int = 1,
    ) -> None:
        super().__init__(
            num_images,
            batch_size,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            epoch_length=epoch_length,
            accumulate=accumulate,
        )
        self.seed = seed
        self.repeats = repeats
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Slot]]:
        """Yield the batches of `epoch` from number `start` on; earlier ones cost nothing."""
        per_step = self.world_size * self.batch_size
        for step in range(start, self.num_batches):
            if step < self.full:
                low = step * per_step + self.rank * self.batch_size
                places = np.arange(low, low + self.batch_size)
            else:
                places = self.full * per_step + np.arange(*self.last_share())
            yield self._slots(epoch, places % self.length)

    def _slots(self, epoch: int, places: np.ndarray) -> list[Slot]:
        if not self.shuffle:
            return [Slot(epoch, 0, int(index)) for index in places % self.num_images]
        firsts, copies = np.divmod(places, self.repeats)
        turns, within = np.divmod(firsts, self.num_images)
        return [
            Slot(epoch, turn * self.repeats + copy, int(self._permutation(epoch, turn)[place]))
            for turn, copy, place in zip(turns.tolist(), copies.tolist(), within.tolist(), strict=True)
        ]

    def _permutation(self, epoch: int, turn: int) -> np.ndarray:
        if (epoch, turn) not in self._permutations:
            # Two at most: the one in use, and the one a batch crosses into (or wraps back to).
            while len(self._permutations) > 1:
                self._permutations.pop(next(iter(self._permutations)))
            small = self.num_images < 2**31
            order = np.arange(self.num_images, dtype=np.int32 if small else np.int64)
            np.random.default_rng(draw_seed(self.seed, epoch, turn, "order")).shuffle(order)
            self._permutations[epoch, turn] = order
        return self._permutations[epoch, turn]
