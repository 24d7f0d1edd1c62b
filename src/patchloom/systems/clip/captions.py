"""Images with captions: those of a source, or sentences made of its labels; and what data workers make of them.

>>> from patchloom.data import open_source
>>> captioned(open_source("digits"), "labels", ("a photo of the digit {}.",)).caption(0)
'a photo of the digit 0.'
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Sample, Source, StreamSource, Unreadable, UnreadableImageError
from patchloom.data.sample import OnDemand, Transform
from patchloom.data.subset import SubsetSource
from patchloom.errors import UsageError
from patchloom.systems.clip.text import readable_name, tokenize

NO_CAPTION = "it has no caption"
Origin = Literal["data", "labels"]


def origin_of(source: Source | StreamSource, asked: str) -> Origin:
    """Return where captions come from: `data` or `labels`.

    Args:
        source: Images.
        asked: `data`, `labels` or `auto`.

    Raises:
        UsageError: The source has no such thing.
    """
    if asked in ("auto", "data") and source.captions:
        return "data"
    if asked in ("auto", "labels") and source.class_names is not None:
        return "labels"
    if asked == "labels":
        raise UsageError(f"captions=labels needs classes, and {source.name} has none; leave captions out")
    needs = "captions or classes" if asked == "auto" else "captions"
    raise UsageError(
        f"{source.name} has no {needs}: give a table with a column of captions (caption_field names it), shards of "
        f".jpg and .txt, or a folder with a.txt beside a.jpg"
        + ("" if asked == "auto" or source.class_names is None else "; captions=labels makes them of its classes")
    )


class Captions:
    """The caption of a sample.

    Args:
        origin: `data`: its own; `labels`: a sentence with the name of its class, or of its labels.
        class_names: Names of the classes.
        templates: Sentences with {} in them; which of them an image has follows from its name.
    """

    def __init__(self, origin: Origin, class_names: Sequence[str] | None, templates: Sequence[str]) -> None:
        self.origin, self.templates = origin, tuple(templates)
        self.class_names = [readable_name(name) for name in class_names or []]

    def made(self, label: int | np.ndarray, key: str) -> str:
        """Return the sentence of a label; empty where the label is not known."""
        if isinstance(label, np.ndarray) and label.ndim:
            names = [self.class_names[number] for number in np.flatnonzero(np.nan_to_num(label) > 0.5)]
            name = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        else:
            name = self.class_names[int(label)] if int(label) >= 0 else ""
        number = zlib.crc32(key.encode("utf-8", "surrogateescape")) % len(self.templates)
        return self.templates[number].format(name) if name else ""

    def added(self, sample: Sample) -> Sample:
        """Return a sample whose caption, once it is asked for, is there or cannot be read."""
        own = sample.named

        def caption() -> str:
            text = str(own["caption"]) if self.origin == "data" else self.made(sample.label, sample.key)
            if not text.strip():
                raise UnreadableImageError(sample.key, NO_CAPTION)
            return text

        others = {name: partial(own.__getitem__, name) for name in own if name != "caption"}
        return replace(sample, named=OnDemand(caption=caption, **others))


class CaptionedSource(SubsetSource):
    """The images of a source with captions, one with several once with each.

    One without is unreadable, which training skips, counts and lists.
    """

    def __init__(self, source: Source, captions: Captions) -> None:
        counts = source.caption_counts if captions.origin == "data" else None
        counts = np.ones(len(source), dtype=np.int64) if counts is None else counts
        super().__init__(source, np.repeat(np.arange(len(source)), counts))
        # Which of its image's captions each pair has.
        self.which = np.arange(len(self.indices)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.texts, self.captions, self.caption_counts = captions, True, None

    def read(self, index: int) -> Sample:
        """Return pair number `index`."""
        return self._paired(super().read(index), index)

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Return pair number `index` as it is trained on."""
        return self._paired(super().draw(index, generator), index)

    def _paired(self, sample: Sample, index: int) -> Sample:
        if self.which[index]:
            others = {name: partial(sample.named.__getitem__, name) for name in sample.named if name != "caption"}
            sample = replace(sample, named=OnDemand(caption=partial(self.caption, index), **others))
        return self.texts.added(sample)

    def captions_of(self, index: int) -> list[str]:
        """Return the caption of pair number `index`, the only one."""
        return [self.caption(index)]

    def caption(self, index: int) -> str:
        """Return the caption of pair number `index`."""
        if self.texts.origin == "data":
            return self.source.captions_of(int(self.indices[index]))[int(self.which[index])]
        assert self.labels is not None
        return self.texts.made(self.labels[index], self.key(index))

    def fingerprint(self) -> str:
        """Return that of the source."""
        return self.source.fingerprint()

    def describe(self) -> dict[str, object]:
        """Return what a report says about the source."""
        return {**self.source.describe(), "captions": self.texts.origin}


class CaptionedStream(StreamSource):
    """The same of a stream."""

    def __init__(self, source: StreamSource, captions: Captions) -> None:
        self.source, self.texts, self.captions = source, captions, True
        self.name, self.kind, self.sizes, self.class_names = source.name, source.kind, source.sizes, source.class_names
        self.in_chans, self.values, self.channels = source.in_chans, source.values, source.channels
        self.why_unlabelled, self.multilabel = source.why_unlabelled, source.multilabel
        self.unlabelled, self.buffer_size, self.seeks = source.unlabelled, source.buffer_size, source.seeks

    def encoded(self, shard: int, numbers: np.ndarray) -> Iterator[Any]:
        """Yield images of one shard, not decoded yet."""
        return self.source.encoded(shard, numbers)

    def decode(self, encoded: Any) -> Sample | Unreadable:
        """Return an image with its caption, or why it cannot be read."""
        item = self.source.decode(encoded)
        return self.texts.added(item) if isinstance(item, Sample) else item

    def by_index(self) -> Source:
        """Return the same images by number."""
        return CaptionedSource(self.source.by_index(), self.texts)

    def fingerprint(self) -> str:
        """Return that of the shards."""
        return self.source.fingerprint()

    def describe(self) -> dict[str, object]:
        """Return what a report says about the source."""
        return {**self.source.describe(), "captions": self.texts.origin}


def captioned(source: Any, origin: Origin, templates: Sequence[str]) -> Any:
    """Return a source whose samples have captions: its own, or those of its labels."""
    captions = Captions(origin, source.class_names, templates)
    return (CaptionedSource if isinstance(source, Source) else CaptionedStream)(source, captions)


class PairedWithText:
    """A transform of the image; its caption goes into the batch as tokens.

    Args:
        view: Transform of the image.
        context_length: Tokens L of a caption.
    """

    reads = ("caption",)

    def __init__(self, view: Transform, context_length: int) -> None:
        self.view, self.context_length = view, context_length

    def __call__(self, image: Tensor, generator: torch.Generator, *, caption: str) -> dict[str, Any]:
        """Return the view, `tokens` (L,) int64, `text_id` and whether the caption was `cut`."""
        text = tokenize(caption, self.context_length)
        return {**self.view(image, generator), "tokens": text.tokens, "text_id": text.text_id, "cut": text.cut}
