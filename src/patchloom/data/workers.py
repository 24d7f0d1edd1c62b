"""What runs in a data worker: read images, replace or drop broken ones, transform, stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from patchloom.data.base import Place, Source, StreamSource, Unreadable, UnreadableImageError, none_readable
from patchloom.data.order import Slot, draw_seed
from patchloom.data.pixels import alike
from patchloom.data.sample import Sample, Transform, at_hand, transformed
from patchloom.data.stream_order import Line, Reading, ShuffleBuffer, StreamOrder
from patchloom.errors import UsageError

Batch = dict[str, Any]
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
            found = self._read(slot, batch.skipped)
            if found is not None:
                index, sample, generator = found
                batch.add(transformed(self.transform, sample, generator), sample, index)
        return batch.stacked()

    def _read(self, slot: Slot, skipped: Skipped) -> tuple[int, Sample, torch.Generator] | None:
        """Return the sample for a slot, its number, and the generator of what is left to draw."""
        total = len(self.source)
        for candidate in chain(range(slot.image, total), range(slot.image)):
            if candidate not in self._broken:
                # The draws are the slot's: an image that stands in for another doesn't look the same twice.
                generator = _generator(self.seed, slot.epoch, slot.turn, slot.image)
                try:
                    # In training, where broken ones are replaced, a sample may be one of several.
                    drawn = self.source.draw(candidate, generator) if self.replace else self.source.read(candidate)
                    return candidate, at_hand(drawn, self.transform), generator
                except UnreadableImageError as error:
                    self._broken[candidate] = error.key, error.reason
            skipped.append(self._broken[candidate])
            if not self.replace:
                return None
        key, reason = self._broken[0]
        raise none_readable(self.source, key, reason)


class StreamBatches(IterableDataset[Batch | UsageError]):
    """Reads this worker's part of a stream and yields finished batches.

    A batch is always made of the next images of a lane, broken ones included, so the place where a batch begins is
    known without reading.

    Args:
        source: The stream.
        transform: Run on every image.
        order: Which batches there are, and what they hold.
    """

    def __init__(self, source: StreamSource, transform: Transform, order: StreamOrder) -> None:
        self.source = source
        self.transform = transform
        self.order = order
        # Shared with the workers, which outlive an epoch: each reads it when an iteration starts.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_position(self, epoch: int, batches_done: int) -> None:
        """Set where the next iteration starts, in all workers."""
        self._position[0], self._position[1] = epoch, batches_done

    def __iter__(self) -> Iterator[Batch | UsageError]:
        """Yield the batches of this worker from the position that was set."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, done = self._position.tolist()
        try:
            # Batches are taken from the workers in turn, from worker 0 on.
            yield from self.batches(epoch, range(done + worker, self.order.num_batches, workers))
        except UsageError as error:
            yield error

    def batches(self, epoch: int, steps: Iterable[int]) -> Iterator[Batch]:
        """Yield the batches of an epoch that have these ascending numbers."""
        size = self.order.batch_size
        lanes: dict[int, Iterator[tuple[Place, Any]]] = {}
        made: dict[int, int] = {}
        for step in steps:
            number, lane = divmod(step, self.order.lanes)
            if lane not in lanes:
                lanes[lane] = self.source.read(self.order.reading(epoch, lane), number * size)
            else:  # what other workers make of this lane is passed over without decoding it
                for _ in islice(lanes[lane], (number - made[lane]) * size):
                    pass
            made[lane] = number + 1
            yield self._batch([(place, self._decoded(one)) for place, one in islice(lanes[lane], size)], epoch)

    def _decoded(self, encoded: Any) -> Sample | Unreadable:
        item = self.source.decode(encoded)
        try:
            return at_hand(item, self.transform) if isinstance(item, Sample) else item
        except UnreadableImageError as error:
            return Unreadable(error.key, error.reason)

    def _batch(self, chunk: list[tuple[Place, Sample | Unreadable]], epoch: int) -> Batch:
        batch = _Assembly()
        batch.skipped += [(item.key, item.reason) for _, item in chunk if isinstance(item, Unreadable)]
        readable = [(place, item) for place, item in chunk if isinstance(item, Sample)]
        broken = len(chunk) - len(readable)
        if broken and self.order.shuffle:
            stand_ins = readable or self._elsewhere(epoch, chunk[-1][0])
            readable = readable + [stand_ins[number % len(stand_ins)] for number in range(broken)]
        for number, (place, sample) in enumerate(readable):
            # A stand-in is drawn for anew.
            repeat = place.turn if number < len(chunk) - broken else -1 - number
            generator = _generator(self.order.seed, epoch, repeat, sample.key)
            batch.add(transformed(self.transform, sample, generator), sample, place.image)
        return batch.stacked()

    def _elsewhere(self, epoch: int, last: Place) -> list[tuple[Place, Sample]]:
        """Return readable images for a batch that has none, up to its size: those that follow in the source."""
        sizes = self.source.sizes
        line = Line(sizes, sum(sizes), epoch=epoch, seed=self.order.seed, shuffle=False)
        readable: list[tuple[Place, Sample]] = []
        broken: list[Unreadable] = []
        for low, high in ((last.image + 1, line.total), (0, last.image + 1)):
            order = ShuffleBuffer(high - low, 1, np.random.default_rng(0))
            for place, encoded in self.source.read(Reading(line.visits(low, high), order)):
                item = self._decoded(encoded)
                if isinstance(item, Unreadable):
                    broken = broken or [item]
                    continue
                readable.append((place, item))
                if len(readable) == self.order.batch_size:
                    return readable
        if not readable:
            key, reason = broken[0]
            raise none_readable(self.source, key, reason)
        return readable


class _Assembly:
    """A batch in the making."""

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []
        self.labels: list[int | np.ndarray] = []
        self.indices: list[int] = []
        self.keys: list[str] = []
        self.skipped: Skipped = []

    def add(self, views: dict[str, Any], sample: Sample, index: int) -> None:
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

    def _stack(self, name: str) -> Any:
        """Return the tensors of that name as one, or as a list what is no tensor, such as text."""
        tensors = [views[name] for views in self.views]
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            return tensors
        for tensor, key in zip(tensors, self.keys, strict=True):
            if tensor.shape != tensors[0].shape:
                raise UsageError(
                    f"'{self.keys[0]}' and '{key}' differ in shape after the transform, {tuple(tensors[0].shape)} "
                    f"and {tuple(tensor.shape)}; use one that brings all images to one size"
                )
        return default_collate(alike(tensors))


def _generator(seed: int, epoch: int, turn: int, image: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(draw_seed(seed, epoch, turn, image))
