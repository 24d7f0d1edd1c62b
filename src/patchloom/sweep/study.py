"""Tables of many runs: each cell is computed once, kept on disk, and cannot take the others down with it.

A study is a list of cells and a function that computes one. What is done stands in the study's folder, one small JSON
file a cell; started again, a study computes what is missing and what failed before. Its table is written as Markdown,
CSV and a self-contained page.

>>> from tempfile import mkdtemp
>>> cells = [Cell({"side": str(side)}, {"side": side}) for side in (2, 3)]
>>> done = run_cells(cells, lambda cell: {"area": cell.settings["side"] ** 2}, mkdtemp(), say=lambda line: None)
>>> [outcome.figures["area"] for outcome in done]
[4, 9]
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from patchloom.base import stopping
from patchloom.errors import UsageError, unknown_name
from patchloom.io import check_place, make_folder, write_json, write_text

CELLS = "cells"

BESIDE = {"balanced_accuracy": "balanced accuracy", "majority_share": "commonest class"}
"""What an accuracy is read beside: key in the figures, column of tables."""


@dataclass(frozen=True)
class Cell:
    """One entry of a study."""

    labels: Mapping[str, str]
    """What tells it from the others, by column: `{"encoder": "mine", "protocol": "knn"}`."""
    settings: Mapping[str, Any]
    """What it is computed from; plain values, so that a changed one is noticed."""

    @property
    def name(self) -> str:
        """A file name: its labels, and a digest of its settings."""
        words = "-".join("".join(c if c.isalnum() else "_" for c in value) for value in self.labels.values())
        plain = json.dumps([dict(self.labels), dict(self.settings)], sort_keys=True, default=str)
        return f"{words[:80]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        return " · ".join(self.labels.values())


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: figures, or the reason why there are none."""

    cell: Cell
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def run_cells(
    cells: Sequence[Cell],
    work: Callable[[Cell], dict[str, Any]],
    folder: str | Path,
    *,
    say: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Compute the cells that are not done yet, in order, and return all.

    Args:
        cells: The study.
        work: Returns the figures of a cell; whatever it raises is noted as that cell's failure.
        folder: Where outcomes are kept, in `cells/`.
        say: Told of each cell, with an estimate of the time left; default: printed to standard error.

    Raises:
        UsageError: Two cells have the same labels.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    seen: set[tuple[tuple[str, str], ...]] = set()
    for cell in cells:
        key = tuple(cell.labels.items())
        if key in seen:
            raise UsageError(f"two entries of the study are called {cell}; give them different names")
        seen.add(key)
    cells_folder = Path(folder) / CELLS
    make_folder(cells_folder)
    outcomes: dict[str, Outcome] = {}
    for cell in cells:
        if (stored := _read(cells_folder / f"{cell.name}.json", cell)) is not None and stored.error is None:
            outcomes[cell.name] = stored
    if outcomes:
        say(f"{len(outcomes)} of {len(cells)} cells are done already")
    missing = [cell for cell in cells if cell.name not in outcomes]
    started = time.monotonic()
    for number, cell in enumerate(missing):
        begun = time.monotonic()
        try:
            outcome = Outcome(cell, work(cell))
        except stopping.Stopped:
            say(f"stopped in {cell}, {len(outcomes)} of {len(cells)} cells are done; started again, the study goes on")
            raise
        except Exception as error:
            if (signalled := stopping.received()) is not None:  # what failed may have failed for it
                raise stopping.Stopped(signalled) from error
            outcome = Outcome(cell, error=" ".join(str(error).split()) or type(error).__name__)
        outcomes[cell.name] = outcome
        _write(cells_folder / f"{cell.name}.json", outcome)
        left = (time.monotonic() - started) / (number + 1) * (len(missing) - number - 1)
        result = f"failed: {outcome.error}" if outcome.error else "done"
        more = f"; about {left / 60:.0f} min left" if left > 90 else f"; about {left:.0f} s left" if left > 1 else ""
        say(f"[{number + 1}/{len(missing)}] {cell}: {result} ({time.monotonic() - begun:.0f} s{more})")
    return [outcomes[cell.name] for cell in cells]


def _read(path: Path, cell: Cell) -> Outcome | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Outcome(cell, dict(stored["figures"]), stored["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never done, or cut off: it is computed


def _write(path: Path, outcome: Outcome) -> None:
    values = {
        "labels": dict(outcome.cell.labels),
        "settings": dict(outcome.cell.settings),
        "figures": outcome.figures,
        "error": outcome.error,
    }
    write_json(path, values, indent=1, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)  # arrays and their numbers


def claim_folder(out: str | Path, recipe: Mapping[str, Any], overwrite: bool = False) -> Path:
    """Return the folder of a study, with its recipe inside; a folder of something else is refused.

    The recipe may change between starts: cells whose settings stay the same are kept.

    Raises:
        UsageError: The folder holds something that is no study.
    """
    folder = check_place(out)
    if folder.is_file():
        raise UsageError(f"{folder} is a file; a study is a folder, choose another out")
    if folder.exists() and any(folder.iterdir()) and not (folder / CELLS).is_dir() and not overwrite:
        raise UsageError(f"{folder} exists and holds no study; choose another out, or set overwrite")
    if overwrite:
        for file in (folder / CELLS).glob("*.json"):
            file.unlink()
    make_folder(folder / CELLS)
    write_text(folder / "study.yaml", yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))
    return folder


def read_recipe(path: str | Path, known: Iterable[str], needed: Iterable[str]) -> dict[str, Any]:
    """Return the contents of a study's YAML file.

    Raises:
        UsageError: No such file, no mapping, an unknown key (with the nearest) or a missing one.
    """
    from patchloom.io import read_config

    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}; a study is described in a YAML file, see the docs of the command")
    recipe = read_config(Path(path))
    names = list(known)
    for name in recipe:
        if name not in names:
            raise unknown_name(f"key in {path}", str(name), names)
    if missing := [name for name in needed if not recipe.get(name)]:
        raise UsageError(f"{path} lacks {' and '.join(missing)}")
    return recipe


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV, columns in the order in which they first appear."""
    import io

    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return Path(path)


class Table(str):
    """The table of a study as Markdown, for a person; `rows` has its figures, for a program.

    >>> Table("| n |", [{"n": 1.0}]).rows
    [{'n': 1.0}]
    """

    rows: Any

    def __new__(cls, text: str, rows: Any) -> Table:
        table = super().__new__(cls, text)
        table.rows = rows
        return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table.

    >>> print(markdown([{"a": "x", "b": 0.25}, {"a": "y"}]))
    | a | b |
    | --- | --- |
    | x | 0.25 |
    | y |  |
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell_text(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell_text(value: Any) -> str:
    from patchloom.report.page import format_value

    return str(format_value(value)).replace("|", "\\|").replace("\n", " ")
