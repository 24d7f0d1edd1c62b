"""Choices of images as tables: CSV files that are given as data like any other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.folder import FolderSource
from patchloom.data.labels import BETWEEN, LabelFileSource
from patchloom.errors import UsageError
from patchloom.io import check_place, write_rows

Files = FolderSource | LabelFileSource


def as_files(source: Source | StreamSource, what: str) -> Files:
    """Return a source whose images are files by name.

    Raises:
        UsageError: They are not: in shards, of a library, several files to an image.
    """
    if isinstance(source, (FolderSource, LabelFileSource)):
        return source
    raise UsageError(f"{what} lists files, and the images of {source.name} are none; give a folder or a table of files")


def checked_table(out: str, overwrite: bool) -> Path:
    """Return where a table is written.

    Raises:
        UsageError: It does not end in .csv, exists, or cannot be made.
    """
    path = check_place(out)
    if path.suffix != ".csv":
        raise UsageError(f"out is {out}; name a file that ends in .csv")
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another file, or set overwrite to replace it")
    return path


def write_listing(
    path: Path, source: Files, places: Iterable[int], columns: Mapping[str, Mapping[int, str]] | None = None
) -> None:
    """Write images of a source as a table that stands for them: file, label, caption, and what else is said of them.

    Args:
        path: CSV file; paths in it are from its folder on.
        source: Images.
        places: Numbers of the images.
        columns: Further columns: by name, what stands there by the number of the image.
    """
    root, extra = Path(os.path.relpath(source.root.resolve(), path.parent.resolve())), dict(columns or {})
    names, labels = source.class_names, source.labels
    one_each = labels is not None and labels.ndim == 1
    header = ["file", *(["label"] if one_each else ["labels"] if labels is not None else [])]
    header += [*(["caption"] if source.captions else []), *extra]

    def label(place: int) -> list[str]:
        if labels is None or names is None:
            return []
        if one_each:
            return [names[int(labels[place])] if labels[place] >= 0 else ""]
        known = labels[place]
        return ["" if np.isnan(known).all() else BETWEEN.join(names[k] for k in np.flatnonzero(known > 0.5)) or BETWEEN]

    def caption(place: int) -> list[str]:
        try:
            return [source.caption(place)] if source.captions else []
        except UnreadableImageError:
            return [""]

    rows = (
        [
            str(root / source.key(place)),
            *label(place),
            *caption(place),
            *(column.get(place, "") for column in extra.values()),
        ]
        for place in places
    )
    write_rows(path, header, rows)
