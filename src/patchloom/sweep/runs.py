"""The runs below a folder in one table, and several of them side by side: figures, curves, what was set differently.

Only the small text files of a run are read, so that hundreds are listed in a second, whatever made them.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchloom.base.source_options import words
from patchloom.errors import UsageError
from patchloom.io import check_place, existing, printable, read_config, write_json
from patchloom.training.saved import command_of

CONFIG, SUMMARY, METRICS, FAILURE = "config.yaml", "summary.json", "metrics.csv", "failure.json"
FIGURES = (
    "accuracy", "balanced_accuracy", "macro_auroc",  "miou", "dice", "image_auroc", "pixel_auroc", "map",
    "knn_accuracy", "rankme", "loss",
)  # fmt: skip
"""Figures that are shown where a run has them, unless others are asked for; the first is what a list sorts by."""
ALIVE_SECONDS = 180
"""A run whose files have changed this recently counts as running."""
MOST_RUNS = 12
PLACES = ("out", "resume", "overwrite")
"""Settings that differ between any two runs and say nothing."""


@dataclass
class Run:
    """What a run folder says of itself."""

    path: Path
    command: str
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    changed: float = 0.0

    @property
    def state(self) -> str:
        """`finished`, `failed`, `running`, or `stopped`, from which it can go on."""
        total = self.summary.get("total_steps")
        if (self.path / FAILURE).exists() and not self.summary:
            return "failed"
        if (
            self.summary
            and not self.summary.get("interrupted")
            and (total is None or self.summary.get("steps") == total)
        ):
            return "finished"
        return "running" if time.time() - self.changed < ALIVE_SECONDS else "stopped"

    def figure(self, name: str) -> float | None:
        """Return a final figure, by its key in the summary; keys of what lies deeper are joined by dots."""
        value: Any = self.summary
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def read_run(path: Path) -> Run | None:
    """Return what a folder says, or None where it is no run."""
    command = command_of(path)
    if command is None:
        return None
    files = [path / name for name in (CONFIG, SUMMARY, METRICS, "checkpoints") if (path / name).exists()]
    run = Run(path, command, changed=max(file.stat().st_mtime for file in files))
    try:
        run.settings = read_config(path / CONFIG)
    except UsageError:
        run.settings = {}
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        run.summary = summary if isinstance(summary, dict) else {}
    except (OSError, ValueError):
        run.summary = {}
    run.steps = int(run.summary.get("steps") or 0) or _last_step(path / METRICS)
    return run


def find_runs(folder: str | Path) -> list[Run]:
    """Return the runs in a folder and below it; what lies within a run is that run's own.

    Raises:
        UsageError: There is no such folder, or no run in it.
    """
    root = existing(folder)
    if not root.is_dir():
        raise UsageError(f"there is no folder {printable(root)}; give one that holds runs")
    found = [run for path in _folders(root) if (run := read_run(path)) is not None]
    if not found:
        raise UsageError(f"no run of patchloom in {printable(root)} or below (looked for {CONFIG})")
    return found


def list_runs(
    folder: str = "runs", *, figures: str | None = None, sort: str | None = None, state: str | None = None
) -> list[dict[str, Any]]:
    """List the runs in a folder and below it.

    Args:
        folder: Where to look.
        figures: Figures to show, names of summary.json separated by commas; default: accuracies, IoU, k-NN, loss, those
            that a run here has.
        sort: Figure to sort by, the highest first; default: the latest run first.
        state: Only runs that are finished, stopped, failed or running.

    Returns:
        A row for each: run, command, encoder, data, state, steps, figures, time it took, when it was last written to.

    Raises:
        UsageError: No such folder, no run in it, or a figure that none of them has.
    """
    runs = [run for run in find_runs(folder) if state is None or run.state == state]
    if not runs:
        raise UsageError(f"no run in {folder} is {state}; states are finished, stopped, failed and running")
    shown = _shown(runs, figures)
    if sort is not None:
        if all(run.figure(sort) is None for run in runs):
            raise UsageError(f"no run in {folder} has the figure {sort}; summary.json lists what there is")
        runs.sort(key=lambda run: -(value if (value := run.figure(sort)) is not None else float("-inf")))
    else:
        runs.sort(key=lambda run: -run.changed)
    return [_row(run, shown, Path(folder)) for run in runs]


def compare_runs(
    runs: str, *, out: str | None = None, figures: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Put runs side by side: figures, curves, and what was set differently.

    Args:
        runs: Run folders separated by commas, or a folder that holds them.
        out: Folder to write to: report.html with curves, and comparison.json; default: none.
        figures: Figures to show, names of summary.json separated by commas.
        overwrite: Replace the files of an earlier comparison.

    Returns:
        `runs`, a row for each, and `settings` that differ, a row for each with the runs' values.

    Raises:
        UsageError: Fewer than two runs, a folder that is none, or files in `out`.
    """
    folder = None if out is None else check_place(out)
    if folder is not None and (folder / "comparison.json").exists() and not overwrite:
        raise UsageError(f"{folder} holds comparison.json; choose another out, or set overwrite to replace it")
    named = words(runs)
    chosen = find_runs(named[0]) if len(named) == 1 else [_one(name) for name in named]
    if len(chosen) < 2:
        raise UsageError(f"{runs} is one run; name two or more, separated by commas")
    names = _short_names([run.path for run in chosen])
    shown = _shown(chosen, figures)
    rows = [{"run": name, **_facts(run, shown)} for name, run in zip(names, chosen, strict=True)]
    result: dict[str, Any] = {"runs": rows, "settings": differing([run.settings for run in chosen], names)}
    if folder is not None:
        _write_page(folder / "report.html", chosen, names, result, runs)
        write_json(folder / "comparison.json", result)
        result["out"] = str(folder)
    return result


