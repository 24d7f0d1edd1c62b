"""A folder of images, at any depth.

>>> source = FolderSource("my/folder")  # doctest: +SKIP
>>> len(source), source.class_names  # doctest: +SKIP
(1300, None)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from patchloom.data.base import Sample, Source
from patchloom.data.decode import IMAGE_SUFFIXES, decode_image
from patchloom.errors import UsageError

Labels = Literal["auto", "folder", "none"]


class FolderSource(Source):
    """All images below a folder, in the order of their paths.

    Names are held in one block of bytes: a million files take some tens of megabytes, and handing the source to
    data workers costs nothing.

    Args:
        path: The folder.
        labels: `folder`: the top-level sub-folder is the class. `none`: no labels. `auto`: as `folder` when every
            image lies in one of at least two sub-folders.
        in_chans: Channels the images are read as, 3 or 1.

    Raises:
        UsageError: There is no such folder, no image in it, or an image outside the sub-folders with `folder`.
    """

    def __init__(self, path: str | Path, labels: Labels = "auto", in_chans: int = 3) -> None:
        self.name = str(path)
        self.root = Path(path)
        self.in_chans = in_chans
        if not self.root.is_dir():
            kind = "is a file" if self.root.exists() else "does not exist"
            raise UsageError(f"the image folder {path} {kind}; give the folder that holds the images")
        found = sorted(walk_images(self.root))
        if not found:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UsageError(f"no image in {self.root.resolve()} or below (looked for {known})")
        names = [os.fsencode(name) for name, _, _ in found]
        self.offsets = np.cumsum([0] + [len(name) for name in names])
        self.names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._stamp = _hash(found)
        self._label(names, labels)

    def _label(self, names: list[bytes], labels: Labels) -> None:
        tops = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
        classes = sorted({top for top in tops if top is not None})
        inside = all(top is not None for top in tops)
        if labels == "none" or (labels == "auto" and not (inside and len(classes) > 1)):
            return
        if not inside:
            stray = os.fsdecode(names[tops.index(None)])
            raise UsageError(f"labels=folder needs every image in a sub-folder of {self.root}; {stray} is in none")
        index = {name: number for number, name in enumerate(classes)}
        self.class_names = [os.fsdecode(name) for name in classes]
        self.labels = np.array([index[top] for top in tops if top is not None], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of image files."""
        return len(self.offsets) - 1

    def key(self, index: int) -> str:
        """Return the path of image number `index` below the folder."""
        return os.fsdecode(self.names[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        key = self.key(index)
        label = -1 if self.labels is None else int(self.labels[index])
        return Sample(decode_image(self.root / key, key, self.in_chans), label, key)

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times."""
        return self._stamp


def walk_images(root: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (path below root, size, time) of image files; folders reached twice through links are entered once."""
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
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():  # noqa: PTH122
                    about = entry.stat()
                    yield f"{prefix}{entry.name}", about.st_size, about.st_mtime_ns
            except OSError:
                continue


def _hash(found: list[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256()
    for name, size, changed in found:
        digest.update(f"{name}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
