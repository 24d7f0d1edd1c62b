"""Images and their labels by a table, a CSV or Parquet file beside the images.

    file,label                         one class per image
    a/1.png,benign

    file,Edema,Effusion                several labels per image: 1, 0, or nothing where unknown
    a/1.png,1,0
    a/2.png,,1

A column `split` is no label: `FILE.csv:test` takes the rows whose split is `test`, `FILE.csv` takes all.

Only an empty cell is a missing label: `none`, `NA` or `-1` in a column of classes is a class like any other, unless
`missing` names it. In columns of several labels -1 and nan, which are no shares, are unknown as well, and are counted
aloud; what stands there for uncertain in CheXpert is for its own reader.

>>> source = LabelFileSource("my/labels.csv:train")  # doctest: +SKIP
>>> source.class_names, source.labels.shape  # doctest: +SKIP
(['Edema', 'Effusion'], (120, 2))
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from patchloom.base.source_options import words
from patchloom.data.listed import ListedSource
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import existing, printable

FILE, SPLIT = ("file", "filename", "path", "image", "key"), "split"
ONE = ("label", "class", "grade", "target")
SUFFIXES = (".csv", ".parquet")
_WHOLE = re.compile(r"^(-?\d+)\.0+$")
_TRUTHS = {"true": 1.0, "false": 0.0}
# Numbers that are no share of a label and are written by other tools where it is unknown.
NO_SHARE = ("-1", "-1.0", "nan")


def is_label_file(name: str) -> bool:
    """Return whether a source's name means a table of labels, with or without a split behind it."""
    ends = name.endswith(SUFFIXES) and not Path(name).is_dir()
    return ends or (any(f"{suffix}:" in name for suffix in SUFFIXES) and not Path(name).exists())


class LabelFileSource(ListedSource):
    """The images a CSV or Parquet file lists, with a class each or with several labels.

    Args:
        name: Path of the file, with `:SPLIT` behind it to take the rows of one split.
        root: Folder of the images; default: that of the file.
        in_chans: Channels the images are read as, 3 or 1.
        include: Globs of the files to take of the list, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.
        missing: Words that stand for a missing label besides an empty cell, separated by commas.

    Raises:
        UsageError: No such file or split, columns missing, a label that is no number from 0 to 1, a file named twice,
            images that are not there (the first ten are named).
    """

    def __init__(
        self,
        name: str,
        root: str | Path | None = None,
        in_chans: int = 3,
        include: str | None = None,
        exclude: str | None = None,
        missing: str | None = None,
    ) -> None:
        path, _, split = (name, "", "") if existing(name).exists() else name.rpartition(":")
        table = existing(path or name)
        shown = printable(table)
        if not table.is_file():
            raise UsageError(
                f"there is no label file {printable(path or name)}; give a CSV or Parquet file with the columns file "
                f"and label"
            )
        columns, rows = _parquet(table) if table.suffix == ".parquet" else _csv(table)
        file = next((column for column in columns if column.lower() in FILE), None)
        named = [column for column in columns if column != file and column.lower() != SPLIT]
        if file is None or not named:
            raise UsageError(
                f"{shown} has the columns {', '.join(columns) or 'none'}; it needs file, and label or labels"
            )
        if split:
            rows = _of_split(shown, rows, columns, split)
        if not rows:
            raise UsageError(f"{shown} lists no image")
        files = [row[file] for row in rows]
        double = [one for one, count in zip(*np.unique(files, return_counts=True), strict=True) if count > 1]
        if double:
            raise UsageError(f"{shown} names {double[0]} {files.count(double[0])} times; give each image one row")
        unknown = ("", *words(missing))
        if len(named) == 1 and (named[0].lower() in ONE or not _all_shares(rows, named[0], unknown)):
            labels, names = _classes(rows, named[0], unknown)
        else:
            labels, names = _shares(shown, rows, named, unknown), named
        names = [printable(one) for one in names]
        folder = Path(root) if root is not None else table.parent
        super().__init__(name, folder, files, labels, names, in_chans, include=include, exclude=exclude)


