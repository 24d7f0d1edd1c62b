"""What a data source is: images by index (map-style) or images in a stream (shards).

A source holds names, never decoded pixels or open handles, so that it can be pickled to data workers and a
folder of millions of files costs a few hundred megabytes of names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from patchloom.data.kinds import IMAGE, Kind
from patchloom.data.order import draw_seed
from patchloom.data.sample import OnDemand, Sample
from patchloom.data.stream_order import Line, Reading, ShuffleBuffer, Visit
from patchloom.data.value_range import ValueRange
from patchloom.errors import UsageError

UNLABELLED = "has no labels; put each class in a folder of its own"


class UnreadableImageError(Exception):
    """An image that cannot be decoded; a training run skips, counts and lists it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"cannot read image '{key}': {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str]]:
        return type(self), (self.key, self.reason)


class Unreadable(NamedTuple):
    """What a stream yields in place of a sample it cannot decode."""

    key: str
    reason: str


class Source(ABC):
    """Images by index.

    Attributes:
        name: The source as the user named it.
        kind: What its samples are.
        class_names: Names of the classes or, where an image may have several, of the labels; None when the images
            are unlabelled.
        labels: (n,) int64, -1 where unknown; (n, L) float32 in [0, 1], NaN where unknown, for a multi-label source;
            or None when the images are unlabelled.
        in_chans: Channels of the images `read` returns.
        values: What stored values become 0 and 1, the same for every image.
        channels: Numbers of the channels taken of each file; None: all.
        usual_range: How `auto` settles the value range.
    """

    name: str
    kind: Kind = IMAGE
    usual_range: ClassVar[ValueRange] = ValueRange()
    class_names: list[str] | None = None
    labels: np.ndarray | None = None
    in_chans: int = 3
    values: ValueRange = ValueRange()
    channels: tuple[int, ...] | None = None
    captions: bool = False
    """Whether samples carry a caption, empty where an image has none; see `Sample.named`."""
    caption_counts: np.ndarray | None = None
    """How many captions each image has, (n,) int64; None: one."""
    why_unlabelled: str = ""
    """What an unlabelled source has in place of labels, for the error where they are needed."""

    def labelled(self) -> np.ndarray:
        """Return which images have a label, of several at least one: (n,) bool."""
        if self.labels is None:
            return np.zeros(len(self), dtype=bool)
        return ~np.isnan(self.labels).all(1) if self.multilabel else self.labels >= 0

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels: then labels are vectors, not class numbers."""
        return self.labels is not None and self.labels.ndim == 2

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images listed (some may prove unreadable)."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Return image number `index`.

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Return sample number `index` as it is trained on, where there is a choice: a window of a video.

        Args:
            index: Which.
            generator: Where draws come from; by default nothing is drawn, and the sample is that of `read`.

        Raises:
            UnreadableImageError: As for `read`.
        """
        return self.read(index)

    def views(self, index: int, count: int) -> list[Sample]:
        """Return sample number `index` as it is tested, where it has several forms: clips spread over a video.

        Args:
            index: Which.
            count: How many are asked for; by default there is one, that of `read`.

        Raises:
            UnreadableImageError: As for `read`.
        """
        return [self.read(index)]

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the name of image number `index` without decoding it."""

    def caption(self, index: int) -> str:
        """Return the caption of image number `index`, empty where it has none.

        Raises:
            UnreadableImageError: It cannot be read, or is not UTF-8.
        """
        return ""

    def captions_of(self, index: int) -> Sequence[str]:
        """Return all captions of image number `index`; `caption` is the first of them.

        Raises:
            UnreadableImageError: As for `caption`.
        """
        return [self.caption(index)]

    def named(self, index: int) -> Mapping[str, Any]:
        """Return what belongs to image number `index` by name, each made when it is asked for."""
        return OnDemand(caption=partial(self.caption, index)) if self.captions else {}

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash that changes when the listed images do (names, sizes, times; not pixels)."""

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and files of up to `count` images, spread over the source; none where there are no files."""
        return iter(())

    def arrays(self, count: int) -> Iterator[np.ndarray] | None:
        """Return the stored values (C, …) of up to `count` samples that are no image files; None: look at `stored`."""
        return None

    def looked_at(self) -> str:
        """Return what `stored` is a sample of, where it is not of all images."""
        return ""

    def sampling(self) -> dict[str, Any]:
        """Return the options by which samples are taken from what is stored, besides how pixels are read."""
        return {}

    def describe(self) -> dict[str, object]:
        """Return what a report says about the source."""
        classes = None if self.class_names is None else len(self.class_names)
        return {
            "name": self.name,
            "images": len(self),
            "classes": classes,
            "fingerprint": self.fingerprint(),
            **_kind(self),
            **reading(self),
        }


class Place(NamedTuple):
    """Where an image of a stream stands."""

    turn: int
    """How often the image came before, within this epoch."""
    image: int
    """Number of the image within the source."""


class StreamSource(ABC):
    """Images in a stream: shards read from front to back.

    A stream counts its images when it is opened (headers are enough); that is what lets an epoch be divided between
    processes and workers before anything is read. A source that cannot count them cannot be a stream.

    Attributes:
        name: The source as the user named it.
        kind: What its samples are.
        sizes: Images of each shard (damaged ones included).
        class_names: Names of the classes, or None when unknown.
        labels: Always None; labels come with the samples.
        in_chans: Channels of the images yielded.
        captions: Whether samples carry a caption, empty where an image has none.
        why_unlabelled: What an unlabelled source has in place of labels.
        values: What stored values become 0 and 1, the same for every image.
        channels: Numbers of the channels taken of each file; None: all.
        multilabel: Whether an image may have several labels.
        unlabelled: Images without label.
        buffer_size: Images among which the next one is drawn when shuffling; as many encoded images are held in
            memory by each worker.
        seeks: Whether `encoded` passes over images without reading them.
    """

    name: str
    kind: Kind = IMAGE
    sizes: Sequence[int]
    class_names: list[str] | None = None
    labels: None = None
    in_chans: int = 3
    values: ValueRange = ValueRange()
    channels: tuple[int, ...] | None = None
    captions: bool = False
    why_unlabelled: str = ""
    multilabel: bool = False
    unlabelled: int = 0
    buffer_size: int = 1000
    seeks: bool = True

    @property
    def num_samples(self) -> int:
        """Images in all shards (damaged ones included)."""
        return sum(self.sizes)

    @abstractmethod
    def encoded(self, shard: int, numbers: np.ndarray) -> Iterator[Any]:
        """Yield images of one shard, one for each of its ascending `numbers` (k,) int64, not decoded yet."""

    @abstractmethod
    def decode(self, encoded: Any) -> Sample | Unreadable:
        """Return what `encoded` yielded as an image, or why it cannot be read."""

    def by_index(self) -> Source:
        """Return the same images by number.

        Raises:
            UsageError: They can only be read from front to back.
        """
        raise UsageError(f"images of {self.name} are needed by number, and can only be read from front to back")

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash that changes when the shards do (names, sizes, times)."""

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and contents of up to `count` images, spread over the stream; none where it cannot tell."""
        return iter(())

    def looked_at(self) -> str:
        """Return what `stored` is a sample of, where it is not of all images."""
        return ""

    def samples(
        self,
        *,
        epoch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        count: int | None = None,
    ) -> Iterator[Sample | Unreadable]:
        """Yield a rank's part of one epoch: of n images as many as of any other rank, or one more.

        No image is yielded on two ranks. The order is a function of the arguments alone. With `count` it is a sample of
        that many (all, if there are fewer): with `shuffle` from all over the shards or, where they can only be read
        from the front, from those that come first.
        """
        total = self.num_samples if count is None else min(count, self.num_samples)
        line = Line(self.sizes, total if self.seeks else self.num_samples, epoch=epoch, seed=seed, shuffle=shuffle)
        low, high = (total * each // world_size for each in (rank, rank + 1))
        rng = np.random.default_rng(draw_seed(seed, epoch, 0, f"buffer {rank}"))
        order = ShuffleBuffer(high - low, self.buffer_size if shuffle else 1, rng)
        for _, encoded in self.read(Reading(line.visits(low, high), order)):
            yield self.decode(encoded)

    def read(self, reading: Reading, skip: int = 0) -> Iterator[tuple[Place, Any]]:
        """Yield the images of a reading in its order, encoded; the first `skip` are not even read."""
        for _ in islice(reading.order, skip):
            pass
        waiting = np.array(sorted(reading.order.held), dtype=np.int64)
        coming = self._coming(reading.visits, waiting, reading.order.coming)
        held: dict[int, list[Any]] = {}
        for number in reading.order:
            while number not in held:
                found, *what = next(coming)
                held[found] = what
            place, encoded = held.pop(number)
            yield place, encoded

    def _coming(self, visits: Iterator[Visit], waiting: np.ndarray, fresh: int) -> Iterator[tuple[int, Place, Any]]:
        """Yield (number within the reading, place, encoded) of the images not let out yet."""
        firsts = np.cumsum([0, *self.sizes])
        end = 0
        for visit in visits:
            within = np.arange(end, end + len(visit.numbers))
            end += len(within)
            wanted = (within >= fresh) | np.isin(within, waiting)
            if wanted.any():
                numbers = visit.numbers[wanted]
                for number, image, encoded in zip(
                    within[wanted].tolist(), numbers.tolist(), self.encoded(visit.shard, numbers), strict=True
                ):
                    yield number, Place(visit.turn, int(firsts[visit.shard]) + image), encoded

    def describe(self) -> dict[str, object]:
        """Return what a report says about the source."""
        return {
            "name": self.name,
            "images": self.num_samples,
            "classes": None if self.class_names is None else len(self.class_names),
            "fingerprint": self.fingerprint(),
            **_kind(self),
            **reading(self),
        }


def no_labels(source: Source | StreamSource, asked: str = "") -> UsageError:
    """Return the error for a source without labels where they are needed, what it has instead in it.

    Args:
        source: What has no labels.
        asked: What comes before its name, such as "adapt finetune needs labels and ".
    """
    return UsageError(f"{asked}{source.name} {source.why_unlabelled or UNLABELLED}")


def none_readable(source: Source | StreamSource, key: str, reason: str) -> UsageError:
    """Return the error for a source none of whose samples can be read, from the first of them."""
    return UsageError(f"no {source.kind.name} of '{source.name}' is readable; the first is '{key}': {reason}")


def reading(source: Source | StreamSource) -> dict[str, object]:
    """Return how pixels are read and samples taken, where that is not a matter of course."""
    values: dict[str, object] = {"value_range": str(source.values)} if source.values != ValueRange() else {}
    if isinstance(source, Source):
        values |= source.sampling()
    return values | ({"use_channels": ",".join(map(str, source.channels))} if source.channels is not None else {})


def _kind(source: Source | StreamSource) -> dict[str, object]:
    return {} if source.kind == IMAGE else {"kind": source.kind.name}


def spread(total: int, count: int) -> list[int]:
    """Return up to `count` places among `total`, in no order: the first of them are as good a sample as all."""
    return np.random.default_rng(0).permutation(total)[:count].tolist()
