"""A folder of images, at any depth.

>>> source = FolderSource("my/folder")  # doctest: +SKIP
>>> len(source), source.class_names  # doctest: +SKIP
(1300, None)
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from patchloom.base.source_options import choose, words
from patchloom.data.base import UNLABELLED, Sample, Source, UnreadableImageError, spread
from patchloom.data.decode import ARRAY_SUFFIXES, IMAGE_SUFFIXES, decode_image
from patchloom.data.fields import (
    CAPTION,
    IMAGE,
    MASK,
    MASK_FOLDERS,
    TEXT_SUFFIX,
    Field,
    Packed,
    caption_text,
    ending_beside,
    file_rule,
    stem,
)
from patchloom.data.survey import notice
from patchloom.data.video_files import VIDEO_SUFFIXES
from patchloom.errors import UsageError
from patchloom.io import printable

# Images looked at, and the largest of them, for the notice that a folder may hold masks.
LOOKED_AT, MOST_BYTES = 16, 200_000
_NOTICED: set[str] = set()
Labels = Literal["auto", "folder", "none"]
READ = IMAGE_SUFFIXES | ARRAY_SUFFIXES
ELSEWHERE = {"clips": VIDEO_SUFFIXES, "volumes": {".nii", ".nii.gz", ".gz"}}
"""Suffixes of what is read under the name `clips:FOLDER` or `volumes:FOLDER`."""


class FolderSource(Source):
    """All images below a folder, in the order of their paths.

    Names are held in one block of bytes: a million files take some tens of megabytes, and handing the source to
    data workers costs nothing.

    Args:
        path: The folder.
        labels: `folder`: the top-level sub-folder is the class. `none`: no labels. `auto`: as `folder` when every
            image lies in one of at least two sub-folders.
        in_chans: Channels the images are read as, 3 or 1.
        include: Globs of the files to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.
        missing: Names of sub-folders, separated by commas, whose images have no label (unsorted,NA).
        image_field: What tells the images: an ending of names or a folder, see `fields.file_rule`; default: all.
        mask_field: What tells masks, which are left out here (`open_segmentation` reads them).
        caption_field: What tells captions; default: `a.txt` is that of `a.jpg`.

    Raises:
        UsageError: There is no such folder, no image in it, an image outside the sub-folders with `folder`, or no file
            that is called as a field is said to be.
    """

    def __init__(
        self,
        path: str | Path,
        labels: Labels = "auto",
        in_chans: int = 3,
        include: str | None = None,
        exclude: str | None = None,
        missing: str | None = None,
        image_field: str | None = None,
        mask_field: str | None = None,
        caption_field: str | None = None,
    ) -> None:
        self.name = printable(path)
        self.root = Path(path)
        self.in_chans = in_chans
        if not self.root.is_dir():
            kind = "is a file" if self.root.exists() else "does not exist"
            raise UsageError(f"the image folder {path} {kind}; give the folder that holds the images")
        passed: Counter[str] = Counter()
        texts: dict[str, str] = {}
        is_caption = file_rule(TEXT_SUFFIX if caption_field is None else caption_field)
        found = chosen_images(self.root, include, exclude, passed, _collector(texts, is_caption))
        if not found:
            known = ", ".join(sorted(READ))
            others = f"; there are {_counted(passed)}{_named_otherwise(path, passed)}" if passed else ""
            raise UsageError(f"no image in {self.root.resolve()} or below (looked for {known}){others}")
        image_of: Mapping[str, str] = {}
        if texts or image_field is not None or mask_field is not None:
            image_of = self._of_fields(found, image_field, mask_field)
            found = [file for file in found if file[0] in image_of]
        names = [os.fsencode(name) for name, _, _ in found]
        captions = [texts.get(image_of[name], "") for name, _, _ in found] if texts else []
        self.captions = any(captions)
        if self.captions:
            self.caption_files = Packed([os.fsencode(caption) for caption in captions])
            passed.subtract(_suffix(caption) for caption in captions if caption)
            passed = +passed
        elif caption_field is not None:
            raise self._none_called(CAPTION, caption_field)
        self.names = Packed(names)
        self._stamp = _hash(found)
        self._missing = words(missing)
        self._label(names, labels, self._missing)
        if passed and f"{self.name} passed over" not in _NOTICED:
            _NOTICED.add(f"{self.name} passed over")
            otherwise = _named_otherwise(path, passed)
            notice(
                f"{self.name}: {sum(passed.values())} files are passed over for their suffix "
                f"({_counted(passed)}){otherwise}"
            )
        told_apart = (include, exclude, image_field, mask_field) != (None,) * 4
        _notice_masks(self.name, self.root, [name for name, _, _ in found], told_apart)

    def _of_fields(
        self, found: list[tuple[str, int, int]], image_field: str | None, mask_field: str | None
    ) -> dict[str, str]:
        """Return the images among the files, each with its name without what tells it from other files.

        Raises:
            UsageError: There is no file that is called so.
        """
        names = [name for name, _, _ in found]
        if mask_field is not None:
            is_mask = file_rule(mask_field)
            images = [name for name in names if is_mask(name) is None]
            if len(images) == len(names):
                raise self._none_called(MASK, mask_field)
            names = images
        is_image = stem if image_field is None else file_rule(image_field)
        named = {name: key for name in names if (key := is_image(name)) is not None}
        if not named:
            raise self._none_called(IMAGE, image_field or "")
        return named

    def _none_called(self, field: Field, asked: str) -> UsageError:
        return UsageError(
            f"{field.name}_field is {asked}, and no file in {self.name} is called so; give an ending of names "
            f"(_{field.name}) or a folder ({field.name}s/)"
        )

    def _label(self, names: list[bytes], labels: Labels, missing: list[str]) -> None:
        tops = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
        classes = sorted({top for top in tops if top is not None and printable(os.fsdecode(top)) not in missing})
        inside = all(top is not None for top in tops)
        if labels == "none" or (labels == "auto" and not (inside and len(classes) > 1)):
            if labels == "auto":
                self.why_unlabelled = _why_unlabelled(names, tops, classes)
            return
        if not inside:
            stray = printable(os.fsdecode(names[tops.index(None)]))
            raise UsageError(f"labels=folder needs every image in a sub-folder of {self.root}; {stray} is in none")
        index = {name: number for number, name in enumerate(classes)}
        self.class_names = [printable(os.fsdecode(name)) for name in classes]
        self.labels = np.array([index.get(top, -1) for top in tops if top is not None], dtype=np.int64)

    def label_one_class(self) -> None:
        """Take the one sub-folder that all images lie in for their class, for whoever learns classes one by one."""
        names = [os.fsencode(self._file(index)) for index in range(len(self))]
        if self.class_names is None and all(b"/" in name for name in names):
            self._label(names, "folder", self._missing)

    def __len__(self) -> int:
        """Return the number of image files."""
        return len(self.names)

    def key(self, index: int) -> str:
        """Return the path of image number `index` below the folder, as `patchloom.io.printable` writes it."""
        return printable(self._file(index))

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        key = self.key(index)
        label = -1 if self.labels is None else int(self.labels[index])
        path = self.root / self._file(index)
        image = decode_image(path, key, self.in_chans, "invert", self.values, self.channels)
        return Sample(image, label, key, self.named(index))

    def caption(self, index: int) -> str:
        """Return the caption of image number `index`, empty where no file has one."""
        if not self.captions or not (file := self.caption_files[index]):
            return ""
        try:
            return caption_text((self.root / file).read_bytes(), self.key(index))
        except OSError as error:
            raise UnreadableImageError(self.key(index), f"its caption cannot be read: {error.strerror}") from error

    def _file(self, index: int) -> str:
        return self.names[index]

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), self.root / self._file(index)

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times."""
        return self._stamp


