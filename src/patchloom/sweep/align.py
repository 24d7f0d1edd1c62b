"""How what images and captions teach grows with the pairs that are seen and with the size of the image tower.

The benchmark of ViTamin (Chen et al. 2024, arXiv 2404.02132, section 3): image towers under CLIP training with the same
pairs in the same order, the same text tower from the same weights, and several budgets of pairs; then straight lines
through accuracy over the logarithm of pairs seen, one for each tower, and of parameters, one for each budget.

>>> line = fitted_line([1e3, 1e4, 1e5], [0.1, 0.2, 0.3])
>>> round(line.slope, 3), round(line.at_one, 3)
(0.1, -0.2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.errors import UsageError
from patchloom.io import write_text
from patchloom.sweep.study import Cell, Outcome, Table, claim_folder, markdown, run_cells, write_csv

SCORES = {
    "accuracy": "zero-shot accuracy",
    "retrieval_mean_recall": "mean recall",
    "image_to_text_r1": "image to text R@1",
    "image_to_text_r5": "image to text R@5",
    "image_to_text_r10": "image to text R@10",
    "text_to_image_r1": "text to image R@1",
    "text_to_image_r5": "text to image R@5",
    "text_to_image_r10": "text to image R@10",
}
"""Figures of a run, and what they are called in tables."""
FIXED = ("data", "test", "encoder", "out", "seed", "max_steps", "epochs", "resume", "overwrite")


class Line(NamedTuple):
    """A straight line through values over the logarithm (base 10) of something."""

    at_one: float
    """Value where the logarithm is 0."""
    slope: float
    """How much the value grows when there is ten times as much."""


def fitted_line(amounts: Sequence[float], values: Sequence[float]) -> Line:
    """Return the line of least squares through values over log10 of amounts; NaN where there is only one amount."""
    x = [math.log10(amount) for amount in amounts]
    middle, height = sum(x) / len(x), sum(values) / len(values)
    spread = sum((each - middle) ** 2 for each in x)
    if spread < 1e-12:
        return Line(math.nan, math.nan)
    slope = sum((each - middle) * (value - height) for each, value in zip(x, values, strict=True)) / spread
    return Line(height - slope * middle, slope)


@checked
def scaling(
    encoders: list[str],
    data: list[str],
    test: str,
    out: str,
    samples: list[PositiveInt],
    seeds: PositiveInt = 2,
    batch_size: PositiveInt = 64,
    num_workers: Count = 2,
    accelerator: str = "auto",
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Train image towers of several sizes on several sets and numbers of pairs, and fit how what they learn grows.

    Started again, it goes on where it stopped.

    Args:
        encoders: Timm models, the smaller first; bundles or runs, too.
        data: Sets of images with captions (or classes) to learn from.
        test: Images with captions or classes that all are measured on, at most 1000.
        out: Folder of the study: the runs, scaling.md, scaling.csv and report.html.
        samples: Pairs seen in training, several numbers.
        seeds: Runs of each, with seeds from 0 on; scores are means over them.
        batch_size: Pairs of a step.
        num_workers: Processes that read images.
        accelerator: Kind of device: auto, cpu, gpu or mps.
        settings: Further settings of align clip for all runs, such as --settings.text_width 64.
        overwrite: Compute everything anew.

    Returns:
        The table, as Markdown.

    Raises:
        UsageError: No encoder, no data, fewer pairs than a step has, or settings that the study itself sets.
    """
    given = dict(settings or {})
    if not encoders or not data or not samples:
        raise UsageError("scaling needs encoders, data and samples; name at least one of each")
    if few := [count for count in samples if count < batch_size]:
        raise UsageError(f"samples has {few[0]}, fewer than the {batch_size} pairs of a step; lower batch_size")
    if taken := [name for name in given if name in FIXED]:
        raise UsageError(f"settings has {taken[0]}, which the study sets itself; leave it out")
    cells = [
        Cell(
            {"data": source, "encoder": encoder, "pairs": str(count), "seed": str(seed)},
            {
                "data": source,
                "test": test,
                "encoder": encoder,
                "max_steps": count // batch_size,
                "batch_size": batch_size,
                "seed": seed,
                **given,
            },
        )
        for source in data
        for encoder in encoders
        for count in sorted(set(samples))
        for seed in range(seeds)
    ]
    asked = {"encoders": encoders, "data": data, "test": test, "samples": samples, "seeds": seeds}
    folder = claim_folder(out, {**asked, "batch_size": batch_size, "settings": given}, overwrite)

    def work(cell: Cell) -> dict[str, Any]:
        return _train(cell, folder, num_workers, accelerator)

    outcomes = run_cells(cells, work, folder)
    rows = summarise(outcomes)
    lines = fits(outcomes)
    write_csv(folder / "scaling.csv", rows)
    write_csv(folder / "slopes.csv", lines)
    text = "\n\n".join(markdown(_readable(part)) for part in (rows, lines) if part)
    write_text(folder / "scaling.md", text + "\n")
    _write_report(folder, rows, lines, outcomes)
    return Table(text, {"scores": rows, "slopes": lines})


def _train(cell: Cell, folder: Path, num_workers: int, accelerator: str) -> dict[str, Any]:
    """Train and measure one tower; a run that was cut off goes on."""
    from patchloom.models.bundle import load
    from patchloom.training.run import train

    out = folder / "runs" / cell.name
    fixed = {"probe_every": 0, "health_every": 0, "report": False, "log_every": 50, "val_fraction": 0.0}
    where = {"num_workers": num_workers, "accelerator": accelerator, "out": str(out), "resume": True}
    run = train("align", "clip", {**fixed, **cell.settings, **where}, None)
    figures = {name: run.summary[name] for name in SCORES if name in run.summary}
    seen = int(run.summary["pairs_seen"])
    return {
        **figures,
        "pairs": seen,
        "parameters": int(run.summary["parameters"]),
        "multiply_adds": multiply_adds(load(run.model)),
        "seconds": run.summary["seconds"],
    }


