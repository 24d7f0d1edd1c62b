"""Images in: sources named by a string, transforms, batches.

>>> from patchloom.data import open_source
>>> source = open_source("photos:test", crops=10)
>>> source.read(3).image.shape
torch.Size([3, 64, 64])
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

import numpy as np

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.source_options import SourceOptions, refuse_untaken
from patchloom.data.base import Sample, Source, StreamSource, Unreadable, UnreadableImageError
from patchloom.data.channel_files import ChannelFilesSource
from patchloom.data.embedded import DigitsSource, PhotosSource
from patchloom.data.folder import FolderSource, Labels
from patchloom.data.labels import LabelFileSource, is_label_file
from patchloom.data.loader import Loader, make_loader
from patchloom.data.mask_values import MaskCoding
from patchloom.data.moving import MovingSource
from patchloom.data.reading import OPTIONS as READING
from patchloom.data.reading import Reading, reading_options, remembered
from patchloom.data.shards import ShardSource, is_shards
from patchloom.data.subset import MemorySource, SubsetSource
from patchloom.data.transforms import EvalTransform, FinetuneTransform, PairedViews, make_mixup
from patchloom.errors import UsageError
from patchloom.io import existing, printable
from patchloom.registry import OPENERS, SOURCES, load

__all__ = [
    "EvalTransform",
    "FinetuneTransform",
    "Loader",
    "MemorySource",
    "PairedViews",
    "Sample",
    "Source",
    "SourceOptions",
    "StreamSource",
    "SubsetSource",
    "Unreadable",
    "UnreadableImageError",
    "list_sources",
    "make_loader",
    "make_mixup",
    "open_alike",
    "open_source",
    "sample_indices",
]


def list_sources() -> dict[str, str]:
    """Return the ways to name a data source, each with one line of help."""
    return dict(SOURCES)


def open_source(
    name: str,
    *,
    labels: Labels = "auto",
    in_chans: int = 3,
    seed: int = 0,
    model: Any = None,
    quiet: bool = False,
    by_index: bool = False,
    settings: MaskSettings | None = None,
    coding: MaskCoding | None = None,
    **options: Any,
) -> Source | StreamSource:
    """Open a data source by its name.

    Args:
        name: One of `list_sources`. A word such as `photos` means the embedded set; write `./photos` for a folder
            of that name.
        labels: What the labels of a folder are, see `FolderSource`.
        in_chans: Channels the images are read as: 3 for RGB, 1 for grey, or as many as the files have; of frames in
            time order, how many are stacked.
        seed: Seed of the crops of `photos`.
        model: Encoder whose training images say how these are read, where the options do not.
        quiet: Say nothing of what is found.
        by_index: Shards are wanted as images by number, which is what folders are; compressed ones stay a stream.
        settings: What the user says of the values of masks, for sources whose samples have them.
        coding: How masks are read, as settled on another source, instead.
        **options: What all commands hand on (`include`, `value_range` …; `patchloom.base.source_options`), and what the
            source itself takes, such as `crop_size` and `crops` of `photos`.

    Raises:
        UsageError: There is no such source, nothing readable in it, or an option it cannot obey.
    """
    reading = Reading.of({**remembered(model), **options})
    source_options = {option: value for option, value in options.items() if option not in READING}
    about_masks = {"settings": settings, "coding": coding}
    opened: Source | StreamSource | None = _registered(
        name, labels, in_chans, reading.channel_files, source_options, remembered(model) | about_masks
    )
    if opened is None:
        known = remembered(model) | about_masks
        opened = _open(name, labels, in_chans, seed, reading.channel_files, source_options, known)
    source = reading.given_to(opened, options, quiet=quiet)
    return source.by_index() if by_index and isinstance(source, StreamSource) and source.seeks else source


def open_alike(names: Sequence[str], *, model: Any = None, **options: Any) -> list[Source | StreamSource]:
    """Open several sources whose pixels are read alike: as `open_source` does the first, so the others.

    Raises:
        UsageError: As `open_source`.
    """
    opened: list[Source | StreamSource] = []
    for name in names:
        if opened and (_word(name) in OPENERS or _word(names[0]) in OPENERS) and _word(name) != _word(names[0]):
            kind = opened[0].kind.plural
            raise UsageError(f"{names[0]} holds {kind} and {name} is another sort of data; name {kind} for both")
        opened.append(open_source(name, model=model, **options))
        options |= reading_options(opened[0])
    return opened


def _word(name: str) -> str:
    return name.partition(":")[0]


def _open(
    name: str,
    labels: Labels,
    in_chans: int,
    seed: int,
    channel_files: str | None,
    options: dict[str, Any],
    known: dict[str, Any],
) -> Source | StreamSource:
    if (frames := _frames(name, in_chans, options)) is not None:
        return frames
    word, _, rest = name.partition(":")
    if in_chans not in (1, 3) and word in ("photos", "digits", "moving", "shapes", "torchvision"):
        raise UsageError(f"in_chans is {in_chans}; images of {name} are read as 3 channels (RGB) or 1 (grey)")
    if channel_files is not None and not existing(name).is_dir():
        raise UsageError(f"channel_files is {channel_files}, which the source {name} cannot obey; give a folder")
    if word == "photos":
        refuse_untaken(PhotosSource, name, options)
        return PhotosSource(rest or "train", in_chans=in_chans, seed=seed, **options)
    if word == "moving":
        refuse_untaken(MovingSource, name, options)
        asked = {option: known[option] for option in ("clip_frames", "clip_stride") if option in known} | options
        return MovingSource(rest or "train", in_chans=in_chans, seed=seed, **asked)
    if word == "digits":
        refuse_untaken(DigitsSource, name, options)
        return DigitsSource(rest or "train", in_chans=in_chans, **options)
    if word == "shapes3d":
        from patchloom.data.shapes3d import Shapes3dSource

        refuse_untaken(Shapes3dSource, name, options)
        told = {option: known[option] for option in ("settings", "coding")} | options
        return Shapes3dSource(rest or "train", in_chans=in_chans, seed=seed, **told)
    if word == "shapes":
        from patchloom.data.shapes import ShapesSource

        refuse_untaken(ShapesSource, name, options)
        return ShapesSource(rest or "train", in_chans=in_chans, seed=seed, **options)
    if word in ("torchvision", "hf") and rest:
        from patchloom.data.hub import HuggingFaceSource, TorchvisionSource

        dataset, _, split = rest.partition(":")
        hub: type[HuggingFaceSource] | type[TorchvisionSource]
        hub = HuggingFaceSource if word == "hf" else TorchvisionSource
        refuse_untaken(hub, name, options)
        return hub(dataset, split or "train", in_chans=in_chans, **options)
    if word in ("chestxray14", "chexpert", "covidx", "mimic-cxr") and rest:
        from patchloom.data.medical import MEDICAL, open_medical

        refuse_untaken(MEDICAL[word], name, options)
        return open_medical(word, rest, in_chans=in_chans, **options)
    if is_label_file(name):
        refuse_untaken(LabelFileSource, name, options)
        return LabelFileSource(name, in_chans=in_chans, **options)
    if is_shards(name):
        refuse_untaken(ShardSource, name, options)
        return ShardSource(name, in_chans=in_chans, **options)
    folder = existing(name)
    if not folder.exists() and "/" not in name:
        words = [known.partition(":")[0] for known in list_sources() if known[0].islower()]
        near = get_close_matches(word, words, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"there is no image folder '{printable(name)}' here, nor a data source of that name{hint} "
            f"(patchloom list --verb data shows them)"
        )
    refuse_untaken(FolderSource, name, options)
    if channel_files is not None:
        return ChannelFilesSource(folder, channel_files, labels, in_chans, **options)
    return FolderSource(folder, labels=labels, in_chans=in_chans, **options)


def _registered(
    name: str,
    labels: Labels,
    in_chans: int,
    channel_files: str | None,
    options: dict[str, Any],
    known: dict[str, Any],
) -> Source | None:
    """Return what a registered opener opens, read as the model's data were where nothing else is said; else None."""
    word, _, rest = name.partition(":")
    if word not in OPENERS or not rest:
        return None
    opener = load(OPENERS[word])
    asked = options if channel_files is None else {**options, "channel_files": channel_files}
    refuse_untaken(opener, name, asked)
    told = {"labels": labels, "in_chans": in_chans, **known}
    taken = {option: value for option, value in told.items() if option in signature(opener).parameters}
    opened: Source = opener(existing(rest), **(taken | options))
    return opened


