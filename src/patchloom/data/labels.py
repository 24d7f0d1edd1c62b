"""Images and their labels by a table, a CSV or Parquet file beside the images.

    file,label                         one class per image
    a/1.png,benign

    file,Edema,Effusion                several labels per image: 1, 0, or nothing where unknown
    a/1.png,1,0
    a/2.png,,1

    file,labels                        names of several labels in one column; | alone: none of them
    a/1.png,Edema|Effusion

    file,mask,caption                  what else belongs to an image, with labels or without
    a/1.png,masks/1.png,a lung

A column `split` is no label: `FILE.csv:test` takes the rows whose split is `test`, `FILE.csv` takes all. What columns
may be called stands in `fields`; `image_field`, `label_field`, `mask_field` and `caption_field` name others.

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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from patchloom.base.source_options import words
from patchloom.data.fields import CAPTION, IMAGE, LABEL, LABELS, MASK, SPLIT, Field, find, find_several
from patchloom.data.listed import ListedSource
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import existing, printable

SUFFIXES = (".csv", ".tsv", ".parquet")
_WHOLE = re.compile(r"^(-?\d+)\.0+$")
_TRUTHS = {"true": 1.0, "false": 0.0}
# Numbers that are no share of a label and are written by other tools where it is unknown.
NO_SHARE = ("-1", "-1.0", "nan")
BETWEEN = "|"
Rows = list[dict[str, str]]


def is_label_file(name: str) -> bool:
    """Return whether a source's name means a table of labels, with or without a split behind it."""
    ends = name.endswith(SUFFIXES) and not Path(name).is_dir()
    return ends or (any(f"{suffix}:" in name for suffix in SUFFIXES) and not Path(name).exists())


class LabelFileSource(ListedSource):
    """The images a CSV or Parquet file lists, with a class each or with several labels, masks and captions.

    Args:
        name: Path of the file, with `:SPLIT` behind it to take the rows of one split.
        root: Folder of the images; default: that of the file.
        in_chans: Channels the images are read as, 3 or 1.
        include: Globs of the files to take of the list, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of files to leave out.
        missing: Words that stand for a missing label besides an empty cell, separated by commas.
        image_field: Column of the images' paths; default: see `fields`, as for those that follow.
        label_field: Column of the classes, or columns of several labels, separated by commas.
        mask_field: Column of the masks' paths.
        caption_field: Column of the captions.
        labelled: Read labels; otherwise other columns may hold anything.

    Attributes:
        columns: Names of the columns.

    Raises:
        UsageError: No such file, split or column, columns missing, a label that is no number from 0 to 1, a file named
            twice where there are no captions, images that are not there (the first ten are named).
    """

    file_field: ClassVar[Field] = IMAGE

    def __init__(
        self,
        name: str,
        root: str | Path | None = None,
        in_chans: int = 3,
        include: str | None = None,
        exclude: str | None = None,
        missing: str | None = None,
        image_field: str | None = None,
        label_field: str | None = None,
        mask_field: str | None = None,
        caption_field: str | None = None,
        labelled: bool = True,
    ) -> None:
        path, _, split = (name, "", "") if existing(name).exists() else name.rpartition(":")
        table = existing(path or name)
        shown = printable(table)
        if not table.is_file():
            raise UsageError(
                f"there is no label file {printable(path or name)}; give a CSV or Parquet file with the columns file "
                f"and label"
            )
        columns, rows, lists = _parquet(table) if table.suffix == ".parquet" else _csv(table)
        asked = (image_field, label_field, mask_field, caption_field)
        found = _assigned(shown, columns, rows, self.file_field, *asked)
        found = found if labelled else found._replace(labels=[])
        self.columns = columns
        # Names of files may begin or end with a blank, and captions are no numbers.
        for column in {*found.labels, *(one for one in columns if one.lower() in SPLIT.columns)}:
            for row in rows:
                row[column] = _written(row[column]) if table.suffix != ".parquet" else row[column]
        whole = rows
        if split:
            rows = _of_split(shown, rows, columns, split)
        if not rows:
            raise UsageError(f"{shown} lists no image")
        files = [row[found.file] for row in rows]
        double = [one for one, count in zip(*np.unique(files, return_counts=True), strict=True) if count > 1]
        captions: list[list[str]] = []
        if found.caption is not None:
            rows, captions = _by_image(shown, rows, found)
            files = [row[found.file] for row in rows]
        elif double:
            raise UsageError(f"{shown} names {double[0]} {files.count(double[0])} times; give each image one row")
        labels: np.ndarray | None
        names: list[str] | None
        unknown = ("", *words(missing))
        if len(found.labels) == 1 and _holds_several(whole, found.labels[0], lists, label_field is not None):
            labels, names = _named_labels(rows, whole, found.labels[0], unknown, lists.get(found.labels[0], False))
        else:
            labels, names = _labels(shown, rows, found.labels, unknown)
        names = None if names is None else [printable(one) for one in names]
        if names is None:
            self.why_unlabelled = f"has no column of labels (its columns: {', '.join(columns)})"
        beside: dict[str, list[Any]] = {}
        if found.mask is not None:
            beside[MASK.name] = [row[found.mask] for row in rows]
        if found.caption is not None:
            beside[CAPTION.name] = captions
        folder = Path(root) if root is not None else table.parent
        options = {"include": include, "exclude": exclude, "beside": beside}
        super().__init__(name, folder, files, labels, names, in_chans, **options)  # type: ignore[arg-type]