def _csv(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return columns and rows of a table; cells that are not there are empty."""
    # File names need not be UTF-8, see patchloom.io.
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        reader = csv.DictReader(handle)
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        rows = [{column: _written(row[column] or "", column) for column in columns} for row in reader]
    return columns, [row for row in rows if any(row.values())]  # spreadsheets save lines of commas alone


def _written(cell: str, column: str) -> str:
    """Return a cell as it is meant: pandas writes whole numbers as 2.0 where a column has gaps; blanks are no text."""
    if column.lower() in FILE:
        return cell  # a file's name may begin or end with a blank
    return _WHOLE.sub(r"\1", cell.strip())


def _parquet(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return columns and rows of a table as `_csv` does; null is an empty cell, 2.0 the same as 2."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading .parquet") from error
    try:
        read = parquet.read_table(table)
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{printable(table)} is no Parquet file: {' '.join(str(error).split())[:100]}") from error
    columns = [column.strip() for column in read.column_names]
    cells = [[_cell(value) for value in column.to_pylist()] for column in read.columns]
    return columns, [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]


def _cell(value: object) -> str:
    if value is None or value != value:  # pandas writes a gap as NaN
        return ""
    if isinstance(value, float) and value.is_integer():  # a column of numbers with gaps holds them as 2.0
        return str(int(value))
    return str(int(value) if isinstance(value, bool) else value).strip()


def _of_split(table: str, rows: list[dict[str, str]], columns: list[str], split: str) -> list[dict[str, str]]:
    column = next((column for column in columns if column.lower() == SPLIT), None)
    if column is None:
        raise UsageError(f"{table} has no column split, so there is no {split} in it; leave :{split} out")
    chosen = [row for row in rows if row[column] == split]
    if not chosen:
        known = ", ".join(sorted({row[column] for row in rows})[:10])
        raise UsageError(f"{table} has no split {split!r} (it has {known})")
    return chosen


def _classes(rows: list[dict[str, str]], column: str, unknown: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return class numbers, -1 where nothing is given, and the names in the order of their numbers or letters."""
    given = [row[column] for row in rows]
    found = {value for value in given if value not in unknown}
    names = number_order(found)
    number = {name: place for place, name in enumerate(names)}
    return np.array([number.get(value, -1) for value in given], dtype=np.int64), names


def number_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of their numbers where all are some, else of their letters.

    The order is the same in every process, whatever order a set has there: 01 comes before 1, nan after all others.

    >>> number_order({"10", "2", "nan"})
    ['2', '10', 'nan']
    """
    names = sorted(names)
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return names
    places = sorted(range(len(names)), key=lambda place: (math.isnan(numbers[place]), numbers[place]))
    return [names[place] for place in places]


def _shares(table: str, rows: list[dict[str, str]], columns: list[str], unknown: Sequence[str]) -> np.ndarray:
    """Return labels (n, L) float32, NaN where nothing is given."""
    labels = np.full((len(rows), len(columns)), np.nan, dtype=np.float32)
    beyond = 0
    for line, row in enumerate(rows):
        for place, column in enumerate(columns):
            value = row[column]
            if value in unknown:
                continue
            if value.lower() in NO_SHARE:
                beyond += 1
                continue
            share = _share(value)
            if share is None:
                raise UsageError(
                    f"{table}, line {line + 2}: {column} is {value!r}; a label is 1, 0, a share between, or nothing "
                    f"where unknown (--missing {value} takes that for unknown, too)"
                )
            labels[line, place] = share
    if beyond:
        print(f"{table}: {beyond} labels are -1 or nan and taken for unknown", file=sys.stderr)
    return labels


def _share(value: str) -> float | None:
    if value.lower() in _TRUTHS:  # pandas writes columns of booleans so
        return _TRUTHS[value.lower()]
    try:
        share = float(value)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def _all_shares(rows: list[dict[str, str]], column: str, unknown: Sequence[str]) -> bool:
    given = [row[column] for row in rows]
    return all(value in unknown or value.lower() in NO_SHARE or _share(value) is not None for value in given)
