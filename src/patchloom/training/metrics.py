"""`metrics.csv`: one row per logged step, in a file a spreadsheet opens."""

from __future__ import annotations

import csv
import io
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from patchloom.io import write_rows


class CSVMetrics(Logger):
    """Lightning logger that keeps `metrics.csv` readable at any moment and continues it on resume.

    Values logged for the same step share a row; a column that turns up late is empty in earlier rows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.saved_at = 0.0
        known = ((int(row["step"]), row) for row in read_metrics(path))
        self.rows: dict[int, dict[str, float]] = {step: row | {"step": step} for step, row in known}

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Version of the logger; a run folder holds one run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters: they stand in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        row = self.rows.setdefault(int(step or 0), {"step": int(step or 0)})
        row.update({name: float(value) for name, value in metrics.items()})
        if time.monotonic() - self.saved_at > 2:  # the whole file is written each time
            self.save()

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop rows after `step`: the run resumes there and will log them again."""
        self.rows = {number: row for number, row in self.rows.items() if number <= step}

    @rank_zero_only
    def save(self) -> None:
        """Write the file anew beside the old one, then put it in its place."""
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        rows = (self.rows[number] for number in sorted(self.rows))
        write_rows(self.path, columns, ([row.get(name, "") for name in columns] for row in rows))
        self.saved_at = time.monotonic()

    def finalize(self, status: str) -> None:
        """Write what is not written yet."""
        self.save()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a `metrics.csv` (none if the file is not there), without empty cells.

    Lines that are damaged, such as a last one that was cut off, are left out with a warning.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "?")
    whole, _, rest = text.rpartition("\n")
    damaged = 1 if rest else 0
    rows = []
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        try:
            rows.append({name: float(value) for name, value in row.items() if value} | {"step": float(row["step"])})
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        warnings.warn(f"{path} is damaged; {damaged} of its lines are left out", stacklevel=2)
    return rows


def series(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of one column."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [x for x, _ in points], [y for _, y in points]