def _frames(name: str, stack: int, options: dict[str, Any]) -> Source | None:
    """Return frames in time order, `stack` of them as the channels of an image; None where the name means images."""
    word, _, rest = name.partition(":")
    if word == "atari" and rest:
        from patchloom.data.atari import open_atari

        refuse_untaken(open_atari, name, options)
        return open_atari(rest, stack=stack, **options)
    if word == "frames" and rest:
        from patchloom.data.frames import open_frames

        refuse_untaken(open_frames, name, options)
        return open_frames(rest, stack=stack, **options)
    return None


def sample_indices(source: Source, count: int, *, seed: int = 1, per_class: int | None = None) -> np.ndarray:
    """Return indices of images to fit a tokenizer on, in ascending order.

    Args:
        source: A map-style source.
        count: How many images in all, at most.
        seed: Seed of the draw.
        per_class: Draw this many of each class first (the paper takes 50); needs labels.

    Raises:
        UsageError: `per_class` without labels.
    """
    generator = np.random.default_rng(seed)
    if per_class is None:
        chosen = generator.permutation(len(source))[:count]
    else:
        if source.labels is None:
            raise UsageError(f"per_class={per_class} needs labels and {source.name} has none")
        if source.multilabel:
            raise UsageError(f"per_class={per_class} needs one class per image; {source.name} has several labels each")
        parts = [
            generator.permutation(np.flatnonzero(source.labels == label))[:per_class]
            for label in np.unique(source.labels[source.labels >= 0])
        ]
        chosen = np.concatenate(parts)
        if len(chosen) > count:
            chosen = generator.permutation(chosen)[:count]
    return np.sort(chosen)
