"""Part of a source, and images held in memory, as sources of their own."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from patchloom.data.base import Sample, Source
from patchloom.data.kinds import IMAGE, Kind
from patchloom.errors import UsageError


class SubsetSource(Source):
    """The images of a source at given indices, in that order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.kind = source.kind
        self.class_names = source.class_names
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.in_chans, self.values, self.channels = source.in_chans, source.values, source.channels
        self.why_unlabelled, self.captions = source.why_unlabelled, source.captions
        counts = source.caption_counts
        self.caption_counts = None if counts is None else counts[self.indices]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def read(self, index: int) -> Sample:
        """Return image number `index` of the subset."""
        return self.source.read(int(self.indices[index]))

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Return image number `index` of the subset as it is trained on."""
        return self.source.draw(int(self.indices[index]), generator)

    def views(self, index: int, count: int) -> list[Sample]:
        """Return sample number `index` of the subset as it is tested."""
        return self.source.views(int(self.indices[index]), count)

    def sampling(self) -> dict[str, Any]:
        """Return the options by which samples are taken."""
        return self.source.sampling()

    def caption(self, index: int) -> str:
        """Return the caption of image number `index` of the subset."""
        return self.source.caption(int(self.indices[index]))

    def captions_of(self, index: int) -> Sequence[str]:
        """Return all captions of image number `index` of the subset."""
        return self.source.captions_of(int(self.indices[index]))

    def key(self, index: int) -> str:
        """Return the name of image number `index` of the subset."""
        return self.source.key(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Return a short hash of the source and the indices."""
        digest = hashlib.sha256(self.source.fingerprint().encode() + self.indices.tobytes())
        return digest.hexdigest()[:16]


class ClassesSource(SubsetSource):
    """The images of some classes of a source, which are numbered in another order; images without label stay.

    >>> from patchloom.data import open_source
    >>> source = ClassesSource(open_source("digits"), ["7", "new", "3"])
    >>> source.class_names, sorted(set(source.labels.tolist()))
    (['7', 'new', '3'], [0, 2])

    Args:
        source: Images of which each has one class.
        names: The classes in their new order; there may be some that the source does not have.
        shown: Those of them whose images are taken; default: all.
    """

    def __init__(self, source: Source, names: Sequence[str], shown: Sequence[str] | None = None) -> None:
        assert source.labels is not None
        places = {name: number for number, name in enumerate(names) if shown is None or name in shown}
        known = [places.get(name, -2) for name in source.class_names or []]
        self.numbers = np.array([*known, -1], dtype=np.int64)  # the last is that of no label, -1
        numbered = self.numbers[source.labels]
        super().__init__(source, np.flatnonzero(numbered != -2))
        self.class_names = list(names)
        self.labels = numbered[self.indices]

    def read(self, index: int) -> Sample:
        """Return image number `index` with the new number of its class."""
        return self._numbered(super().read(index))

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Return image number `index` as it is trained on, likewise."""
        return self._numbered(super().draw(index, generator))

    def views(self, index: int, count: int) -> list[Sample]:
        """Return sample number `index` as it is tested, likewise."""
        return [self._numbered(sample) for sample in super().views(index, count)]

    def fingerprint(self) -> str:
        """Return a short hash of the source, the indices and the order of the classes."""
        digest = hashlib.sha256(super().fingerprint().encode() + self.numbers.tobytes())
        return digest.hexdigest()[:16]

    def _numbered(self, sample: Sample) -> Sample:
        return replace(sample, label=int(self.numbers[int(sample.label)]))


class SeveralViews(SubsetSource):
    """All samples of a source as they are tested, the forms of each stacked: (V, *axes of its kind).

    Args:
        source: Videos.
        count: Clips asked for of each.
    """

    def __init__(self, source: Source, count: int) -> None:
        super().__init__(source, np.arange(len(source)))
        self.count = count

    def read(self, index: int) -> Sample:
        """Return all forms of sample number `index` as one value."""
        samples = self.views(index, self.count)
        return replace(samples[0], value=torch.stack([sample.value for sample in samples]))


def labelled_images(source: Source) -> tuple[Source, list[str]]:
    """Return the images of a source that have a label, and the names of those that have none; says so if there are any.

    Raises:
        UsageError: None has a label.
    """
    known = source.labelled()
    if known.all():
        return source, []
    left_out = [source.key(int(index)) for index in np.flatnonzero(~known)]
    if not known.any():
        raise UsageError(f"{source.name} has no labelled image: all {len(left_out)} labels are missing")
    say_unlabelled(source.name, left_out, len(source))
    return SubsetSource(source, np.flatnonzero(known)), left_out


def say_unlabelled(name: str, left_out: Sequence[str], of: int) -> None:
    """Say on the error stream which images are left out for want of a label."""
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    print(
        f"{name}: {len(left_out)} of {of} images have no label and are left out: {', '.join(left_out[:3])}{more}",
        file=sys.stderr,
    )


class MemorySource(Source):
    """A few samples held in memory, such as the first of a stream."""

    def __init__(
        self, name: str, samples: Sequence[Sample], class_names: list[str] | None = None, kind: Kind = IMAGE
    ) -> None:
        self.name, self.kind = name, kind
        self.samples = list(samples)
        self.class_names = class_names
        labels = np.array([sample.label for sample in self.samples])
        if labels.ndim == 2:
            self.labels = labels.astype(np.float32)
        else:
            self.labels = labels.astype(np.int64) if len(labels) and (labels >= 0).all() else None
        self.captions = any("caption" in sample.named for sample in self.samples)
        self.in_chans = self.samples[0].value.shape[0] if self.samples else 3

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        return self.samples[index]

    def caption(self, index: int) -> str:
        """Return the caption of image number `index`."""
        return str(self.samples[index].named.get("caption", ""))

    def key(self, index: int) -> str:
        """Return the name of image number `index`."""
        return self.samples[index].key

    def fingerprint(self) -> str:
        """Return a short hash of names and pixels."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.key.encode() + sample.value.numpy().tobytes())
        return digest.hexdigest()[:16]
