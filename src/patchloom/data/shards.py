"""Images in WebDataset shards: tar files in which files of one stem belong together (`0001.jpg`, `0001.cls`).

Shards are read from front to back. Their headers are scanned once, when the source is opened, so the number of
images and where each begins are known: the order of an epoch is settled before anything is read, several readers
can share a shard, and a resumed run goes straight to where it stopped (of a compressed shard the front is unpacked).
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np

from patchloom.data.base import Sample, StreamSource, Unreadable, UnreadableImageError, spread
from patchloom.data.decode import IMAGE_SUFFIXES, decode_image
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import printable

TRUNCATED = "the shard is damaged or cut short here"
Content = TypeVar("Content")
Encoded = tuple[str, dict[str, tuple[str, bytes]] | None]
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own files within a shard


class ShardSource(StreamSource):
    """WebDataset shards on a local or mounted file system.

    Labels are whole numbers in `.cls` files, or under "label" in `.json` files; -1 without either.

    Args:
        pattern: `train-{000000..000099}.tar`, `folder/*.tar`, one path, or a list of those.
        in_chans: Channels of the images.
        buffer_size: Images among which the next one is drawn when shuffling; as many encoded images are held in
            memory by each worker.

    Attributes:
        shards: Paths of the shards, as named.

    Raises:
        UsageError: A shard doesn't exist, none matches, or there is no image in any.
        MissingExtraError: webdataset is not installed.
    """

    def __init__(self, pattern: str | Path | Sequence[str | Path], in_chans: int = 3, buffer_size: int = 1000) -> None:
        if buffer_size < 1:
            raise UsageError(f"buffer_size is {buffer_size}; it must be at least 1")
        patterns = [pattern] if isinstance(pattern, (str, Path)) else list(pattern)
        self.name = printable(", ".join(str(one) for one in patterns))
        self.in_chans = in_chans
        self.buffer_size = buffer_size
        self.shards = expand_shards(patterns)
        self._names = [printable(name) for name in _distinct_names(self.shards)]
        scanned = [_scan(shard) for shard in self.shards]
        self.sizes = [count for count, _ in scanned]
        self._starts = [starts for _, starts in scanned]
        self.seeks = all(starts is not None for starts in self._starts)
        if not self.num_samples:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UsageError(f"no image in the {len(self.shards)} shards of {self.name!r}; looked for {kinds}")

    def encoded(self, shard: int, numbers: np.ndarray) -> Iterator[Encoded]:
        """Yield images of one shard as (name of the shard, files); files is None where the shard is damaged."""
        starts = self._starts[shard]
        groups: Iterator[dict[str, tuple[str, bytes]]] = iter(())
        at = -1
        # As many images as the scan found, whatever happens while reading: numbers are what order, resume and
        # batches are reckoned in.
        for number in numbers.tolist():
            if at < 0 or (starts is not None and number > at):
                at = 0 if starts is None else number
                groups = _read_groups(self.shards[shard], 0 if starts is None else int(starts[number]))
            while at < number:
                next(groups, None)
                at += 1
            yield self._names[shard], next(groups, None)
            at += 1

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and contents of the first images of a few shards."""
        chosen = spread(len(self.shards), 4)
        for shard in chosen:
            for files in islice(_read_groups(self.shards[shard], 0), count // len(chosen)):
                name, data = files["image"]
                yield f"{self._names[shard]}/{name}", data

    def decode(self, encoded: Encoded) -> Sample | Unreadable:
        """Return an image of `encoded`, or why it cannot be read."""
        shard, files = encoded
        if files is None:
            return Unreadable(shard, TRUNCATED)
        name, data = files["image"]
        key = printable(f"{shard}/{name}")
        try:
            return Sample(
                decode_image(data, key, self.in_chans, "invert", self.values, self.channels), _label(files, key), key
            )
        except UnreadableImageError as error:
            return Unreadable(error.key, error.reason)

    def fingerprint(self) -> str:
        """Return a short hash of the shards' names, sizes and times."""
        digest = hashlib.sha256()
        for name, shard in zip(self._names, self.shards, strict=True):
            status = shard.stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


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


def _scan(shard: Path) -> tuple[int, np.ndarray | None]:
    """Count the images of a shard and find where each begins, from the headers alone.

    A damaged end counts as one image, so that it is reported.

    Returns:
        Number of images, and (n,) int64 offsets of them in the file; None for a compressed shard, which can only be
        read from its front.
    """
    size = shard.stat().st_size
    starts = array("q")
    seekable = True
    try:
        with tarfile.open(shard) as archive:
            # Offsets are those of the file unless it is compressed.
            seekable = isinstance(archive.fileobj, io.BufferedReader)
            for files in _groups(_headers(archive, size if seekable else None)):
                starts.append(min(offset for _, offset in files.values()))
            # Where the end marker (empty blocks) is missing, tarfile takes the end of the file for the end.
            if seekable and archive.offset + tarfile.BLOCKSIZE > size:
                starts.append(size)
    except _DAMAGE:
        starts.append(size)
    return len(starts), np.array(starts, dtype=np.int64) if seekable else None


def _headers(archive: tarfile.TarFile, limit: int | None) -> Iterator[tuple[str, int]]:
    for member in archive:
        if limit is not None and member.offset_data + member.size > limit:
            raise tarfile.ReadError(TRUNCATED)
        if member.isreg() and _belongs(member.name):
            yield member.name, member.offset
        archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every header otherwise


def _read_groups(shard: Path, start: int) -> Iterator[dict[str, tuple[str, bytes]]]:
    """Yield the files of each image from an offset on; the stream ends early where the shard is damaged."""
    from webdataset.tariterators import tar_file_iterator

    with shard.open("rb") as file:
        file.seek(start)
        members = tar_file_iterator(file, skip_meta=None, select_files=_belongs)
        try:
            yield from _groups((member["fname"], member["data"]) for member in members)
        except _DAMAGE:
            return


def _groups(members: Iterable[tuple[str, Content]]) -> Iterator[dict[str, tuple[str, Content]]]:
    """Group neighbouring files of one stem; yield those with an image: {"image", "cls", "json": (name, content)}."""
    parted = ((*_parted(name), name, content) for name, content in members)
    for _, files in groupby(parted, key=itemgetter(0)):
        group: dict[str, tuple[str, Content]] = {}
        for _, suffix, name, content in files:
            kind = suffix if suffix in ("cls", "json") else "image"
            # Of `0001.depth.png` and `0001.jpg` the second is the image.
            if kind not in group or (_has_one_suffix(name) and not _has_one_suffix(group[kind][0])):
                group[kind] = name, content
        if "image" in group:
            yield group


def _belongs(name: str) -> bool:
    suffix = _parted(name)[1]
    return not _META.match(name) and (suffix in ("cls", "json") or f".{suffix}" in IMAGE_SUFFIXES)


def _parted(name: str) -> tuple[str, str]:
    """Return the stem, up to the first dot of the file name as WebDataset has it, and the last suffix."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffixes = file.partition(".")
    return folder + slash + stem, suffixes.rpartition(".")[2].lower()


def _has_one_suffix(name: str) -> bool:
    return name.rpartition("/")[2].count(".") == 1


def _label(files: dict[str, tuple[str, bytes]], key: str) -> int:
    try:
        if "cls" in files:
            return int(files["cls"][1])
        if "json" in files:
            content = json.loads(files["json"][1])
            return int(content.get("label", -1)) if isinstance(content, dict) else -1
    except (ValueError, TypeError) as error:
        raise UnreadableImageError(key, f"its label is not a whole number: {error}") from error
    return -1
