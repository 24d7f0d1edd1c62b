"""Images with labelled points, by a CSV file.

    file,row,column,label
    a/1.png,120,40,crop
    a/1.png,12,300,soil

`x` and `y` may stand in place of `column` and `row`; pixels count from 0.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchloom.data.listed import ListedSource
from patchloom.data.sample import OnDemand
from patchloom.errors import UsageError
from patchloom.io import existing, printable

FILE, LABEL = ("file", "image", "path"), ("label", "class")
ROW, COLUMN = ("row", "y"), ("column", "col", "x")


class PointTableSource(ListedSource):
    """The images of a table of points, each with `points` (n, 2), row and column in pixels, and `point_classes` (n,).

    Args:
        path: The CSV file.
        root: Folder of the images; default: that of the file.
        in_chans: Channels the images are read as.
        include: Globs of the images to take; default: all.
        exclude: Globs of images to leave out.

    Raises:
        UsageError: No such file, no columns of this kind, a place that is no number or lies before the first pixel, a
            point without label, or images missing.
    """

    class_names: list[str]

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        in_chans: int = 3,
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        place = existing(path)
        shown = printable(place)
        columns = columns_of(place)
        if columns is None:
            raise UsageError(f"{shown} is no table of points; its columns are file, row, column and label")
        by_file: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        with place.open(encoding="utf-8-sig", newline="") as lines:
            for number, line in enumerate(csv.DictReader(lines), start=2):
                row, column = (_place(line[columns[name]], name, number, shown) for name in ("row", "column"))
                label = (line[columns["label"]] or "").strip()
                if not label:
                    raise UsageError(f"{shown}, line {number}: a point without a label")
                by_file[line[columns["file"]]].append((row, column, label))
        if not by_file:
            raise UsageError(f"{shown} lists no point")
        names = sorted({label for points in by_file.values() for _, _, label in points})
        files = list(by_file)
        self.points_by_file = by_file
        options: dict[str, Any] = {"include": include, "exclude": exclude, "beside": {"listed": files}}
        super().__init__(
            shown, Path(root) if root is not None else place.parent, files, None, names, in_chans, **options
        )

    def named(self, index: int) -> Mapping[str, Any]:
        """Return points of image number `index` and their classes, made when they are asked for."""
        return OnDemand(points=partial(self.points, index), point_classes=partial(self.point_classes, index))

    def points(self, index: int) -> Tensor:
        """Return the points of image number `index`, (n, 2): row and column."""
        return torch.tensor([place[:2] for place in self._of(index)], dtype=torch.float32).reshape(-1, 2)

    def point_classes(self, index: int) -> Tensor:
        """Return their classes, (n,)."""
        return torch.tensor([self.class_names.index(label) for _, _, label in self._of(index)], dtype=torch.int64)

    def _of(self, index: int) -> list[tuple[float, float, str]]:
        return self.points_by_file[self.beside["listed"][index]]


def columns_of(place: Path) -> dict[str, str] | None:
    """Return the columns of a table of points by what they hold; None where a file is no such table."""
    if place.suffix.lower() != ".csv" or not place.is_file():
        return None
    with place.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        header = {name.strip().lower(): name for name in next(csv.reader(lines), [])}
    found = {}
    for what, known in (("file", FILE), ("row", ROW), ("column", COLUMN), ("label", LABEL)):
        match = next((header[name] for name in known if name in header), None)
        if match is None:
            return None
        found[what] = match
    return found


def _place(text: str | None, name: str, line: int, shown: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{shown}, line {line}: {name} is {text!r}; give a number of a pixel from 0")
    return value