def differing(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each setting that is not the same in all runs; one that a run does not have is None.

    >>> differing([{"lr": 1, "epochs": 5}, {"lr": 2, "epochs": 5}], ["a", "b"])
    [{'setting': 'lr', 'a': 1, 'b': 2}]
    """
    keys = dict.fromkeys(key for one in settings for key in one if key not in PLACES)
    return [
        {"setting": key} | {name: one.get(key) for name, one in zip(names, settings, strict=True)}
        for key in keys
        if any(one.get(key) != settings[0].get(key) for one in settings)
    ]


def read_curve(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a column of metrics.csv; empty where it is not there."""
    steps, values = [], []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                step, value = float(row["step"]), float(row[name])
            except (KeyError, TypeError, ValueError):
                continue
            steps.append(step)
            values.append(value)
    return steps, values


def _folders(root: Path) -> Iterator[Path]:
    """Yield folders that hold settings, from the top; none below one that does."""
    if (root / CONFIG).is_file():
        yield root
        return
    try:
        below = sorted(entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for path in below:
        if not Path(path).name.startswith("."):
            yield from _folders(Path(path))


def _one(name: str) -> Run:
    run = read_run(existing(name))
    if run is None:
        raise UsageError(f"{name} is no run of patchloom: it has no {CONFIG} of one")
    return run


def _last_step(path: Path) -> int:
    """Return the steps that metrics.csv tells of, from its last lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    steps = [int(first) for line in lines if (first := line.partition(",")[0]).isdigit()]
    return steps[-1] + 1 if steps else 0


def _shown(runs: Sequence[Run], figures: str | None) -> list[str]:
    if figures is None:
        return [name for name in FIGURES if any(run.figure(name) is not None for run in runs)]
    asked = words(figures)
    for name in asked:
        if all(run.figure(name) is None for run in runs):
            known = sorted({key for run in runs for key in run.summary if run.figure(key) is not None})
            raise UsageError(f"none of the runs has the figure {name}; they have {', '.join(known[:30]) or 'none yet'}")
    return asked


def _row(run: Run, figures: Sequence[str], folder: Path) -> dict[str, Any]:
    inside = run.path.resolve().is_relative_to(folder.resolve()) and run.path.resolve() != folder.resolve()
    name = str(run.path.resolve().relative_to(folder.resolve())) if inside else str(run.path)
    return {"run": printable(name), **_facts(run, figures)}


def _facts(run: Run, figures: Sequence[str]) -> dict[str, Any]:
    total = run.summary.get("total_steps")
    return {
        "command": run.command,
        "encoder": _place(run.settings.get("encoder")),
        "data": _place(run.settings.get("data", run.settings.get("train"))),
        "state": run.state,
        "steps": f"{run.steps}/{total}" if total and total != run.steps else run.steps or None,
        **{name: run.figure(name) for name in figures},
        "took": run.summary.get("duration"),
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)),
    }


def _place(value: Any) -> str | None:
    """Return a place or name, of a long path its end."""
    text = None if value is None else printable(str(value))
    return text if text is None or len(text) <= 32 else f"…{text[-31:]}"


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return what tells paths apart: their last part, or as many of the last as it takes."""
    for count in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return [printable(name) for name in names]
    raise UsageError("one run is named twice; name different ones")


def _write_page(path: Path, runs: Sequence[Run], names: Sequence[str], result: dict[str, Any], asked: str) -> None:
    import shlex

    from patchloom.report.page import Section, write_report
    from patchloom.report.plots import curves

    if len(runs) > MOST_RUNS:
        raise UsageError(f"{len(runs)} runs are too many for curves in one picture; name {MOST_RUNS} at most")
    charts = []
    for figure in FIGURES:
        series = {}
        for name, run in zip(names, runs, strict=True):
            steps, values = read_curve(run.path / METRICS, figure) if (run.path / METRICS).exists() else ([], [])
            if values:
                series[name] = (steps, values)
        if series:
            charts.append(
                curves(series, x_label="step", y_label=figure.replace("_", " "), title=figure.replace("_", " "))
            )
    settings = [{key: str(value) for key, value in row.items()} for row in result["settings"]]
    write_report(
        path,
        title=f"{len(runs)} runs side by side",
        subtitle=", ".join(names),
        facts={"runs": len(runs), "settings that differ": len(settings)},
        sections=[
            Section("Figures", table=result["runs"]),
            *([Section("Curves", figures=charts)] if charts else []),
            *([Section("What was set differently", table=settings)] if settings else []),
        ],
        command=shlex.join(["patchloom", "runs", "compare", asked, "--out", str(path.parent)]),
    )
