"""What sources of clouds and sounds share: files below a folder, classes by sub-folder, pictures and captions beside.

`chair/a.ply` is of the class `chair`; `a.png`, `a_1.png` … beside it are pictures of it, `a.txt` says what it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.source_options import choose
from patchloom.data.base import Source, UnreadableImageError
from patchloom.data.decode import IMAGE_SUFFIXES, decode_image
from patchloom.data.fields import caption_text
from patchloom.data.pixels import unit
from patchloom.data.sample import OnDemand
from patchloom.errors import UsageError
from patchloom.io import printable


class PicturedSource(Source):
    """Files of a folder that are no images, each with its class, its pictures and its caption where there are any.

    Args:
        path: The folder, or one file.
        suffixes: Of the files to take.
        what: What they are called, in errors.
        labels: `folder`: the top-level sub-folder is the class; `none`: no labels; `auto`: as `folder` where every file
            lies in one of at least two sub-folders.
        include: Globs of the files to take; default: all.
        exclude: Globs of files to leave out.

    Attributes:
        side: Height and width that pictures are brought to.

    Raises:
        UsageError: No such folder, no such file in it, or files outside the sub-folders with `folder`.
    """

    side = 224

    def __init__(
        self,
        path: str | Path,
        suffixes: Collection[str],
        what: str,
        labels: str = "auto",
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        self.name, root = printable(path), Path(path)
        if not root.exists():
            raise UsageError(f"there is no folder of {what} {path}")
        everything = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
        self.root = root.parent if root.is_file() else root
        names = [str(file.relative_to(self.root)) for file in everything if file.suffix.lower() in suffixes]
        names = choose(names, include=include, exclude=exclude)
        if not names:
            raise UsageError(f"no {what} in {path} or below (looked for {', '.join(sorted(suffixes))})")
        self.files = [self.root / name for name in names]
        beside: dict[Path, list[Path]] = {}
        for file in everything:
            if file.suffix.lower() in IMAGE_SUFFIXES:
                beside.setdefault(file.parent, []).append(file)
        taken = {file.with_suffix("") for file in self.files}
        self.pictured = {file: _pictures(file, beside.get(file.parent, []), taken) for file in self.files}
        texts = set(everything)
        self.captions = any(file.with_suffix(".txt") in texts for file in self.files)
        tops = [printable(Path(name).parts[0]) if len(Path(name).parts) > 1 else None for name in names]
        if labels == "folder" and None in tops:
            raise UsageError(
                f"labels=folder needs every file in a sub-folder of {path}; {names[tops.index(None)]} is not"
            )
        if labels != "none" and None not in tops and (labels == "folder" or len(set(tops)) > 1):
            self.class_names = sorted({top for top in tops if top is not None})
            self.labels = np.array([self.class_names.index(str(top)) for top in tops], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def key(self, index: int) -> str:
        """Return the path of a file below the folder, as `patchloom.io.printable` writes it."""
        return printable(self.files[index].relative_to(self.root))

    def label(self, index: int) -> int:
        """Return the class of a file, -1 where unknown."""
        return -1 if self.labels is None else int(self.labels[index])

    def caption(self, index: int) -> str:
        """Return what stands in the text beside a file, empty where there is none."""
        file = self.files[index].with_suffix(".txt")
        try:
            return caption_text(file.read_bytes(), self.key(index)) if file.exists() else ""
        except OSError as error:
            raise UnreadableImageError(self.key(index), str(error)) from error

    def pictures(self, index: int) -> Tensor | None:
        """Return the pictures beside a file, (V, 3, side, side) uint8; None where there are none."""
        from patchloom.data.transforms import EvalTransform

        found = self.pictured[self.files[index]]
        if not found:
            return None
        view = EvalTransform(self.side, 1.0)
        images = [view(decode_image(file, self.key(index)), torch.Generator())["image"] for file in found]
        return torch.stack([(unit(image) * 255).round().to(torch.uint8) for image in images])

    def named(self, index: int) -> Mapping[str, Any]:
        """Return the caption, and the pictures (V, 3, side, side) uint8, each made when it is asked for."""
        makers: dict[str, Any] = {"pictures": partial(self._pictures, index)}
        return OnDemand(**makers, **({"caption": partial(self.caption, index)} if self.captions else {}))

    def _pictures(self, index: int) -> Tensor:
        found = self.pictures(index)
        return torch.empty(0, 3, self.side, self.side, dtype=torch.uint8) if found is None else found

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            about = self.files[index].stat()
            digest.update(f"{self.key(index)}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def _pictures(file: Path, images: list[Path], taken: Collection[Path]) -> list[Path]:
    """Return the images of a file: of its name, or of its name, an underscore and more, unless that is another's."""
    stem = file.stem
    return [
        image
        for image in images
        if image.stem == stem or (image.stem.startswith(f"{stem}_") and image.with_suffix("") not in taken)
    ]
