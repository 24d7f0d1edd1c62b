"""Images in WebDataset shards: tar files in which files of one stem belong together (`0001.jpg`, `0001.cls`).

Shards are read from front to back. Their headers and labels are scanned once, when the source is opened, so the number
of images and where each begins are known: the order of an epoch is settled before anything is read, several readers
can share a shard, and a resumed run goes straight to where it stopped (of a compressed shard the front is unpacked).
What needs images by number, such as a part that is held out or the training of a decoder, takes them from
`ShardSource.by_index`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.base.ranges import PositiveInt, checked
from patchloom.base.source_options import words
from patchloom.data.base import Sample, Source, StreamSource, Unreadable, UnreadableImageError, spread
from patchloom.data.decode import IMAGE_SUFFIXES, decode_image
from patchloom.data.fields import CAPTION, IMAGE, LABEL, MASK, Field, Packed, caption_text, no_field
from patchloom.data.sample import OnDemand
from patchloom.data.shard_files import TRUNCATED, Files, Role, Roles, name_of_image, read_image, read_images, scan
from patchloom.data.shard_labels import Raw, ShardLabels, Wrong, caption_of, json_of, key_of, raw_label
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import printable

Encoded = tuple[str, Files | None]
MOST_KEYS, MOST_SHOWN = 200, 20
COMPRESSED_LOOKED_AT = 16
"""Compressed shards of which the first images stand for all."""


def is_shards(name: str) -> bool:
    """Return whether a source's name means shards."""
    return name.endswith((".tar", ".tar.gz", ".tgz"))