class _Columns(NamedTuple):
    """What the columns of a table hold."""

    file: str
    labels: list[str]
    mask: str | None
    caption: str | None


def _assigned(
    table: str,
    columns: list[str],
    rows: Rows,
    files: Field,
    image_field: str | None,
    label_field: str | None,
    mask_field: str | None,
    caption_field: str | None,
) -> _Columns:
    """Return which column holds what.

    Raises:
        UsageError: A column that was named is not there, or there is none of images, or nothing beside them.
    """
    file = find(files, columns, image_field, table)
    if file is None:
        raise UsageError(
            f"{table} has the columns {', '.join(columns) or 'none'}; it needs file, and label or labels, mask or "
            f"caption (--image_field names a column of images that is called otherwise)"
        )
    others = [column for column in columns if column != file]
    labels = find_several(LABEL, others, label_field, table)
    taken = set(labels or [])

    def beside(field: Field, asked: str | None) -> str | None:
        column = find(field, [one for one in others if one not in taken], asked, table)
        # A label may be called mask: what holds nothing but 1 and 0 names no files.
        is_label = column is not None and asked is None and any(row[column] for row in rows)
        return None if is_label and column is not None and _all_shares(rows, column, ("",)) else column

    mask = beside(MASK, mask_field)
    taken |= {mask} if mask is not None else set()
    caption = beside(CAPTION, caption_field)
    if labels is None:
        named = (mask, caption)
        labels = [one for one in others if one not in named and one.lower() not in SPLIT.columns]
    if not labels and mask is None and caption is None:
        raise UsageError(f"{table} has the columns {', '.join(columns)}; it needs file, and label or labels")
    return _Columns(file, labels, mask, caption)


def _csv(table: Path) -> tuple[list[str], Rows, dict[str, bool]]:
    """Return columns and rows of a table, cells as they stand, empty where there are none; no column holds lists."""
    # File names need not be UTF-8, see patchloom.io.
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        heading = handle.readline()
        handle.seek(0)
        # open_clip's tables have tabs between cells, those of spreadsheets in much of Europe semicolons.
        between = next((mark for mark in "\t;" if "," not in heading and mark in heading), ",")
        reader = csv.DictReader(handle, delimiter=between)
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        rows = [{column: row[column] or "" for column in columns} for row in reader]
    # Spreadsheets save lines of commas alone.
    return columns, [row for row in rows if any(cell.strip() for cell in row.values())], {}


def _by_image(table: str, rows: Rows, found: _Columns) -> tuple[Rows, list[list[str]]]:
    """Return the first row of each image, and the different captions of all its rows.

    Raises:
        UsageError: Rows of one image say other things of it than captions.
    """
    assert found.caption is not None
    others = [*found.labels, *([found.mask] if found.mask is not None else [])]
    first: dict[str, dict[str, str]] = {}
    captions: dict[str, list[str]] = {}
    for row in rows:
        name, caption = row[found.file], row[found.caption]
        known = first.setdefault(name, row)
        if apart := next((column for column in others if row[column] != known[column]), None):
            raise UsageError(f"{table} names {name} several times, and {apart} is {known[apart]!r} and {row[apart]!r}")
        several = captions.setdefault(name, [])
        if caption.strip() and caption not in several:
            several.append(caption)
    return list(first.values()), list(captions.values())


def _written(cell: str) -> str:
    """Return a cell as it is meant: pandas writes whole numbers as 2.0 where a column has gaps; blanks are no text."""
    return _WHOLE.sub(r"\1", cell.strip())


def _parquet(table: Path) -> tuple[list[str], Rows, dict[str, bool]]:
    """Return columns and rows of a table as `_csv` does, and which hold lists, of numbers or not; null is empty."""
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
    for column, kind in zip(columns, read.schema.types, strict=True):
        if column.lower() in IMAGE.columns and (pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind)):
            raise UsageError(
                f"{printable(table)} holds images in the column {column} and no names of files; give its folder as "
                f"hf:{printable(table.parent)}"
            )
    cells = [[_cell(value) for value in column.to_pylist()] for column in read.columns]
    lists = {
        column: not (pyarrow.types.is_string(kind.value_type) or pyarrow.types.is_large_string(kind.value_type))
        for column, kind in zip(columns, read.schema.types, strict=True)
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    }
    return columns, [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)], lists


