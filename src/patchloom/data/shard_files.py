"""Which files of a shard belong together, and what each of them is: an image, its label, mask or caption.

Files of one stem, which ends at the first dot of the name, belong together; what stands after that dot says what a file
is (see `fields`). Damage ends the reading of a shard and is never an error here.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from patchloom.data.decode import IMAGE_SUFFIXES
from patchloom.data.fields import CAPTION, LABEL, MASK

TRUNCATED = "the shard is damaged or cut short here"
MOST_ENDINGS = 200
Content = TypeVar("Content")
Role = Literal["image", "label", "json", "mask", "caption"]
Files = Mapping[Role, tuple[str, bytes]]
"""The files of one image: what each is, to its name and content."""
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own files within a shard


@dataclass(frozen=True)
class Roles:
    """What files are by their endings; each field may be called otherwise, by an ending without its leading dot."""

    image: str | None = None
    label: str | None = None
    mask: str | None = None
    caption: str | None = None
    suffixes: frozenset[str] = field(default=IMAGE_SUFFIXES, repr=False)
    """What names of samples end in, where they are other things than images"""

    def of(self, ending: str) -> Role | None:
        """Return what a file is by what stands after its stem, such as `cls` or `mask.png`.

        >>> Roles().of("mask.png"), Roles().of("depth.png"), Roles(image="rgb").of("depth.png")
        ('mask', 'image', None)
        """
        before, _, last = ending.rpartition(".")
        picture = f".{last}" in self.suffixes
        if self.image is not None and _fits(ending, self.image):
            return "image"
        if self.mask is not None:
            if _fits(ending, self.mask):
                return "mask"
        elif picture and before.rpartition(".")[2] in MASK.endings:
            return "mask"
        if ending == self.label or (self.label is None and last in LABEL.endings):
            return "label"
        if ending == self.caption or (self.caption is None and last in CAPTION.endings):
            return "caption"
        if last == "json":
            return "json"
        return "image" if picture and self.image is None else None


@dataclass
class Scanned:
    """What the headers of a shard tell."""

    starts: np.ndarray
    """(n,) int64 offsets of the images in the file, meaningless in a compressed shard."""
    seekable: bool
    """Whether an image can be read without reading what comes before it."""
    endings: set[str] = field(default_factory=set)
    """What stands after the stems of its files."""


def scan(shard: Path, roles: Roles, take: Collection[Role], each: object) -> Scanned:
    """Find the images of a shard by its headers.

    A damaged end counts as one image, so that it is reported.

    Args:
        shard: The shard.
        roles: What its files are.
        take: Files whose content is read along, small ones.
        each: Called with the files of every image, empty but for those, and with None for a damaged end.
    """
    size = shard.stat().st_size
    starts = array("q")
    seekable = True
    endings: set[str] = set()
    told = each if callable(each) else _nothing

    def damaged() -> None:
        starts.append(size)
        told(None)

    try:
        with tarfile.open(shard) as archive:
            # Offsets are those of the file unless it is compressed.
            seekable = isinstance(archive.fileobj, io.BufferedReader)
            members = _headers(archive, size if seekable else None, roles, take, endings)
            for files in _groups(members):
                starts.append(min(at.member.offset for _, at in files.values()))
                told({role: (name, at.content) for role, (name, at) in files.items()})
            # Where the end marker (empty blocks) is missing, tarfile takes the end of the file for the end.
            if seekable and archive.offset + tarfile.BLOCKSIZE > size:
                damaged()
    except DAMAGE:
        damaged()
    return Scanned(np.array(starts, dtype=np.int64), seekable, endings)


def read_images(
    shard: Path, start: int, roles: Roles, take: Collection[Role] = ("image", "label", "json", "caption")
) -> Iterator[Files]:
    """Yield the files of each image from an offset on; the stream ends early where the shard is damaged."""
    from webdataset.tariterators import tar_file_iterator

    def wanted(name: str) -> bool:
        return (role := _role(name, roles)) is not None and role in take

    with shard.open("rb") as file:
        file.seek(start)
        members = tar_file_iterator(file, skip_meta=None, select_files=wanted)
        try:
            yield from _groups((_role(member["fname"], roles), member["fname"], member["data"]) for member in members)
        except DAMAGE:
            return


def read_image(shard: Path, start: int, roles: Roles, take: Collection[Role]) -> Files:
    """Return the files of one image of a shard that is not compressed; those not asked for are not even read.

    Args:
        shard: The shard.
        start: Where the image begins in it.
        roles: What its files are.
        take: Which of them are wanted.

    Returns:
        Those that are there; none where the shard is damaged.
    """

    def read(archive: tarfile.TarFile, files: dict[Role, tuple[str, _Entry]]) -> Files:
        return {role: (name, _content(archive, at.member)) for role, (name, at) in files.items() if role in take}

    return _at_image(shard, start, roles, read) or {}


def name_of_image(shard: Path, start: int, roles: Roles) -> str | None:
    """Return the name of the image that begins at a place in a shard, None where the shard is damaged."""
    return _at_image(shard, start, roles, lambda _, files: files["image"][0])


def _at_image(
    shard: Path, start: int, roles: Roles, read: Callable[[tarfile.TarFile, dict[Role, tuple[str, _Entry]]], Content]
) -> Content | None:
    """Return what is read of the image that begins at a place, told its files; None where the shard is damaged."""
    try:
        with shard.open("rb") as file:
            file.seek(start)
            with tarfile.TarFile(fileobj=file) as archive:
                files = next(_groups(_headers(archive, shard.stat().st_size, roles, (), set())), None)
                return None if files is None else read(archive, files)
    except DAMAGE:
        return None


class _Entry(NamedTuple):
    """A file of a shard."""

    member: tarfile.TarInfo
    content: bytes


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return what a member holds: the archive goes on behind it, wherever its file stands."""
    file: Any = archive.fileobj
    file.seek(member.offset_data)
    content: bytes = file.read(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError(TRUNCATED)
    return content


def _nothing(files: object) -> None:
    return


def _headers(
    archive: tarfile.TarFile, limit: int | None, roles: Roles, take: Collection[Role], endings: set[str]
) -> Iterator[tuple[Role, str, _Entry]]:
    for member in archive:
        if limit is not None and member.offset_data + member.size > limit:
            raise tarfile.ReadError(TRUNCATED)
        if member.isreg() and not _META.match(member.name):
            ending = _parted(member.name)[1]
            if len(endings) < MOST_ENDINGS:
                endings.add(ending)
            if (role := roles.of(ending)) is not None:
                yield role, member.name, _Entry(member, _content(archive, member) if role in take else b"")
        archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every header otherwise


def _groups(members: Iterable[tuple[Role | None, str, Content]]) -> Iterator[dict[Role, tuple[str, Content]]]:
    """Group neighbouring files of one stem, by what they are; yield those with an image."""
    parted = ((_parted(name)[0], role, name, content) for role, name, content in members)
    for _, files in groupby(parted, key=itemgetter(0)):
        group: dict[Role, tuple[str, Content]] = {}
        for _, role, name, content in files:
            # Of `0001.depth.png` and `0001.jpg` the second is the image.
            if role is not None and (role not in group or _is_plainer(name, group[role][0])):
                group[role] = name, content
        if "image" in group:
            yield group


def _role(name: str, roles: Roles) -> Role | None:
    return None if _META.match(name) else roles.of(_parted(name)[1])


def _parted(name: str) -> tuple[str, str]:
    """Return the stem, up to the first dot of the file name as WebDataset has it, and what follows."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _is_plainer(name: str, other: str) -> bool:
    """Return whether a name has one suffix, and the other has several."""
    return _parted(name)[1].count(".") == 0 < _parted(other)[1].count(".")


def _fits(ending: str, asked: str) -> bool:
    """Return whether an ending is the one asked for, or that of an image called so: `mask.png` is `mask`."""
    before, _, last = ending.rpartition(".")
    asked = asked.lower().removeprefix(".")
    return ending == asked or (before == asked and f".{last}" in IMAGE_SUFFIXES)