class ShardSource(StreamSource):
    """WebDataset shards on a local or mounted file system.

    Labels are numbers or names in `.cls` files, or under "label" or "labels" in `.json` files (see `shard_labels`).

    Args:
        pattern: `train-{000000..000099}.tar`, `folder/*.tar`, one path, or a list of those.
        in_chans: Channels of the images.
        buffer_size: Images among which the next one is drawn when shuffling; as many encoded images are held in
            memory by each worker.
        missing: Words that stand for a missing label, separated by commas.
        image_field: What stands after the stem of images, `rgb.png`; default: an image that is no mask.
        label_field: What stands after the stem of labels, or the key of .json files that holds them; or keys of several
            labels, separated by commas.
        mask_field: What stands after the stem of masks, `seg.png`; default: see `fields`.
        caption_field: What stands after the stem of captions, or the key of .json files that holds them.
        suffixes: What names of images end in; of shards of other things, what theirs do.

    Attributes:
        shards: Paths of the shards, as named.
        captions: Whether images have captions.
        mask_names: Names of the masks of all images, empty where one has none; None where no image has one.

    Raises:
        UsageError: A shard doesn't exist, none matches, there is no image in any, or no file or key of a name asked
            for.
        MissingExtraError: webdataset is not installed.
    """

    @checked
    def __init__(
        self,
        pattern: str | Path | Sequence[str | Path],
        in_chans: int = 3,
        buffer_size: PositiveInt = 1000,
        missing: str | None = None,
        image_field: str | None = None,
        label_field: str | None = None,
        mask_field: str | None = None,
        caption_field: str | None = None,
        suffixes: frozenset[str] = IMAGE_SUFFIXES,
    ) -> None:
        patterns = [pattern] if isinstance(pattern, (str, Path)) else list(pattern)
        self.name = printable(", ".join(str(one) for one in patterns))
        self.in_chans = in_chans
        self.buffer_size = buffer_size
        self.shards = expand_shards(patterns)
        self._names = [printable(name) for name in _distinct_names(self.shards)]
        self._label_field, self._caption_field = label_field, caption_field
        self._missing = words(missing)
        image, label, mask, caption = (
            None if one is None else one.lower().removeprefix(".")
            for one in (image_field, label_field, mask_field, caption_field)
        )
        self.roles = Roles(image, label, mask, caption, suffixes)
        self._look()
        there = sorted(self._there)
        if not self.num_samples:
            if image_field is not None:
                raise no_field(IMAGE, image_field, there, self.name)
            kinds = ", ".join(sorted(suffixes))
            masks = [ending for ending in there if self.roles.of(ending) == "mask"]
            hint = f"; {masks[0]} is taken for a mask, --image_field {masks[0]} for an image" if masks else ""
            what = "image" if suffixes == IMAGE_SUFFIXES else "sample"
            raise UsageError(f"no {what} in the {len(self.shards)} shards of {self.name!r}; looked for {kinds}{hint}")
        asked: Sequence[tuple[Field, str | None, bool]] = (
            (LABEL, label_field, self._labelled),
            (MASK, mask_field, self.mask_names is not None),
            (CAPTION, caption_field, self.captions),
        )
        several = words(label_field) if label_field not in self._there else []
        if len(several) > 1 and (lacking := [name for name in several if name not in self._there]):
            raise no_field(LABEL, lacking[0], there, self.name)
        for field, name, found in asked:
            if name is not None and not found:
                raise no_field(field, name, there, self.name)
        self.why_unlabelled = f"has no label (its files and keys: {self.fields_there()})"

    def _look(self) -> None:
        """Scan the shards: images, where they begin, what their labels are."""
        self._there: set[str] = set()
        self.captions = self._labelled = False
        numbers: dict[Raw, int] = {None: 0}
        scanned, self._written = [], []
        named: list[bytes] = []
        for shard in self.shards:
            written = array("i")
            masks: list[bytes] = []

            def each(files: Files | None, written: array[int] = written, masks: list[bytes] = masks) -> None:
                files = files or {}
                content = json_of(files)
                raw = raw_label(files, content, self._label_field, self._missing)
                written.append(numbers.setdefault(raw, len(numbers)))
                self._labelled |= raw is not None or "label" in files
                masks.append(os.fsencode(files["mask"][0]) if "mask" in files else b"")
                self.captions |= "caption" in files
                if not isinstance(content, Wrong):
                    self._there.update(key for key in content if len(self._there) < MOST_KEYS)
                    self.captions |= key_of(content, CAPTION, self._caption_field) is not None

            found = scan(shard, self.roles, ("label", "json"), each)
            named += masks
            scanned.append(found)
            self._there |= found.endings
            self._written.append(np.array(written, np.int32))
        self.mask_names = Packed(named) if any(named) else None
        self.sizes = [len(found.starts) for found in scanned]
        self._firsts = np.cumsum([0, *self.sizes])
        self.seeks = all(found.seekable for found in scanned)
        self._starts = [found.starts if found.seekable else None for found in scanned]
        self._raw = list(numbers)
        self._labels = ShardLabels.settled(self._raw)
        self.class_names, self.multilabel = self._labels.class_names, self._labels.several
        self.unlabelled = sum(int((written == 0).sum()) for written in self._written)

    def encoded(self, shard: int, numbers: np.ndarray) -> Iterator[Encoded]:
        """Yield images of one shard as (name of the shard, files); files is None where the shard is damaged."""
        starts = self._starts[shard]
        groups: Iterator[Files] = iter(())
        at = -1
        # As many images as the scan found, whatever happens while reading: numbers are what order, resume and
        # batches are reckoned in.
        for number in numbers.tolist():
            if at < 0 or (starts is not None and number > at):
                at = 0 if starts is None else number
                groups = read_images(self.shards[shard], 0 if starts is None else int(starts[number]), self.roles)
            while at < number:
                next(groups, None)
                at += 1
            yield self._names[shard], next(groups, None)
            at += 1

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and contents of images from all over the shards; of compressed ones the first of several."""
        if self.seeks:
            for image in spread(self.num_samples, count):
                yield from self._stored(*self.place(image), 1)
            return
        chosen = spread(len(self.shards), COMPRESSED_LOOKED_AT)
        for shard in chosen:
            yield from self._stored(shard, 0, -(-count // len(chosen)))

    def _stored(self, shard: int, start: int, count: int) -> Iterator[tuple[str, bytes]]:
        images: tuple[Role, ...] = ("image",)
        for files in islice(read_images(self.shards[shard], start, self.roles, images), count):
            name, data = files["image"]
            yield f"{self._names[shard]}/{name}", data

    def looked_at(self) -> str:
        """Return what `stored` is a sample of, where it is not of all images."""
        if self.seeks:
            return ""
        shards = min(len(self.shards), COMPRESSED_LOOKED_AT)
        return f"looked at: the first images of {shards} of {len(self.shards)} shards, which are compressed"

    def decode(self, encoded: Encoded) -> Sample | Unreadable:
        """Return an image of `encoded`, or why it cannot be read."""
        shard, files = encoded
        try:
            return self.sample(shard, files, self)
        except UnreadableImageError as error:
            return Unreadable(error.key, error.reason)

    def sample(self, shard: str, files: Files | None, how: Source | StreamSource) -> Sample:
        """Return an image of its files, its pixels read as a source has them.

        Raises:
            UnreadableImageError: It cannot be decoded, or its label is none.
        """
        if files is None:
            raise UnreadableImageError(shard, TRUNCATED)
        name, data = files["image"]
        key = printable(f"{shard}/{name}")
        content = json_of(files)
        label = self._labels.of(raw_label(files, content, self._label_field, self._missing))
        if isinstance(label, Wrong):
            raise UnreadableImageError(key, label.reason)
        image = decode_image(data, key, self.in_chans, "invert", how.values, how.channels)
        caption = partial(_caption, caption_of(files, content, self._caption_field), key)
        return Sample(image, label, key, OnDemand(caption=caption) if self.captions else {})

    def caption_of(self, files: Files, key: str) -> str:
        """Return the caption of an image, empty where it has none.

        Raises:
            UnreadableImageError: It is not UTF-8.
        """
        return _caption(caption_of(files, json_of(files), self._caption_field), key)

    def by_index(self) -> IndexedShards:
        """Return the images by number.

        Raises:
            UsageError: A shard is compressed, so it can only be read from its front.
        """
        if not self.seeks:
            packed = [name for name, starts in zip(self._names, self._starts, strict=True) if starts is None]
            raise UsageError(
                f"images of {self.name} are needed by number, and {packed[0]} is compressed, so it can only be read "
                f"from its front; unpack it to .tar"
            )
        return IndexedShards(self)

    def labels_written(self) -> np.ndarray | None:
        """Return the labels of all images as `Source.labels` has them, unknown where what is written is none."""
        if self.class_names is None:
            return None
        unknown = self._labels.of(None)
        found: list[Any] = [unknown if isinstance(label, Wrong) else label for label in map(self._labels.of, self._raw)]
        table = np.stack(found).astype(np.float32) if self.multilabel else np.array(found, np.int64)
        return table[np.concatenate(self._written)] if len(self._written) else table[:0]

    def fields_there(self) -> str:
        """Return the endings of files and the keys of .json files that there are, in words."""
        there = sorted(self._there)
        more = f" and {len(there) - MOST_SHOWN} more" if len(there) > MOST_SHOWN else ""
        return ", ".join(there[:MOST_SHOWN]) + more

    def shard_name(self, image: int) -> str:
        """Return the name of the shard an image is in."""
        return self._names[int(np.searchsorted(self._firsts, image, "right")) - 1]

    def image_name(self, image: int) -> str:
        """Return the name of an image as its samples have it; that of its shard where that is damaged."""
        shard, start = self.place(image)
        name = name_of_image(self.shards[shard], start, self.roles)
        return printable(self._names[shard] if name is None else f"{self._names[shard]}/{name}")

    def place(self, image: int) -> tuple[int, int]:
        """Return the shard of an image and where it begins in it, of shards that can be read by number."""
        shard = int(np.searchsorted(self._firsts, image, "right")) - 1
        starts = self._starts[shard]
        assert starts is not None
        return shard, int(starts[image - self._firsts[shard]])

    def files(self, image: int, take: Sequence[Role]) -> tuple[str, Files]:
        """Return the name of the shard an image is in, and those of its files that are asked for."""
        shard, start = self.place(image)
        return self._names[shard], read_image(self.shards[shard], start, self.roles, take)

    def fingerprint(self) -> str:
        """Return a short hash of the shards' names, sizes and times, and of what is asked for in them."""
        asked = (self.roles, self._missing)
        digest = hashlib.sha256(repr(asked).encode() if asked != (Roles(suffixes=self.roles.suffixes), []) else b"")
        for name, shard in zip(self._names, self.shards, strict=True):
            status = shard.stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


