"""Images named by a list, with a class each or with several labels, below one folder."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.base.source_options import choose
from patchloom.data.base import Sample, Source, spread
from patchloom.data.decode import decode_image
from patchloom.data.dicom import Monochrome1, check_monochrome1
from patchloom.data.fields import CAPTION, caption_text
from patchloom.data.folder import walk_images
from patchloom.errors import UsageError
from patchloom.io import printable, raw_name

SHOWN = 10
NOTHING: Mapping[str, Sequence[Any]] = {}


class ListedSource(Source):
    """The images of a list, in its order.

    Args:
        name: The source as the user named it.
        root: Folder that holds the images, at any depth.
        files: Path below the root of every image, or its file name where that is unique below the root.
        labels: (n,) int64 class numbers, or (n, L) float32 in [0, 1] with NaN where unknown; None: there are none.
        class_names: Names of the classes or labels; None: there are none.
        in_chans: Channels the images are read as, 3 or 1.
        monochrome1: What becomes of DICOM images whose zero is white.
        include: Globs of the files to take of the list, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.
        beside: What else the list says of each image, by field, such as the file of its mask; of captions a list for
            each image.

    Raises:
        UsageError: Files missing (the first ten are named; of images with captions more than half, fewer are unreadable
            images), a file name that several folders hold, or globs that leave nothing.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        labels: np.ndarray | None,
        class_names: Sequence[str] | None,
        in_chans: int = 3,
        monochrome1: Monochrome1 = "invert",
        include: str | None = None,
        exclude: str | None = None,
        beside: Mapping[str, Sequence[Any]] = NOTHING,
    ) -> None:
        check_monochrome1(monochrome1)
        self.name = printable(name)
        self.root = root
        if include is not None or exclude is not None:
            chosen = set(choose(map(printable, files), include, exclude))
            kept = [place for place, file in enumerate(files) if printable(file) in chosen]
            if not kept:
                raise UsageError(f"{self.name}: include and exclude leave none of the {len(files)} images listed")
            files, labels = [files[place] for place in kept], None if labels is None else labels[kept]
            beside = {field: [cells[place] for place in kept] for field, cells in beside.items()}
        self.beside = dict(beside)
        self.captions = CAPTION.name in self.beside
        if self.captions and any(len(several) > 1 for several in self.beside[CAPTION.name]):
            self.caption_counts = np.array([max(1, len(several)) for several in self.beside[CAPTION.name]])
        self.labels = labels
        self.class_names = None if class_names is None else list(class_names)
        self.in_chans = in_chans
        self.monochrome1 = monochrome1
        self.files, stamps = self.places(name, root, files)
        names = [*self.files, *(self.class_names or [])]
        digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape"))
        digest.update(stamps.tobytes() + (b"" if labels is None else labels.tobytes()))
        self._stamp = digest.hexdigest()[:16]

    def places(self, name: str, root: Path, files: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Return where the files of the list are, see `located`."""
        return located(name, root, files, some_missing=self.captions)

    def __len__(self) -> int:
        """Return the number of images listed."""
        return len(self.files)

    def key(self, index: int) -> str:
        """Return the path of image number `index` below the root, as `patchloom.io.printable` writes it."""
        return printable(self.files[index])

    def read(self, index: int) -> Sample:
        """Return image number `index` with its class number or its vector of labels."""
        key = self.key(index)
        path = self.root / self.files[index]
        image = decode_image(path, key, self.in_chans, self.monochrome1, self.values, self.channels)
        label = -1 if self.labels is None else self.labels[index]
        return Sample(image, label if self.multilabel else int(label), key, self.named(index))

    def caption(self, index: int) -> str:
        """Return the caption of image number `index`, empty where the list has none."""
        return self.captions_of(index)[0]

    def captions_of(self, index: int) -> list[str]:
        """Return all captions of image number `index`."""
        given = self.beside[CAPTION.name][index] if self.captions else ()
        return [caption_text(one, self.key(index)) for one in given] or [""]

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), self.root / self.files[index]

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes, times and labels."""
        return self._stamp


def located(
    name: str, root: Path, files: Sequence[str], what: str = "images", *, some_missing: bool = False
) -> tuple[list[str], np.ndarray]:
    """Return the paths of the files from the root on, and their sizes and times (n, 2) int64.

    A path that leads out of the root (`../other/a.png`, `/data/a.png`) is taken as it is. With `some_missing` up to
    half of the files may be missing: that is said, and who reads one finds that it is not there.

    Raises:
        UsageError: Files missing (the first ten are named), or a file name that several folders hold.
    """
    if not root.is_dir():
        raise UsageError(f"{name}: there is no folder {root}")
    places: dict[str, tuple[int, int]] = {}
    outside = {file: raw_name(file) for file in files if Path(file).is_absolute() or ".." in Path(file).parts}
    for file, raw in outside.items():
        for path in (file, raw):
            if (root / path).is_file():
                about = (root / path).stat()
                places[path] = about.st_size, about.st_mtime_ns
                break
    if len(outside) == len(files) and len(places) == len(set(files)):
        paths = [file if file in places else outside[file] for file in files]
        return paths, np.array([places[path] for path in paths], dtype=np.int64).reshape(-1, 2)
    by_name: dict[str, str] = {}
    several: set[str] = set()
    for path, size, changed in walk_images(root):
        places[path] = size, changed
        short = path.rpartition("/")[2]
        several |= {short} if short in by_name else set()
        by_name[short] = path
    # A list may name a file as we write it where its name is not UTF-8.
    files = [file if file in places or file in by_name else raw_name(file) for file in files]
    # Only a bare name is looked for elsewhere: in another folder the same name may be another patient.
    paths = [file if file in places else by_name.get(file, "") for file in files]
    if missing := [file for file, path in zip(files, paths, strict=True) if not path]:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        told = (
            f"{name}: {len(missing)} of {len(files)} {what} listed are not below {root}: "
            f"{', '.join(map(printable, missing[:SHOWN]))}{more}"
        )
        if not some_missing or 2 * len(missing) > len(files):
            raise UsageError(told)
        print(f"{told}; they are unreadable images", file=sys.stderr)
        paths = [path or file for file, path in zip(files, paths, strict=True)]
        places |= dict.fromkeys(missing, (-1, -1))
    if unclear := [file for file in files if file not in places and file in several]:
        raise UsageError(f"{name}: several folders below {root} hold a {printable(unclear[0])}; list it by its path")
    return paths, np.array([places[path] for path in paths], dtype=np.int64).reshape(-1, 2)
