"""Batches from a source: shuffled, split over ranks, resumable in mid-epoch, forgiving of broken images.

What a batch holds depends on (seed, epoch, number of the batch, rank, world size) and on nothing else: never on what
was read before, and on the number of workers only in so far as a shuffled stream has as many `lanes` as there are
workers at first. That is what makes a resumed run equal to an uninterrupted one.

    loader = make_loader(source, PairedViews(224), 128, seed=0, shuffle=True)
    loader.set_position(epoch=3, batches_done=120)
    for batch in loader:
        batch["image"], batch["label"], batch["index"], batch["key"], batch["skipped"]
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from patchloom.base import stopping
from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.data.base import Source, StreamSource, none_readable
from patchloom.data.order import EpochOrder, Slot, Steps
from patchloom.data.pixels import alike
from patchloom.data.sample import Transform
from patchloom.data.stream_order import StreamOrder
from patchloom.data.workers import Batch, MapBatches, StreamBatches
from patchloom.errors import UsageError


class Loader:
    """Iterable over the batches of one epoch, from a position on.

    Iterating does not move the position: the same position gives the same batches again. One iteration at a time;
    starting another abandons the first. Workers stay alive between epochs.

    Attributes:
        source: Where the images come from.
        batch_size: Images per batch and rank; the last one may be shorter.
        num_workers: Worker processes; 0: images are read in this process.
        num_batches: Batches of this rank in an epoch.
        lanes: Parts of a stream that are shuffled each for itself; None for images by index.
        left_out: Images that an epoch leaves out, such as those that do not fill a step.
        repeated: Places of an epoch taken by images which came before, such as to fill a step on every rank.
        epoch: Epoch that the next iteration goes through.
        batches_done: Batches of it that are passed over without being read.
    """

    def __init__(
        self, source: Source | StreamSource, order: Steps, num_workers: int, batches: _MapBatching | _StreamBatching
    ) -> None:
        self.source = source
        self.batch_size = order.batch_size
        self.num_workers = num_workers
        self.num_batches = order.num_batches
        self.lanes = order.lanes if isinstance(order, StreamOrder) else None
        self.left_out = order.left_out
        self.repeated = order.repeated
        self.epoch = 0
        self.batches_done = 0
        self._batches = batches
        self._replaces = order.shuffle

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.num_batches

    def set_position(self, epoch: int, batches_done: int = 0) -> None:
        """Let the next iteration go through `epoch`, from batch number `batches_done` on.

        Raises:
            UsageError: The position is negative or lies beyond the end of the epoch.
        """
        if epoch < 0 or batches_done < 0 or batches_done > self.num_batches:
            raise UsageError(
                f"no such position: epoch {epoch}, {batches_done} batches done "
                f"(an epoch has {self.num_batches} batches)"
            )
        self.epoch, self.batches_done = epoch, batches_done

    def __iter__(self) -> Iterator[Batch]:
        """Start an iteration.

        Each batch is a dict: what the transform returned, stacked; "label" (B,) int64, or (B, L)
        float32 from a multi-label source (NaN where unknown); "index" (B,) int64;
        "key": list of B names; "skipped": list of (key, reason) of images that could not be read.

        Raises:
            UsageError: Nothing in the source is readable.
        """
        batches = self._batches.start(self.epoch, self.batches_done)
        return self._checked(batches) if self._replaces else self._without_empty(self._checked(batches))

    def _checked(self, batches: Iterable[Batch | UsageError]) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, UsageError):
                raise batch
            # Copying to page-locked memory turns tuples into lists.
            batch["skipped"] = [(key, reason) for key, reason in batch["skipped"]]
            yield batch

    def _without_empty(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Hand what batches of nothing but broken images report to a neighbour, so that none comes out empty."""
        held: Batch | None = None
        reports: list[tuple[str, str]] = []
        for batch in batches:
            if not batch["key"]:
                (reports if held is None else held["skipped"]).extend(batch["skipped"])
                continue
            if held is not None:
                yield held
            batch["skipped"][:0] = reports
            held, reports = batch, []
        if held is not None:
            yield held
        elif reports and self.batches_done == 0:
            key, reason = reports[0]
            raise none_readable(self.source, key, reason)


