"""Ways to train an encoder, side by side under one budget: the same images and the same steps, or the same minutes.

The comparison is described in a YAML file:

    data: photos                     # what all learn from
    test: photos:test                # what all are measured on
    encoder: ccvit_tiny_patch8_64
    steps: 500                       # or minutes: 5 (steps then follow from each method's own speed)
    seeds: [0, 1, 2]
    defaults: {batch_size: 64}
    methods:
      ccvit: {k: 256}
      mae: {}
      untrained: {}
      supervised 10 %: {method: adapt finetune, label_fraction: 0.1}
    evaluate:
      knn: {}
      linear: {}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.errors import UsageError, unknown_name
from patchloom.io import write_text
from patchloom.sweep.study import (
    BESIDE,
    Cell,
    Outcome,
    Table,
    claim_folder,
    markdown,
    read_recipe,
    run_cells,
    write_csv,
)

if TYPE_CHECKING:
    from patchloom.training.run import Run

KNOWN = ("data", "test", "train", "encoder", "steps", "minutes", "seeds", "defaults", "methods", "evaluate")
UNTRAINED = "untrained"
TRIAL_STEPS = (5, 25)


def compare(recipe: str, out: str, overwrite: bool = False) -> str:
    """Train encoders by several methods under one budget and measure all of them alike.

    Started again, it goes on where it stopped; a method that fails does not stop the others.

    Args:
        recipe: YAML file with data, test, encoder, steps or minutes, seeds, defaults, methods and evaluate.
        out: Folder of the comparison: the runs, compare.md, compare.csv and report.html.
        overwrite: Compute everything anew.

    Returns:
        The table, as Markdown.

    Raises:
        UsageError: The file cannot be read, or names methods or settings there are not.
    """
    plan = read_recipe(recipe, KNOWN, ("data", "test", "encoder", "methods"))
    if (plan.get("steps") is None) == (plan.get("minutes") is None):
        raise UsageError(f"{recipe} has to give either steps or minutes, one budget for all")
    cells = plan_cells(plan)
    folder = claim_folder(out, plan, overwrite)
    outcomes = run_cells(cells, lambda cell: _train_and_measure(cell, folder), folder)
    rows = summarise(outcomes, list(plan.get("evaluate") or {"knn": {}}))
    _write(folder, plan, rows, outcomes, recipe)
    shown = [{k: v for k, v in row.items() if not k.endswith((" low", " high"))} for row in rows]
    return Table(markdown(shown), rows)


def plan_cells(plan: Mapping[str, Any]) -> list[Cell]:
    """Return one cell per method and seed.

    Raises:
        UsageError: A method there is not, or settings that are no mapping.
    """
    from patchloom.registry import METHODS

    known = [UNTRAINED, *METHODS["pretrain"], *(f"adapt {name}" for name in METHODS["adapt"])]
    cells = []
    for name, given in plan["methods"].items():
        settings = dict(given or {})
        method = str(settings.pop("method", name))
        if method not in known:
            raise unknown_name("method", method, known)
        for seed in plan.get("seeds") or [0]:
            shared = {key: plan.get(key) for key in ("data", "test", "train", "encoder", "steps", "minutes")}
            details = {**shared, "method": method, "settings": {**(plan.get("defaults") or {}), **settings}}
            details |= {"evaluate": plan.get("evaluate") or {"knn": {}}, "seed": int(seed)}
            cells.append(Cell({"method": str(name), "seed": str(seed)}, details))
    return cells


def _train_and_measure(cell: Cell, folder: Path) -> dict[str, Any]:
    from patchloom.evaluate.run import measure

    plan = cell.settings
    figures: dict[str, Any] = {}
    encoder: Any = plan["encoder"]
    if plan["method"] != UNTRAINED:
        steps = plan["steps"] or _steps_within(plan, folder)
        run = _train(plan, folder / "runs" / cell.name, steps)
        encoder = str(run.model)
        figures |= {"steps": run.summary["steps"], "training_seconds": run.summary["seconds"]}
    for name, given in plan["evaluate"].items():
        settings = {"protocol": name, **(given or {})}
        protocol = settings.pop("protocol")
        if plan["method"] == UNTRAINED:
            settings["untrained"] = True
        shared = {"train": plan["train"] or plan["data"], "test": plan["test"], "seed": plan["seed"]}
        measured, _ = measure(protocol, {**shared, **settings, "encoder": encoder})
        figures[name] = measured.get("score", measured.get("accuracy"))
        figures |= {f"{name} {words}": measured[key] for key, words in BESIDE.items() if key in measured}
    return figures


def _train(plan: Mapping[str, Any], out: Path, steps: int) -> Run:
    """Train by the cell's method for a number of steps; a run that was cut off goes on."""
    from patchloom.training.run import train

    verb, _, method = plan["method"].rpartition(" ")
    settings = {
        "data": plan["data"],
        "encoder": plan["encoder"],
        "seed": plan["seed"],
        "probe_every": 0,
        **plan["settings"],
    }
    return train(verb or "pretrain", method, {**settings, "max_steps": steps, "out": str(out), "resume": True}, None)


