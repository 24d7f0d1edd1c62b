"""Bags with their labels: a store of tile features and a table of labels, matched by the names of the slides.

>>> cohort = read_cohort("features/", "labels.csv")  # doctest: +SKIP
>>> cohort.task.kind, len(cohort)  # doctest: +SKIP
('binary', 120)
"""

from __future__ import annotations

import csv
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchloom.base.choices import TileChoice as Choice
from patchloom.base.source_options import words
from patchloom.errors import UsageError
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.tasks import Kind, Task
from patchloom.evaluate.slides.wsi import SLIDE_SUFFIXES
from patchloom.io import printable, raw_name

MOST_CLASSES = 50


@dataclass(frozen=True)
class Cohort:
    """Slides with a label each."""

    names: list[str]
    """Of the slides."""
    bags: list[Tensor] = field(repr=False)
    """(n_i, D) features of each, float32 or float16."""
    labels: np.ndarray
    """(slides,) class numbers, or signed times."""
    patients: list[str]
    """Whose slide it is; slides of one patient stay together."""
    task: Task
    """What is asked."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Slides that take no part, by reason."""
    places: list[np.ndarray] = field(default_factory=list, repr=False)
    """(n_i, 2) column and row of each tile."""

    def __len__(self) -> int:
        """Return the number of slides."""
        return len(self.names)

    @property
    def width(self) -> int:
        """Return the width of the features."""
        return int(self.bags[0].shape[1])

    def per_patient(self, scores: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return patients in order of appearance, their labels, and the mean of the scores of their slides."""
        patients = list(dict.fromkeys(self.patients))
        number = {patient: place for place, patient in enumerate(patients)}
        owner = np.array([number[patient] for patient in self.patients])
        counts = np.bincount(owner).reshape(-1, *[1] * (scores.ndim - 1))
        sums = np.zeros((len(patients), *scores.shape[1:]))
        np.add.at(sums, owner, scores)
        labels = np.zeros(len(patients), self.labels.dtype)
        labels[owner] = self.labels
        return patients, labels, sums / counts


def read_cohort(
    features: str | Path,
    labels: str | Path,
    *,
    kind: Kind | None = None,
    classes: Sequence[str] | None = None,
    label_column: str = "label",
    slide_column: str = "slide",
    patient_column: str = "patient",
    n_tiles: int | None = 1000,
    choice: Choice = "random",
    missing: str | None = None,
) -> Cohort:
    """Return the slides that have both features and a label.

    Args:
        features: Folder of tile features.
        labels: CSV with a header; slides may be written with the suffix of their file, an empty label means none.
        kind: What is asked; default: two classes or several, as the labels say.
        classes: Names of the classes, in order; default: those in the table, sorted.
        label_column: Column of the class, or of the signed time (negative where censored).
        slide_column: Column of the slide's name.
        patient_column: Column of the patient; without one each slide is a patient of its own.
        n_tiles: Most tiles of a slide that are read; None: all.
        choice: Which: a random subset that is the same every time, or the first ones as the published benchmark does.
        missing: Words that stand for a missing label besides an empty cell, separated by commas.

    Raises:
        UsageError: No such column, no slide in common, contradictory labels, or labels that are no task.
    """
    store = TileStore(features)
    rows = _rows(Path(labels), slide_column, label_column)
    unknown = {"", *words(missing)}
    known = set(store.names())
    names = [name for name in rows if name in known and rows[name][label_column].strip() not in unknown]
    left_out = {
        "has a label, but no features": [name for name in rows if name not in known],
        "has features, but no label": sorted(known - set(rows)),
        "has an empty label": [name for name in rows if name in known and not rows[name][label_column].strip()],
        "has a label that stands for a missing one": [
            name for name in rows if name in known and rows[name][label_column].strip() in unknown - {""}
        ],
    }
    left_out = {reason: slides for reason, slides in left_out.items() if slides}
    if not names:
        example = next(iter(rows), "none")
        raise UsageError(
            f"no slide of {labels} has features in {features}; the table names {example!r}, the features are of "
            f"{sorted(known)[0]!r} and others"
        )
    for reason, slides in left_out.items():
        shown = ", ".join(slides[:3]) + (f" and {len(slides) - 3} more" if len(slides) > 3 else "")
        warnings.warn(f"left out, since it {reason}: {shown}", stacklevel=2)
    values = [rows[name][label_column].strip() for name in names]
    task, numbers = _task(values, kind, classes, labels)
    patients = [rows[name].get(patient_column, "").strip() or name for name in names]
    _refuse_contradictions(patients, values)
    bags = [_bag(store, name, n_tiles, choice) for name in names]
    widths = {bag.shape[1] for bag, _ in bags}
    if len(widths) > 1:
        raise UsageError(f"{features} holds features of widths {sorted(widths)}; one encoder makes one width")
    return Cohort(names, [b for b, _ in bags], numbers, patients, task, left_out, [places for _, places in bags])


def _bag(store: TileStore, name: str, n_tiles: int | None, choice: Choice) -> tuple[Tensor, np.ndarray]:
    """Return the features of a slide in memory, and the places of the tiles."""
    bag = store.bag(name)
    if len(bag) == 0:
        raise UsageError(f"slide {name} in {store.path} has no tiles; delete its folder")
    rows: np.ndarray | slice = slice(n_tiles)
    if choice == "random" and n_tiles is not None and len(bag) > n_tiles:
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        rows = np.sort(generator.choice(len(bag), n_tiles, replace=False))
    features = np.array(bag.features[rows])
    if not np.isfinite(features).all():
        raise UsageError(
            f"features of slide {name} in {store.path} are not finite; the encoder or its precision failed"
        )
    return torch.from_numpy(features), bag.places[rows]


def _rows(path: Path, slide_column: str, label_column: str) -> dict[str, dict[str, str]]:
    """Return the rows of a table by slide."""
    if not path.is_file():
        raise UsageError(f"there is no table of labels {path}")
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in (slide_column, label_column):
            if column not in columns:
                raise UsageError(f"{path} has no column {column!r}; its columns are {', '.join(columns) or 'none'}")
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            name = (row[slide_column] or "").strip()
            if Path(name).suffix.lower() in SLIDE_SUFFIXES:
                name = Path(name).stem
            name = printable(raw_name(name))  # as tile features are called
            cells = {key: value or "" for key, value in row.items() if key is not None}
            if name in rows and rows[name][label_column] != cells[label_column]:
                raise UsageError(
                    f"{path} labels slide {name} both {rows[name][label_column]!r} and {cells[label_column]!r}"
                )
            rows[name] = cells
    return rows


def _task(
    values: list[str], kind: Kind | None, classes: Sequence[str] | None, where: str | Path
) -> tuple[Task, np.ndarray]:
    if kind == "survival":
        try:
            times = np.array([float(value) for value in values])
        except ValueError as error:
            raise UsageError(f"survival times are numbers, negative where censored; {where}: {error}") from error
        if (times == 0).any() or not np.isfinite(times).all():
            raise UsageError(f"{where} has a survival time of 0 or none; times are positive, negative where censored")
        return Task("survival"), times
    names = list(classes) if classes is not None else sorted(set(values), key=_natural)
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise UsageError(f"{where} has the class {unknown[0]!r}, which is not among {', '.join(names)}")
    if len(names) < 2:
        raise UsageError(f"{where} has the class {names[0]!r} only; two are needed")
    if classes is None and len(names) > max(2, min(MOST_CLASSES, len(values) // 2)):
        raise UsageError(f"{where} has {len(names)} classes for {len(values)} slides; for times set task to survival")
    if kind == "binary" and len(names) != 2:
        raise UsageError(f"{where} has {len(names)} classes, so the task is multiclass, not binary")
    number = {name: place for place, name in enumerate(names)}
    found: Kind = kind or ("binary" if len(names) == 2 else "multiclass")
    return Task(found, tuple(names)), np.array([number[value] for value in values], dtype=np.int64)


def _natural(value: str) -> tuple[float, str]:
    """Sort numbers as numbers, before words."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _refuse_contradictions(patients: list[str], values: list[str]) -> None:
    seen: dict[str, str] = {}
    for patient, value in zip(patients, values, strict=True):
        if seen.setdefault(patient, value) != value:
            raise UsageError(
                f"slides of patient {patient} have the labels {seen[patient]!r} and {value!r}; one is needed"
            )