@checked
def make_loader(
    source: Source | StreamSource,
    transform: Transform,
    batch_size: PositiveInt,
    *,
    seed: int = 0,
    shuffle: bool,
    num_workers: Count = 2,
    rank: int = 0,
    world_size: PositiveInt = 1,
    drop_last: bool = False,
    pin_memory: bool = False,
    epoch_length: PositiveInt | None = None,
    repeats: PositiveInt = 1,
    accumulate: PositiveInt = 1,
    lanes: PositiveInt | None = None,
) -> Loader:
    """Return batches of a source.

    Args:
        source: Images by index, or a stream.
        transform: Picklable callable `(value of a sample, generator) -> dict of tensors`, run in the worker, that takes
            by keyword what it `reads` besides (see `data.sample`); the generator is seeded from (seed, epoch, image).
        batch_size: Images per batch and rank.
        seed: Seed of the order and of the transform's draws.
        shuffle: Training: a new order every epoch, and a broken image is replaced by the next readable one.
            Without it every image comes once and in order, and broken ones are left out. Both report them in
            "skipped".
        num_workers: Worker processes. What the batches hold does not depend on their number, given `lanes`.
        rank: This process among `world_size`.
        world_size: Processes that share each epoch, each image being one's; see `Steps`.
        drop_last: Leave out an incomplete last batch, unless it is the only one. Those left out of a stream are
            others each epoch, so that no image falls behind.
        pin_memory: Copy batches to page-locked memory, for faster transfer to a GPU.
        epoch_length: Images per epoch over all ranks; None: all there are.
        repeats: Times each image comes in a row in training, see `EpochOrder`; not for streams.
        accumulate: Batches that make one step, see `Steps`.
        lanes: Parts of a stream that are shuffled each for itself, see `StreamOrder`; None: one for each worker. To go
            on with another number of workers, give those of the beginning.

    Raises:
        UsageError: A value lies outside its range, or the source is empty.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"rank is {rank}; with world_size {world_size} it must be from 0 to {world_size - 1}")
    options: dict[str, Any] = {"pin_memory": pin_memory, "num_workers": num_workers}
    steps: dict[str, Any] = {
        "seed": seed,
        "shuffle": shuffle,
        "rank": rank,
        "world_size": world_size,
        "drop_last": drop_last,
        "epoch_length": epoch_length,
        "accumulate": accumulate,
    }
    if isinstance(source, Source):
        if len(source) == 0:
            raise UsageError(f"'{source.name}' holds no {source.kind.name}")
        order = EpochOrder(len(source), batch_size, repeats=repeats, **steps)
        return Loader(
            source,
            order,
            num_workers,
            _MapBatching(order, MapBatches(source, transform, seed, replace=shuffle), **options),
        )
    if repeats > 1:
        raise UsageError(
            f"images of the stream '{source.name}' come once each, not {repeats} times in a row; set it to 1"
        )
    if not source.num_samples:
        raise UsageError(f"'{source.name}' holds no {source.kind.name}")
    line = StreamOrder(
        source.sizes, batch_size, lanes=lanes or max(1, num_workers), buffer_size=source.buffer_size, **steps
    )
    return Loader(source, line, num_workers, _StreamBatching(StreamBatches(source, transform, line), **options))


class _Positioned(Sampler[list[Slot]]):
    """Hands the workers their batches of slots, from the position that was set last."""

    def __init__(self, order: EpochOrder) -> None:
        self.order = order
        self.epoch, self.batches_done = 0, 0

    def __iter__(self) -> Iterator[list[Slot]]:
        return self.order.batches(self.epoch, self.batches_done)

    def __len__(self) -> int:
        return self.order.num_batches - self.batches_done


class _MapBatching:
    def __init__(self, order: EpochOrder, dataset: MapBatches, num_workers: int, pin_memory: bool) -> None:
        self.sampler = _Positioned(order)
        self.loader = _data_loader(dataset, num_workers, pin_memory, batch_sampler=self.sampler)

    def start(self, epoch: int, batches_done: int) -> Iterator[Batch | UsageError]:
        self.sampler.epoch, self.sampler.batches_done = epoch, batches_done
        return iter(self.loader)


class _StreamBatching:
    """Takes the workers' batches in turn, so that the order doesn't depend on which of them is faster."""

    def __init__(self, dataset: StreamBatches, num_workers: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self.loader = _data_loader(dataset, num_workers, pin_memory, batch_size=None)

    def start(self, epoch: int, batches_done: int) -> Iterator[Batch | UsageError]:
        self.dataset.set_position(epoch, batches_done)
        return iter(self.loader)


def _data_loader(dataset: Any, num_workers: int, pin_memory: bool, **batching: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_settle_worker,
        # Its own generator: starting an iteration must not move the global one.
        generator=torch.Generator(),
        **batching,
    )


def _as_is(batch: Any) -> Any:
    return batch


def _settle_worker(worker: int) -> None:
    """Keep workers from fighting over the cores (they are the parallelism), and out of the way of Ctrl-C.

    Ctrl-C reaches the whole process group, and systemd and schedulers signal every process there is; workers that died
    of it would take the batch away from a run that is about to end in order. In a group of their own they hear of the
    main process alone, and end when it does or tells them to.
    """
    torch.set_num_threads(1)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):  # others hear of such a signal from torch's own handler, and end
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.WATCHED)
        threading.Thread(target=_end_with_parent, daemon=True).start()


class Gathered(NamedTuple):
    """All images of a loader."""

    images: Tensor
    """(n, C, H, W), or more axes, of one type."""
    labels: Tensor
    """(n,) int64, or (n, L) of several labels each."""
    keys: list[str]
    """Their names."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that could not be read."""


def gathered(loader: Iterable[dict[str, Any]], name: str, kind: str = "image") -> Gathered:
    """Return the images of all batches, for what has to see them at once.

    Args:
        loader: Batches whose images have one size.
        name: Of the source, for the error.
        kind: What they are.

    Raises:
        UsageError: No image can be read.
    """
    images, labels, keys, skipped = [], [], list[str](), list[tuple[str, str]]()
    for batch in loader:
        skipped += batch["skipped"]
        if batch["key"]:
            images.append(batch[kind])
            labels.append(batch["label"])
            keys += batch["key"]
    if not images:
        raise UsageError(f"{name} holds no readable {kind}")
    return Gathered(torch.cat(alike(images)), torch.cat(labels), keys, skipped)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo(stopping.WATCHED).si_pid != (parent.pid if parent else os.getppid()):
        pass
    os._exit(0)