def chosen_images(
    root: Path,
    include: str | None = None,
    exclude: str | None = None,
    passed: Counter[str] | None = None,
    other: Callable[[str], object] | None = None,
) -> list[tuple[str, int, int]]:
    """Return (path below root, size, time) of the image files globs choose, in the order of their paths.

    Other files are counted by their suffix in `passed`; `other` is called with the path of each.

    Raises:
        UsageError: There are images, and none is chosen.
    """
    found = sorted(walk_images(root, passed, other))
    if include is None and exclude is None:
        return found
    names = set(choose((printable(name) for name, _, _ in found), include, exclude))
    chosen = [file for file in found if printable(file[0]) in names]
    if found and not chosen:
        asked = " and ".join(
            f"{word} {globs}" for word, globs in (("include", include), ("exclude", exclude)) if globs is not None
        )
        raise UsageError(
            f"{asked} leaves none of the {len(found)} images in {printable(root)}; the first is "
            f"{printable(found[0][0])}"
        )
    return chosen


def walk_images(
    root: Path, passed: Counter[str] | None = None, other: Callable[[str], object] | None = None
) -> Iterator[tuple[str, int, int]]:
    """Yield (path below root, size, time) of image files; folders reached twice through links are entered once.

    Files of other suffixes are counted in `passed`, and `other` is called with the path of each.
    """
    seen: set[tuple[int, int]] = set()
    stack = [("", str(root))]
    while stack:
        prefix, folder = stack.pop()
        try:
            status = Path(folder).stat()
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(identity)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # a folder that may not be read, or a link to itself
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    stack.append((f"{prefix}{entry.name}/", entry.path))
                    continue
                suffix = _suffix(entry.name)
                if suffix in READ and entry.is_file():
                    about = entry.stat()
                    yield f"{prefix}{entry.name}", about.st_size, about.st_mtime_ns
                elif passed is not None and entry.is_file():
                    passed[suffix] += 1
                    if other is not None:
                        other(f"{prefix}{entry.name}")
            except OSError:
                continue


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "none"  # noqa: PTH122