class IndexedShards(Source):
    """Images in shards by number: each is read from where it begins, as a file of a folder is.

    Args:
        shards: The shards, none of them compressed.
    """

    def __init__(self, shards: ShardSource) -> None:
        self.shards = shards
        self.name, self.in_chans = shards.name, shards.in_chans
        self.values, self.channels = shards.values, shards.channels
        self.class_names, self.labels = shards.class_names, shards.labels_written()
        self.why_unlabelled = shards.why_unlabelled
        self.captions = shards.captions

    def __len__(self) -> int:
        """Return the number of images (damaged ones included)."""
        return self.shards.num_samples

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        shard, files = self.shards.files(index, ("image", "label", "json", "caption"))
        return self.shards.sample(shard, files or None, self)

    def caption(self, index: int) -> str:
        """Return the caption of image number `index`, read from its shard."""
        return self.shards.caption_of(self.shards.files(index, ("caption", "json"))[1], self.key(index))

    def key(self, index: int) -> str:
        """Return the name of image number `index` as its samples have it, read from the headers of its shard."""
        return self.shards.image_name(index)

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and contents of images from all over the shards."""
        return self.shards.stored(count)

    def fingerprint(self) -> str:
        """Return that of the shards."""
        return self.shards.fingerprint()


def _caption(raw: bytes | str | None, key: str) -> str:
    return "" if raw is None else caption_text(raw, key)


def expand_shards(patterns: Iterable[str | Path]) -> list[Path]:
    """Return the shards that patterns with braces and wildcards name, in their order.

    Raises:
        UsageError: A shard doesn't exist, a wildcard matches nothing, or a name is a URL or a pipe.
        MissingExtraError: webdataset is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise MissingExtraError("webdataset", "shards", "reading shards") from error
    shards: list[Path] = []
    for pattern in patterns:
        if re.match(r"\w\w+:", str(pattern)):
            raise UsageError(
                f"shards are read from a local or mounted folder, where their images can be counted beforehand, not "
                f"from {str(pattern)!r}; copy or mount them"
            )
        named = expand_urls(str(pattern))
        for name in named:
            if Path(name).is_file():
                shards.append(Path(name))
            elif matches := sorted(glob.glob(name)) if glob.has_magic(name) else []:  # noqa: PTH207 - may be absolute
                shards += map(Path, matches)
            elif glob.has_magic(name):
                raise UsageError(f"no shard matches {name!r}")
            else:
                among = f" ({len(named)} are named by {str(pattern)!r})" if len(named) > 1 else ""
                raise UsageError(f"shard {name!r} does not exist{among}")
    if not shards:
        raise UsageError("the list of shards is empty")
    return shards


def _distinct_names(shards: list[Path]) -> list[str]:
    """Return the shards' file names, or their paths below the common parent where names repeat."""
    names = [shard.name for shard in shards]
    if len(set(names)) == len(names):
        return names
    parents = [shard.absolute().parent for shard in shards]
    common = next(
        folder for folder in (parents[0], *parents[0].parents) if all(p.is_relative_to(folder) for p in parents)
    )
    return [shard.absolute().relative_to(common).as_posix() for shard in shards]
