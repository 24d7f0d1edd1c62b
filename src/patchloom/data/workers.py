"""What runs in a data worker: read images, replace or drop broken ones, transform, stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from patchloom.data.base import Sample, Source, StreamSource, Unreadable, UnreadableImageError
from patchloom.data.order import Slot, draw_seed
from patchloom.data.pixels import unit
from patchloom.errors import UsageError

Batch = dict[str, Any]
Transform = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
Skipped = list[tuple[str, str]]


class MapBatches(Dataset[Batch | UsageError]):
    """Reads the images of whole batches by index.

    Args:
        source: Images by index.
        transform: Run on every image.
        seed: Seed of the transform's draws.
        replace: Put the next readable image in a broken one's place; otherwise leave broken ones out.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, *, replace: bool) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.replace = replace
        # Broken images seen by this worker: a run of them is searched once, not in every epoch. What a batch
        # holds and reports is the same with and without it.
        self._broken: dict[int, tuple[str, str]] = {}

    def __getitems__(self, slots: Sequence[Slot]) -> Batch | UsageError:
        """Return the batch of these slots.

        A UsageError is returned, not raised: raised, it would reach the user wrapped in a worker's traceback.
        """
        try:
            return self._batch(slots)
        except UsageError as error:
            return error

    def _batch(self, slots: Sequence[Slot]) -> Batch:
        batch = _Assembly()
        for slot in slots:
            found = self._read(slot.image, batch.skipped)
            if found is not None:
                index, sample = found
                # The draws are the slot's: an image that stands in for another doesn't look the same twice.
                generator = _generator(self.seed, slot.epoch, slot.turn, slot.image)
                batch.add(self.transform(sample.image, generator), sample, index)
        return batch.stacked()

    def _read(self, index: int, skipped: Skipped) -> tuple[int, Sample] | None:
        total = len(self.source)
        for candidate in chain(range(index, total), range(index)):
            if candidate not in self._broken:
                try:
                    return candidate, self.source.read(candidate)
                except UnreadableImageError as error:
                    self._broken[candidate] = error.key, error.reason
            skipped.append(self._broken[candidate])
            if not self.replace:
                return None
        key, reason = self._broken[0]
        raise UsageError(f"no image of {self.source.name!r} is readable; the first is {key!r}: {reason}")


