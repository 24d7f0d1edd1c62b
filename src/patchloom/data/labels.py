"""Images and their labels by a table: a CSV file beside the images.

    file,label                         one class per image
    a/1.png,benign

    file,Edema,Effusion                several labels per image: 1, 0, or nothing (-1, nan) where unknown
    a/1.png,1,0
    a/2.png,,1

A column `split` is no label: `FILE.csv:test` takes the rows whose split is `test`, `FILE.csv` takes all.

>>> source = LabelFileSource("my/labels.csv:train")  # doctest: +SKIP
>>> source.class_names, source.labels.shape  # doctest: +SKIP
(['Edema', 'Effusion'], (120, 2))
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from patchloom.data.listed import ListedSource
from patchloom.errors import UsageError

FILE, SPLIT = ("file", "filename", "path", "image", "key"), "split"
ONE = ("label", "class", "grade", "target")
UNKNOWN = ("", "-1", "-1.0", "nan", "na", "none", "?")


class LabelFileSource(ListedSource):
    """The images a CSV file lists, with a class each or with several labels.

    Args:
        name: Path of the file, with `:SPLIT` behind it to take the rows of one split.
        root: Folder of the images; default: that of the file.
        in_chans: Channels the images are read as, 3 or 1.

    Raises:
        UsageError: No such file or split, columns missing, a label that is no number from 0 to 1, a file named twice,
            images that are not there (the first ten are named).
    """

    def __init__(self, name: str, root: str | Path | None = None, in_chans: int = 3) -> None:
        path, _, split = (name, "", "") if Path(name).exists() else name.rpartition(":")
        table = Path(path or name)
        if not table.is_file():
            raise UsageError(f"there is no label file {path or name}; give a CSV file with the columns file and label")
        with table.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = list(reader)
        file = next((column for column in columns if column.lower() in FILE), None)
        named = [column for column in columns if column != file and column.lower() != SPLIT]
        if file is None or not named:
            raise UsageError(
                f"{table} has the columns {', '.join(columns) or 'none'}; it needs file, and label or labels"
            )
        if split:
            rows = _of_split(table, rows, columns, split)
        if not rows:
            raise UsageError(f"{table} lists no image")
        files = [(row[file] or "").strip() for row in rows]
        double = [one for one, count in zip(*np.unique(files, return_counts=True), strict=True) if count > 1]
        if double:
            raise UsageError(f"{table} names {double[0]} {files.count(double[0])} times; give each image one row")
        if len(named) == 1 and (named[0].lower() in ONE or not _all_shares(rows, named[0])):
            labels, names = _classes(rows, named[0])
        else:
            labels, names = _shares(table, rows, named), named
        super().__init__(name, Path(root) if root is not None else table.parent, files, labels, names, in_chans)


def _of_split(table: Path, rows: list[dict[str, str]], columns: list[str], split: str) -> list[dict[str, str]]:
    column = next((column for column in columns if column.lower() == SPLIT), None)
    if column is None:
        raise UsageError(f"{table} has no column split, so there is no {split} in it; leave :{split} out")
    chosen = [row for row in rows if (row[column] or "").strip() == split]
    if not chosen:
        known = ", ".join(sorted({(row[column] or "").strip() for row in rows})[:10])
        raise UsageError(f"{table} has no split {split!r} (it has {known})")
    return chosen


def _classes(rows: list[dict[str, str]], column: str) -> tuple[np.ndarray, list[str]]:
    """Return class numbers, -1 where nothing is given, and the names in the order of their numbers or letters."""
    given = [(row[column] or "").strip() for row in rows]
    found = {value for value in given if value.lower() not in UNKNOWN}
    try:
        names = sorted(found, key=float)
    except ValueError:
        names = sorted(found)
    number = {name: place for place, name in enumerate(names)}
    return np.array([number.get(value, -1) for value in given], dtype=np.int64), names


def _shares(table: Path, rows: list[dict[str, str]], columns: list[str]) -> np.ndarray:
    """Return labels (n, L) float32, NaN where nothing is given."""
    labels = np.full((len(rows), len(columns)), np.nan, dtype=np.float32)
    for line, row in enumerate(rows):
        for place, column in enumerate(columns):
            value = (row[column] or "").strip()
            if value.lower() in UNKNOWN:
                continue
            share = _share(value)
            if share is None:
                raise UsageError(
                    f"{table}, line {line + 2}: {column} is {value!r}; a label is 1, 0, a share between, or nothing "
                    f"where unknown"
                )
            labels[line, place] = share
    return labels


def _share(value: str) -> float | None:
    try:
        share = float(value)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def _all_shares(rows: list[dict[str, str]], column: str) -> bool:
    given = [(row[column] or "").strip() for row in rows]
    return all(value.lower() in UNKNOWN or _share(value) is not None for value in given)
