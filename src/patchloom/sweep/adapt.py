"""Ways to adapt an encoder, side by side: what each gets right, what it trains, stores, takes.

The comparison is described in a YAML file:

    data: labelled/train
    test: labelled/test              # default: a part of data is held out, the same for all
    encoder: runs/mine/model
    label_fractions: [0.1, 1.0]      # or shots: [5, 20], images per class
    seeds: [0, 1, 2]
    defaults: {epochs: 20, batch_size: 64}
    methods:
      linear: {}
      vpt: {num_prompts: 8}
      adaptformer: {}
      narrow: {method: adaptformer, bottleneck: 4}
      finetune: {lr: 0.0005, lr_base_batch: null}

Every cell runs in a process of its own, so that its peak memory is its own and a cell that is killed for memory does
not take the others along (`isolate: false` runs them in one process, without that figure).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchloom.base import stopping
from patchloom.errors import UsageError
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

KNOWN = ("data", "test", "encoder", "label_fractions", "shots", "seeds", "defaults", "methods", "isolate")
COLUMNS = {
    "trained_parameters": "trained parameters",
    "file_bytes": "file MB",
    "seconds": "seconds",
    "peak_memory": "peak MB",
}
MEGABYTE = 1e6


def compare(recipe: str, out: str, overwrite: bool = False) -> str:
    """Adapt one encoder by several methods, with several label budgets and seeds, and measure all alike.

    Started again, it goes on where it stopped; a cell that fails does not stop the others.

    Args:
        recipe: YAML file with data, test, encoder, methods, label_fractions or shots, seeds and defaults.
        out: Folder of the comparison: the runs, compare.md, compare.csv and report.html.
        overwrite: Compute everything anew.

    Returns:
        The table, as Markdown.

    Raises:
        UsageError: The file cannot be read, or names methods or settings there are not.
    """
    plan = read_recipe(recipe, KNOWN, ("data", "encoder", "methods"))
    cells = plan_cells(plan)
    folder = claim_folder(out, plan, overwrite)
    isolate = plan.get("isolate", True)
    outcomes = run_cells(cells, lambda cell: _adapted(cell, folder, isolate), folder)
    rows = summarise(outcomes)
    _write(folder, plan, rows, outcomes, recipe)
    return Table(markdown(readable(rows)), rows)


def plan_cells(plan: Mapping[str, Any]) -> list[Cell]:
    """Return one cell per method, label budget and seed.

    Raises:
        UsageError: A method or setting there is not, or both kinds of label budget.
    """
    from patchloom import registry
    from patchloom.training.config import config_from_mapping

    if plan.get("label_fractions") and plan.get("shots"):
        raise UsageError("label_fractions and shots both say how many labels to learn from; give one of them")
    name = "shots" if plan.get("shots") else "label_fraction"
    budgets = plan.get("shots") or plan.get("label_fractions") or [1.0]
    cells = []
    for label, given in plan["methods"].items():
        settings = dict(given or {})
        method = str(settings.pop("method", label))
        shared = {"data": plan["data"], "encoder": str(plan["encoder"]), "test": plan.get("test"), "probe_every": 0}
        merged = {**shared, **(plan.get("defaults") or {}), **settings}
        # Refused now, not after the cells before it have been computed.
        config_from_mapping(registry.settings_class("adapt", method), {**merged, "out": "unused"})
        for budget in budgets:
            for seed in plan.get("seeds") or [0]:
                details = {"method": method, "settings": {**merged, name: budget, "seed": int(seed)}}
                cells.append(Cell({"method": str(label), "labels": _budget(name, budget), "seed": str(seed)}, details))
    return cells


def _budget(name: str, value: float) -> str:
    return f"{value:.4g} per class" if name == "shots" else f"{value:.4g}"


def _adapted(cell: Cell, folder: Path, isolate: bool) -> dict[str, Any]:
    request = {**cell.settings, "out": str(folder / "runs" / cell.name)}
    return _in_process_of_its_own(request, folder) if isolate else run_request(request)


def _in_process_of_its_own(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the figures of a run; its last words stand in the error where it failed."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "patchloom.sweep.adapt", json.dumps(request), str(answer)]
    done = stopping.run_child(command)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        killed = f"killed by signal {-done.returncode} (out of memory?)" if done.returncode < 0 else "failed"
        raise RuntimeError(lines[-1].removeprefix("patchloom: ") if lines and done.returncode > 0 else killed)
    figures: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    return {**figures, "peak_memory": figures.pop("process_peak")}


def run_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one run; its figures without the parts of a process."""
    from patchloom.training.run import train

    out = Path(request["out"])
    trained = train("adapt", request["method"], {**request["settings"], "out": str(out), "resume": True}, None)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # it is done; the model is kept
    summary = trained.summary
    score = summary.get(summary["headline"])
    if score is None:
        raise UsageError("nothing was held out to measure on; give test, or a val_fraction above 0")
    files = [file for file in trained.model.iterdir() if file.suffix == ".safetensors"]
    return {
        "score": score,
        "measure": summary["headline"],
        **{name: summary[name] for name in BESIDE if name in summary},
        "trained_parameters": summary["trained_parameters"],
        "parameters": summary["parameters"],
        "file_bytes": sum(file.stat().st_size for file in files),
        "seconds": summary["seconds"],
        "labelled_images": summary["labelled_images"],
    }