class StreamBatches(IterableDataset[Batch | UsageError | None]):
    """Reads this worker's part of a stream and yields finished batches.

    A batch is always made of `batch_size` consecutive images of the stream, broken ones included, so the place
    where a batch begins is known without reading.

    Args:
        source: The stream.
        transform: Run on every image.
        batch_size: Images per batch.
        seed: Seed of the order and of the transform's draws.
        shuffle: Training: shuffled, and broken images replaced by readable ones of the same batch.
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave out an incomplete last batch (of a stream that ends).
        endless: Start over at the end of the stream, for ever. Otherwise None is yielded, for ever, once the
            stream has ended.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: Transform,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        drop_last: bool,
        endless: bool,
    ) -> None:
        self.source = source
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.endless = endless
        # Shared with the workers, which outlive an epoch: each reads it when an iteration starts.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_position(self, epoch: int, batches_done: int) -> None:
        """Set where the next iteration starts, in all workers."""
        self._position[0], self._position[1] = epoch, batches_done

    def count_batches(self, num_workers: int) -> int | None:
        """Return how many batches a stream that ends yields to this rank, None when it can't say."""
        counts = [self._count(0, worker, num_workers) for worker in range(num_workers)]
        if any(count is None for count in counts):
            return None
        known = [count for count in counts if count is not None]
        if self.drop_last:
            return sum(count // self.batch_size for count in known)
        return sum(-(-count // self.batch_size) for count in known)

    def __iter__(self) -> Iterator[Batch | UsageError | None]:
        """Yield the batches of this worker from the position that was set."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, done = self._position.tolist()
        if self.endless:
            # Batches are taken from the workers in turn, from worker 0 on. After `done` batches it is another
            # one's turn: worker 0 plays its part.
            worker = (worker + done) % workers
        try:
            yield from self._batches(epoch, done, worker, workers)
        except UsageError as error:
            yield error
        while True:
            yield None

    def _batches(self, epoch: int, done: int, worker: int, workers: int) -> Iterator[Batch]:
        # Of the batches that are done this worker made every `workers`-th.
        mine = max(0, -(-(done - worker) // workers)) if self.endless else 0
        place = mine * self.batch_size
        items = self._items(epoch, place, worker, workers)
        while chunk := list(islice(items, self.batch_size)):
            if len(chunk) < self.batch_size and self.drop_last:
                return
            yield self._batch(chunk, epoch, place, worker, workers)
            place += len(chunk)

    def _batch(
        self, chunk: list[tuple[int, Sample | Unreadable]], epoch: int, place: int, worker: int, workers: int
    ) -> Batch:
        batch = _Assembly()
        batch.skipped += [(item.key, item.reason) for _, item in chunk if isinstance(item, Unreadable)]
        readable = [(turn, item) for turn, item in chunk if isinstance(item, Sample)]
        broken = len(chunk) - len(readable)
        if broken and self.shuffle:
            stand_ins = readable or self._elsewhere(epoch, place, worker, workers)
            readable = readable + [stand_ins[number % len(stand_ins)] for number in range(broken)]
        for number, (turn, sample) in enumerate(readable):
            # Draws by name, so that they don't depend on how shards fall to workers; a stand-in has its own.
            repeat = turn if number < len(chunk) - broken else -1 - number
            generator = _generator(self.seed, epoch, repeat, sample.key)
            # A stream has no indices: number its images so that no two of an epoch share one, on any rank.
            index = ((place + number) * workers + worker) * self.world_size + self.rank
            batch.add(self.transform(sample.image, generator), sample, index)
        return batch.stacked()

    def _items(self, epoch: int, skip: int, worker: int, workers: int) -> Iterator[tuple[int, Sample | Unreadable]]:
        """Yield (turn, item) from place `skip` on, starting over if endless."""
        turn = 0
        if skip and self.endless:
            count = self._count(epoch, worker, workers)
            if count is None:
                count = sum(1 for _ in self._samples(epoch, worker, workers))
            turn, skip = divmod(skip, max(1, count))
        while True:
            empty = skip == 0
            for item in self._samples(epoch, worker, workers, skip):
                empty = False
                yield turn, item
            if not self.endless:
                return
            if empty:
                raise UsageError(f"{self.source.name!r} holds no image for worker {worker} of rank {self.rank}")
            turn, skip = turn + 1, 0

    def _elsewhere(self, epoch: int, place: int, worker: int, workers: int) -> list[tuple[int, Sample]]:
        """Return up to a batch of readable images, for a batch that has none: later, earlier or another worker's."""
        streams = (self._samples(epoch, (worker + other) % workers, workers) for other in range(workers))
        later = self._samples(epoch, worker, workers, place + self.batch_size)
        readable = (item for item in chain(later, *streams) if isinstance(item, Sample))
        found = [(0, sample) for sample in islice(readable, self.batch_size)]
        if not found:
            raise UsageError(f"no image of {self.source.name!r} is readable on rank {self.rank}")
        return found

    def _samples(self, epoch: int, worker: int, workers: int, skip: int = 0) -> Iterator[Sample | Unreadable]:
        return self.source.samples(**self._share(epoch, worker, workers), skip=skip)

    def _count(self, epoch: int, worker: int, workers: int) -> int | None:
        count = getattr(self.source, "count", None)
        return None if count is None else count(**self._share(epoch, worker, workers))

    def _share(self, epoch: int, worker: int, workers: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker,
            "num_workers": workers,
            "shuffle": self.shuffle,
        }


class _Assembly:
    """A batch in the making."""

    def __init__(self) -> None:
        self.views: list[dict[str, Tensor]] = []
        self.labels: list[int | np.ndarray] = []
        self.indices: list[int] = []
        self.keys: list[str] = []
        self.skipped: Skipped = []

    def add(self, views: dict[str, Tensor], sample: Sample, index: int) -> None:
        self.views.append(views)
        self.labels.append(sample.label)
        self.indices.append(index)
        self.keys.append(sample.key)

    def stacked(self) -> Batch:
        names = self.views[0] if self.views else ()
        batch: Batch = {name: self._stack(name) for name in names}
        return batch | {
            "label": self._stacked_labels(),
            "index": torch.tensor(self.indices, dtype=torch.int64),
            "key": self.keys,
            "skipped": self.skipped,
        }

    def _stacked_labels(self) -> Tensor:
        """Return class numbers (B,) int64, or the vectors of a multi-label source (B, L) float32."""
        if self.labels and isinstance(self.labels[0], np.ndarray):
            return torch.from_numpy(np.stack(self.labels).astype(np.float32))
        return torch.tensor(self.labels, dtype=torch.int64)

    def _stack(self, name: str) -> Tensor:
        tensors = [views[name] for views in self.views]
        for tensor, key in zip(tensors, self.keys, strict=True):
            if tensor.shape != tensors[0].shape:
                raise UsageError(
                    f"{self.keys[0]!r} and {key!r} differ in shape after the transform, {tuple(tensors[0].shape)} "
                    f"and {tuple(tensor.shape)}; use one that brings all images to one size"
                )
        if any(tensor.is_floating_point() for tensor in tensors):  # 8-bit images among deeper ones
            tensors = [unit(tensor) for tensor in tensors]
        return default_collate(tensors)


def _generator(seed: int, epoch: int, turn: int, image: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(draw_seed(seed, epoch, turn, image))