def _collector(texts: dict[str, str], is_caption: Callable[[str], str | None]) -> Callable[[str], None]:
    """Return what keeps the captions among files, by the image they belong to."""

    def collect(name: str) -> None:
        if (key := is_caption(name)) is not None:
            texts[key] = name

    return collect


def _counted(passed: Counter[str]) -> str:
    """Return suffixes with how many files have them: `.txt 10, .json 2`."""
    told = ", ".join(f"{printable(suffix)} {count:,}" for suffix, count in passed.most_common(5))
    return told + (f" and {len(passed) - 5} suffixes more" if len(passed) > 5 else "")


def _named_otherwise(path: str | Path, passed: Counter[str]) -> str:
    """Return how a folder is named for its videos or volumes to be read, where files were passed over that are some."""
    prefixes = [prefix for prefix, suffixes in ELSEWHERE.items() if suffixes & {*passed}]
    return "".join(f"; {prefix}:{printable(path)} reads its {prefix.replace('clips', 'videos')}" for prefix in prefixes)


def _why_unlabelled(names: list[bytes], tops: list[bytes | None], classes: list[bytes]) -> str:
    """Return what a folder has in place of classes, for `no_labels`."""
    count = "its one image lies" if len(names) == 1 else f"its {len(names)} images lie"
    if not classes:
        return f"{UNLABELLED} ({count} in none)"
    if None in tops:
        stray = printable(os.fsdecode(names[tops.index(None)]))
        there = "a sub-folder" if len(classes) == 1 else f"{len(classes)} sub-folders"
        return f"{UNLABELLED} (it has {there}, but {stray} lies in none)"
    name = printable(os.fsdecode(classes[0]))
    return f"has one class, {name} ({count} in that sub-folder), and two at least are needed"


def _notice_masks(name: str, root: Path, names: Sequence[str], chosen: bool) -> None:
    """Say when a folder looks as if masks lay among its images, by their names or as many are black and white."""
    if chosen or name in _NOTICED:
        return
    stems = Counter(map(stem, names))
    pairs = sum(count > 1 for count in stems.values())
    tops = {one.partition("/")[0] for one in names if "/" in one}
    remedy = "--exclude, or take the others with --include"
    said = ""
    if pairs and 4 * pairs >= len(stems):
        first = printable(next(one for one, count in stems.items() if count > 1))
        said = f"{pairs} pairs of images differ in their suffix alone ({first}.*)"
    elif (ending := ending_beside(names)) is not None:
        said, remedy = f"every image has another beside it whose name ends in {ending}", f"--mask_field {ending}"
    elif "images" in tops and (masks := next((one for one in MASK_FOLDERS if one in tops), None)) is not None:
        said, remedy = f"it has the folders images and {masks}", f"--mask_field {masks}/"
    elif (share := _two_tone_share(root, names)) >= 0.25:
        said = f"about {share:.0%} of the images are black and white alone"
    if said:
        _NOTICED.add(name)
        print(f"{name}: {said}; if these are masks, leave them out with {remedy}", file=sys.stderr)


def _two_tone_share(root: Path, names: Sequence[str]) -> float:
    """Return the share of images, of a few, whose pixels are black or white but for one in a hundred."""
    places = np.linspace(0, len(names) - 1, min(len(names), LOOKED_AT)).astype(int)
    found = looked = 0
    for place in places.tolist():
        file = root / names[place]
        try:
            looked += 1
            if file.stat().st_size > MOST_BYTES:  # masks are small files; photographs are not worth decoding for this
                continue
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # deeper than 8 bits: no mask that anyone writes
                    continue
                values = np.asarray(image.convert("L"), dtype=np.int16)
        except Exception:  # a broken image is listed where it is read
            continue
        low, high = int(values.min()), int(values.max())
        near = (high - low) // 20
        found += high - low >= 128 and float(((values <= low + near) | (values >= high - near)).mean()) >= 0.99
    return found / looked if looked >= 4 else 0.0


def _hash(found: list[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256()
    for name, size, changed in found:
        digest.update(f"{name}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