def _steps_within(plan: Mapping[str, Any], folder: Path) -> int:
    """Return how many steps a method takes in the minutes given, from two short trials of different length."""
    trials = []
    for steps in TRIAL_STEPS:
        trial = Cell({"trial": plan["method"], "steps": str(steps)}, {**plan, "seed": 0})
        trials.append(_train({**plan, "seed": 0}, folder / "trials" / trial.name, steps).summary["seconds"])
    per_step = max((trials[1] - trials[0]) / (TRIAL_STEPS[1] - TRIAL_STEPS[0]), 1e-4)
    return max(1, round(plan["minutes"] * 60 / per_step))


def summarise(outcomes: list[Outcome], protocols: list[str]) -> list[dict[str, Any]]:
    """Return one row per method: mean and 95 % interval over seeds of every score, time, and failures by name."""
    from patchloom.statistics.intervals import mean_interval

    rows = []
    for name in dict.fromkeys(outcome.cell.labels["method"] for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.cell.labels["method"] == name]
        good = [outcome.figures for outcome in mine if outcome.error is None]
        row: dict[str, Any] = {"method": name, "seeds": len(good)}
        for protocol in protocols:
            if values := [figures[protocol] for figures in good if figures.get(protocol) is not None]:
                mean, (low, high) = (found := mean_interval(values)).value, found.ends
                row[protocol] = f"{mean:.1%}" if low is None or high is None else f"{mean:.1%} ± {(high - low) / 2:.1%}"
                row |= {f"{protocol} mean": mean, f"{protocol} low": low, f"{protocol} high": high}
            for words in BESIDE.values():
                if beside := [figures[f"{protocol} {words}"] for figures in good if f"{protocol} {words}" in figures]:
                    row[f"{protocol} {words}"] = f"{sum(beside) / len(beside):.1%}"
        for figure in ("steps", "training_seconds"):
            if values := [figures[figure] for figures in good if figure in figures]:
                row[figure.replace("_", " ")] = round(sum(values) / len(values))
        if failed := [outcome.error for outcome in mine if outcome.error is not None]:
            row["failed"] = failed[0]
        rows.append(row)
    return rows


def _write(
    folder: Path, plan: Mapping[str, Any], rows: list[dict[str, Any]], outcomes: list[Outcome], recipe: str
) -> None:
    from patchloom.report import Section, bars, write_report

    protocols = list(plan.get("evaluate") or {"knn": {}})
    budget = f"{plan['steps']} optimiser steps" if plan.get("steps") else f"{plan['minutes']} minutes"
    readable = [{k: v for k, v in row.items() if not k.endswith((" mean", " low", " high"))} for row in rows]
    numbers = [{k: v for k, v in row.items() if k not in protocols} for row in rows]
    write_text(folder / "compare.md", markdown(readable) + "\n")
    write_csv(folder / "compare.csv", numbers)
    figures = []
    for protocol in protocols:
        scored = [row for row in rows if f"{protocol} mean" in row]
        if scored:
            values = {row["method"]: row[f"{protocol} mean"] * 100 for row in scored}
            known = [row for row in scored if row[f"{protocol} low"] is not None]
            ends = {r["method"]: (r[f"{protocol} low"] * 100, r[f"{protocol} high"] * 100) for r in known}
            figures.append(bars(values, intervals=ends, y_label="%", title=protocol))
    failures = [{"run": str(outcome.cell), "reason": outcome.error} for outcome in outcomes if outcome.error]
    sections = [
        Section(
            title="Scores",
            text=f"Mean over seeds with its 95 % interval (Student's t); every method had {budget} on {plan['data']} "
            f"and the encoder {plan['encoder']}, and was measured on {plan['test']}.",
            figures=figures,
            table=readable,
        )
    ]
    if failures:
        sections.append(Section(title="Failures", table=failures))
    write_report(
        folder / "report.html",
        title="Comparison of pre-training methods",
        subtitle=f"{budget}; {plan['encoder']} on {plan['data']}",
        facts={"methods": len(rows), "runs": len(outcomes), "failed": len(failures)},
        sections=sections,
        command=f"patchloom pretrain compare {Path(recipe).name} --out {folder}",
    )