def _cell(value: object) -> str:
    if value is None or value != value:  # pandas writes a gap as NaN
        return ""
    if isinstance(value, list):
        return BETWEEN.join(map(_cell, value)) or BETWEEN
    if isinstance(value, float) and value.is_integer():  # a column of numbers with gaps holds them as 2.0
        return str(int(value))
    return str(int(value) if isinstance(value, bool) else value).strip()


def _of_split(table: str, rows: Rows, columns: list[str], split: str) -> Rows:
    column = find(SPLIT, columns, None, table)
    if column is None:
        raise UsageError(f"{table} has no column split, so there is no {split} in it; leave :{split} out")
    chosen = [row for row in rows if row[column] == split]
    if not chosen:
        known = ", ".join(sorted({row[column] for row in rows})[:10])
        raise UsageError(f"{table} has no split {split!r} (it has {known})")
    return chosen


def _labels(
    table: str, rows: Rows, columns: list[str], unknown: Sequence[str]
) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels and their names as `ListedSource` takes them; neither where no column holds any."""
    if not columns:
        return None, None
    if len(columns) == 1 and (columns[0].lower() in LABEL.columns or not _all_shares(rows, columns[0], unknown)):
        return classes([row[columns[0]] for row in rows], unknown)
    return _shares(table, rows, columns, unknown), columns


def _named_labels(
    rows: Rows, whole: Rows, column: str, unknown: Sequence[str], numbers: bool
) -> tuple[np.ndarray, list[str]]:
    """Return labels of rows whose cells name several, and the names in the whole table: splits have the same."""
    labels, names = several([_words_of(row[column], unknown, numbers) for row in whole])
    wanted = {id(row) for row in rows}
    return labels[[id(row) in wanted for row in whole]], names


def _holds_several(rows: Rows, column: str, lists: Mapping[str, bool], asked: bool) -> bool:
    """Return whether cells of a column name several labels: it holds lists, or | in a column called so or asked for."""
    called_so = asked or column.lower() in LABELS.columns
    return column in lists or (called_so and any(BETWEEN in row[column] for row in rows))


def _words_of(cell: str, unknown: Sequence[str], numbers: bool) -> list[str] | list[float] | None:
    if cell in unknown:
        return None
    found = [word for part in cell.split(BETWEEN) if (word := part.strip())]
    return [float(word) for word in found] if numbers else found


def are_vectors(given: Sequence[Sequence[object]]) -> bool:
    """Return whether labels are a share of every label, from 0 to 1, and no numbers or names of those that are there.

    >>> are_vectors([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), are_vectors([[2.0, 5.0], [1.0]])
    (True, False)
    """
    shares = all(isinstance(one, float) and 0 <= one <= 1 for row in given for one in row)
    lengths = {len(row) for row in given}
    return shares and len(lengths) == 1 and min(lengths) > 1


def several(rows: Sequence[Sequence[str | float] | None]) -> tuple[np.ndarray, list[str]]:
    """Return labels (n, L) float32 and their L names; NaN where None stands for unknown.

    Args:
        rows: Of each image the names of its labels, their numbers, or a share of every label (see `are_vectors`).
    """
    if are_vectors([row for row in rows if row is not None]):
        length = next(len(row) for row in rows if row is not None)
        shares = [[np.nan] * length if row is None else row for row in rows]
        return np.array(shares, np.float32), [str(number) for number in range(length)]
    given = [None if row is None else [one if isinstance(one, str) else str(int(one)) for one in row] for row in rows]
    names = number_order({word for words_ in given if words_ is not None for word in words_})
    number = {name: place for place, name in enumerate(names)}
    labels = np.zeros((len(given), len(names)), np.float32)
    for line, words_ in enumerate(given):
        if words_ is None:
            labels[line] = np.nan
        else:
            labels[line, [number[word] for word in words_]] = 1
    return labels, names


def classes(given: Sequence[str], unknown: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return class numbers, -1 where nothing is given, and the names in the order of their numbers or letters."""
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


def _shares(table: str, rows: Rows, columns: list[str], unknown: Sequence[str]) -> np.ndarray:
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
                alone = find(LABEL, columns, None, table) or column
                raise UsageError(
                    f"{table}, line {line + 2}: {column} is {value!r}; a label is 1, 0, a share between, or nothing "
                    f"where unknown (--missing {value} takes that for unknown, too; --label_field {alone} takes that "
                    f"column alone)"
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


def _all_shares(rows: Rows, column: str, unknown: Sequence[str]) -> bool:
    given = [row[column].strip() for row in rows]
    return all(value in unknown or value.lower() in NO_SHARE or _share(value) is not None for value in given)