def peak_memory() -> int:
    """Return the most memory this process has used, in bytes: on the GPU where it used one, else resident."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says of a child begins with the peak of its parent
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def summarise(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Return one row per method and label budget: mean and 95 % interval over seeds, costs, and failures by name."""
    from patchloom.statistics.intervals import mean_interval

    rows = []
    pairs = dict.fromkeys((o.cell.labels["method"], o.cell.labels["labels"]) for o in outcomes)
    for method, labels in pairs:
        mine = [o for o in outcomes if (o.cell.labels["method"], o.cell.labels["labels"]) == (method, labels)]
        good = [outcome.figures for outcome in mine if outcome.error is None]
        row: dict[str, Any] = {"method": method, "labels": labels, "seeds": len(good)}
        if good:
            interval = mean_interval([figures["score"] for figures in good])
            row |= {
                "measure": good[0]["measure"],
                "mean": interval.value,
                "low": interval.ends[0],
                "high": interval.ends[1],
            }
            for name in (*BESIDE, *COLUMNS):
                if values := [figures[name] for figures in good if name in figures]:
                    row[name] = sum(values) / len(values)
            row["share"] = row["trained_parameters"] / good[0]["parameters"]
        if failed := [outcome.error for outcome in mine if outcome.error is not None]:
            row["failed"] = failed[0]
        rows.append(row)
    return rows


def readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a person reads them: the score with its interval, megabytes, whole numbers."""
    shown = []
    for row in rows:
        line: dict[str, Any] = {"method": row["method"], "labels": row["labels"], "seeds": row["seeds"]}
        if "mean" in row:
            line[row["measure"]] = f"{row['mean']:.3f}"
            if row["low"] is not None:
                line[row["measure"]] += f" ± {(row['high'] - row['low']) / 2:.3f}"
            line |= {name.replace("_", " "): f"{row[name]:.3f}" for name in BESIDE if name in row}
            line["trained parameters"] = f"{round(row['trained_parameters']):,} ({row['share']:.2%})"
            line["file MB"] = f"{row['file_bytes'] / MEGABYTE:.2f}"
            line["seconds"] = round(row["seconds"])
            if "peak_memory" in row:
                line["peak MB"] = round(row["peak_memory"] / MEGABYTE)
        if "failed" in row:
            line["failed"] = row["failed"]
        shown.append(line)
    return shown


def _write(
    folder: Path, plan: Mapping[str, Any], rows: list[dict[str, Any]], outcomes: list[Outcome], recipe: str
) -> None:
    from patchloom.report import Section, write_report

    write_text(folder / "compare.md", markdown(readable(rows)) + "\n")
    write_csv(folder / "compare.csv", rows)
    failures: list[dict[str, object]] = [
        {"run": str(outcome.cell), "reason": outcome.error} for outcome in outcomes if outcome.error
    ]
    sections = [
        Section(
            title="Scores and costs",
            text=f"Mean over seeds with half its 95 % interval (Student's t); {plan['encoder']} on {plan['data']}, "
            f"measured on {plan.get('test') or 'the part of it that was held out'}.",
            figures=figures(rows),
            table=readable(rows),
        )
    ]
    if failures:
        sections.append(Section(title="Failures", table=failures))
    write_report(
        folder / "report.html",
        title="Comparison of adaptation methods",
        subtitle=f"{plan['encoder']} on {plan['data']}",
        facts={"methods": len(plan["methods"]), "runs": len(outcomes), "failed": len(failures)},
        sections=sections,
        command=f"patchloom adapt compare {Path(recipe).name} --out {folder}",
    )


def figures(rows: list[dict[str, Any]]) -> list[Any]:
    """Return score against trained parameters for each label budget, and score against the budget for each method."""
    from patchloom.report import curves

    drawn = []
    scored = [row for row in rows if "mean" in row]
    budgets = list(dict.fromkeys(row["labels"] for row in scored))
    for budget in budgets:
        points = {
            row["method"]: ([row["trained_parameters"]], [row["mean"]]) for row in scored if row["labels"] == budget
        }
        measure = next(row["measure"] for row in scored if row["labels"] == budget)
        title = f"Labels: {budget}" if len(budgets) > 1 else "Score against what trains"
        drawn.append(curves(points, x_label="trained parameters", y_label=measure, title=title, log_x=True))
    if len(budgets) > 1:
        lines, bands = {}, {}
        for method in dict.fromkeys(row["method"] for row in scored):
            mine = [row for row in scored if row["method"] == method]
            lines[method] = ([float(row["labels"].split()[0]) for row in mine], [row["mean"] for row in mine])
            low, high = ([row["mean" if row[end] is None else end] for row in mine] for end in ("low", "high"))
            bands[method] = (low, high)
        title = "Score against labels"
        drawn.append(
            curves(lines, x_label="labels", y_label=scored[0]["measure"], title=title, log_x=True, bands=bands)
        )
    return drawn


def _main(arguments: list[str]) -> int:
    """Carry out one cell, in the process that was started for it."""
    request, answer = json.loads(arguments[0]), Path(arguments[1])
    try:
        with stopping.stoppable():
            outcome = run_request(request)
    except stopping.Stopped as stop:
        return stop.exit_code
    except Exception as error:
        print(f"patchloom: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    write_text(answer, json.dumps({**outcome, "process_peak": peak_memory()}))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