def multiply_adds(encoder: Any) -> int:
    """Return the multiply-adds of one image, forward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from patchloom.encoders import in_chans, input_size

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        encoder.eval()(torch.zeros(1, in_chans(encoder), *input_size(encoder)[-2:]))
    return int(counter.get_total_flops()) // 2


def summarise(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row for each tower, set and number of pairs: mean and standard deviation over seeds of every score."""
    from statistics import mean, stdev

    rows = []
    for labels in dict.fromkeys(_group(outcome) for outcome in outcomes):
        mine = [outcome for outcome in outcomes if _group(outcome) == labels]
        good = [outcome.figures for outcome in mine if outcome.error is None]
        row: dict[str, Any] = dict(zip(("data", "encoder"), labels[:2], strict=True))
        row |= {"pairs": int(labels[2]), "seeds": len(good)}
        if good:
            row |= {name: good[0][name] for name in ("parameters", "multiply_adds")}
        for name in SCORES:
            if values := [figures[name] for figures in good if name in figures]:
                row |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else math.nan}
        if failed := [outcome.error for outcome in mine if outcome.error is not None]:
            row["failed"] = failed[0]
        rows.append(row)
    return rows


def _group(outcome: Outcome) -> tuple[str, str, str]:
    labels = outcome.cell.labels
    return labels["data"], labels["encoder"], labels["pairs"]


def fits(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the slopes of every score: over pairs for each tower, and over parameters for each number of pairs.

    All seeds are points of a line; there is none where there is only one amount.
    """
    good = [outcome for outcome in outcomes if outcome.error is None]
    rows = []
    for over, amount, fixed in (("pairs", "pairs", "encoder"), ("parameters", "parameters", "pairs")):
        for source, which in dict.fromkeys((o.cell.labels["data"], o.cell.labels[fixed]) for o in good):
            mine = [o for o in good if (o.cell.labels["data"], o.cell.labels[fixed]) == (source, which)]
            amounts = [float(outcome.figures[amount]) for outcome in mine]
            if len(set(amounts)) < 2:
                continue
            row: dict[str, Any] = {"data": source, "over": over, "of": which if over == "pairs" else f"{which} pairs"}
            for name in ("accuracy", "retrieval_mean_recall"):
                if all(name in outcome.figures for outcome in mine):
                    line = fitted_line(amounts, [outcome.figures[name] for outcome in mine])
                    row |= {f"{name}_slope": line.slope, f"{name}_at_one": line.at_one}
            rows.append(row)
    return rows


def _readable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with shares as per cent, and slopes as points per factor of ten."""
    shown = []
    for row in rows:
        line: dict[str, Any] = {name: row[name] for name in ("data", "encoder", "over", "of", "pairs") if name in row}
        if "parameters" in row:
            line |= {"parameters": f"{row['parameters'] / 1e6:.2f} M", "MACs": f"{row['multiply_adds'] / 1e9:.3f} G"}
        for name, words in SCORES.items():
            if name in row:
                spread = row[f"{name}_sd"]
                line[words] = f"{row[name]:.1%}" + ("" if math.isnan(spread) else f" ± {spread:.1%}")
            if f"{name}_slope" in row:
                line[f"{words}, points for ten times as much"] = f"{100 * row[f'{name}_slope']:+.1f}"
        if "failed" in row:
            line["failed"] = row["failed"]
        shown.append(line)
    return shown


def _write_report(
    folder: Path, rows: list[dict[str, Any]], lines: list[dict[str, Any]], outcomes: list[Outcome]
) -> None:
    from patchloom.report import Section, curves, write_report

    figures = []
    for name in ("accuracy", "retrieval_mean_recall"):
        scored = [row for row in rows if name in row]
        for source in dict.fromkeys(row["data"] for row in scored):
            mine = [row for row in scored if row["data"] == source]
            plotted = {
                Path(encoder).name: (
                    [row["pairs"] for row in mine if row["encoder"] == encoder],
                    [100 * row[name] for row in mine if row["encoder"] == encoder],
                )
                for encoder in dict.fromkeys(row["encoder"] for row in mine)
            }
            title = f"{SCORES[name].capitalize()} by pairs seen, {source}"
            figures.append(curves(plotted, x_label="pairs seen", y_label="%", title=title, log_x=True))
    text = "Every tower saw the same pairs in the same order beside the same text tower; means over seeds."
    sections = [Section(title="Scores", text=text, figures=figures, table=_readable(rows))]
    if lines:
        explained = (
            "Least squares over all seeds: how many points are won by ten times as many pairs with one tower (how it "
            "scales with data), and by ten times as many parameters at one number of pairs (how towers scale)."
        )
        sections.append(Section(title="Slopes", text=explained, table=_readable(lines)))
    write_report(
        folder / "report.html",
        title="Scaling of image towers with pairs and parameters",
        facts={
            "towers": len({row["encoder"] for row in rows}),
            "runs": len(outcomes),
            "failed": sum(outcome.error is not None for outcome in outcomes),
        },
        sections=sections,
        command=f"patchloom align scaling --config {folder}/study.yaml --out {folder}",
    )
