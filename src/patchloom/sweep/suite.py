"""A table of encoders × data × protocols, computed cell by cell.

It is described in a YAML file:

    encoders:
      ours: runs/photos/model
      untrained: {encoder: runs/photos/model, untrained: true}
    data:
      photos: {train: photos, test: photos:test}
    protocols:
      knn: {k: 20}
      linear: {}
      1-shot: {protocol: few_shot, shots: 1}
    defaults: {num_workers: 2}

An entry of `data` may name the protocols it is for (`protocols: [knn]`). A cell's settings are those of defaults,
encoder, data and protocol, the later ones winning. Encoders measured on the same images by the same protocol are also
compared in pairs, with Holm's correction over all pairs of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from patchloom.errors import UsageError, unknown_name
from patchloom.io import write_text
from patchloom.sweep.study import (
    BESIDE,
    CELLS,
    Cell,
    Outcome,
    Table,
    claim_folder,
    markdown,
    read_recipe,
    run_cells,
    write_csv,
)

KNOWN = ("encoders", "data", "protocols", "defaults")


def suite(recipe: str, out: str, overwrite: bool = False) -> str:
    """Measure several encoders on several data sets by several protocols.

    Started again, it goes on where it stopped; a cell that fails does not stop the others.

    Args:
        recipe: YAML file with encoders, data, protocols and defaults.
        out: Folder of the table: cells, suite.md, suite.csv, differences.csv and report.html.
        overwrite: Compute everything anew.

    Returns:
        The tables of scores and of paired differences, as Markdown.

    Raises:
        UsageError: The file cannot be read, or names protocols there are not.
    """
    from patchloom.evaluate.run import measure

    plan = read_recipe(recipe, KNOWN, ("encoders", "data", "protocols"))
    cells = plan_cells(plan)
    folder = claim_folder(out, plan, overwrite)

    def work(cell: Cell) -> dict[str, Any]:
        settings = dict(cell.settings)
        figures, predictions = measure(settings.pop("protocol"), settings)
        predictions_file = _predictions(folder, cell)
        predictions_file.unlink(missing_ok=True)
        if predictions is not None:
            predictions.save(predictions_file)
        return figures

    outcomes = run_cells(cells, work, folder)
    rows = [_row(outcome) for outcome in outcomes]
    write_csv(folder / "suite.csv", rows)
    differences = _differences(folder, outcomes)
    text = markdown([_readable(row) for row in rows])
    if differences:
        write_csv(folder / "differences.csv", differences)
        text += "\n\n" + markdown([_readable_difference(row) for row in differences])
    write_text(folder / "suite.md", text + "\n")
    _write_report(folder, outcomes, rows, differences, recipe)
    return Table(text, {"results": rows, "differences": differences})


def plan_cells(plan: Mapping[str, Any]) -> list[Cell]:
    """Return one cell for each combination.

    Raises:
        UsageError: A protocol there is not, or an entry that is no mapping.
    """
    from patchloom.registry import METHODS

    protocols = {name: _mapping(given, name) for name, given in plan["protocols"].items()}
    for name, settings in protocols.items():
        settings.setdefault("protocol", name)
        if settings["protocol"] not in METHODS["evaluate"]:
            raise unknown_name("protocol", str(settings["protocol"]), METHODS["evaluate"])
    cells = []
    for data_name, given in plan["data"].items():
        data = _mapping(given, data_name)
        protocol_names = data.pop("protocols", list(protocols))
        for name in protocol_names:
            if name not in protocols:
                raise unknown_name(f"protocol of {data_name}", str(name), protocols)
        for protocol_name in protocol_names:
            for encoder_name, encoder in plan["encoders"].items():
                chosen = {"encoder": encoder} if isinstance(encoder, str) else _mapping(encoder, encoder_name)
                labels = {"data": str(data_name), "protocol": str(protocol_name), "encoder": str(encoder_name)}
                cells.append(
                    Cell(labels, {**(plan.get("defaults") or {}), **chosen, **data, **protocols[protocol_name]})
                )
    return cells


def _mapping(given: Any, name: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f"{name} is {given!r}; give its settings as a mapping (name: value)")
    return dict(given or {})


def _row(outcome: Outcome) -> dict[str, Any]:
    """Return a cell as a row of plain numbers."""
    row: dict[str, Any] = dict(outcome.cell.labels)
    if outcome.error is not None:
        return {**row, "failed": outcome.error}
    figures = outcome.figures
    score = figures.get("score", figures.get("accuracy"))
    low, high = figures.get("interval") or (None, None)
    row |= {"score": score, "low": low, "high": high, "measure": figures.get("score_name", "accuracy")}
    return row | {name: figures[name] for name in (*BESIDE, "n", "seconds") if name in figures}


def _predictions(folder: Path, cell: Cell) -> Path:
    return folder / CELLS / f"{cell.name}.npz"


def _differences(folder: Path, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the paired difference of every two encoders measured on the same images by the same protocol."""
    from patchloom.evaluate.compare import paired_differences
    from patchloom.evaluate.statistics.predictions import Predictions

    groups: dict[tuple[str, str], list[tuple[str, Predictions]]] = {}
    for outcome in outcomes:
        labels, predictions_file = outcome.cell.labels, _predictions(folder, outcome.cell)
        if outcome.error is None and predictions_file.exists():
            groups.setdefault((labels["data"], labels["protocol"]), []).append(
                (labels["encoder"], Predictions.load(predictions_file))
            )
    places, pairs = [], []
    for place, members in groups.items():
        for (first, one), (second, other) in combinations(members, 2):
            # A picture that one of the encoders could not be shown: they were not measured on the same images.
            if sorted(one.keys) == sorted(other.keys) and one.score_name == other.score_name:
                places.append(place)
                pairs.append((first, second, one, other))
    return [
        {
            "data": data,
            "protocol": protocol,
            "first": difference["first"],
            "second": difference["second"],
            "difference": difference["difference"],
            "low": difference["interval"][0],
            "high": difference["interval"][1],
            "p": difference["p_value"],
            "p, Holm": difference["p_holm"],
        }
        for (data, protocol), difference in zip(places, paired_differences(pairs), strict=True)
    ]


def _readable_difference(row: Mapping[str, Any]) -> dict[str, Any]:
    words = {name: row[name] for name in ("data", "protocol", "first", "second")}
    interval = "" if row["low"] is None else f"{row['low']:+.3f} – {row['high']:+.3f}"
    return {
        **words,
        "difference (second - first)": f"{row['difference']:+.3f}",
        "95 % interval": interval,
        **{name: f"{row[name]:.3f}" for name in ("p", "p, Holm")},
    }


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    words = {name: row[name] for name in ("data", "protocol", "encoder", "measure") if name in row}
    if "failed" in row:
        return {**words, "score": f"failed: {row['failed']}"}
    score = "–" if row["score"] is None else f"{row['score']:.3f}"
    interval = "" if row["low"] is None else f"{row['low']:.3f} – {row['high']:.3f}"
    beside = {column: f"{row[name]:.3f}" for name, column in BESIDE.items() if name in row}
    return {**words, "score": score, "95 % interval": interval, **beside}


def _write_report(
    folder: Path,
    outcomes: list[Outcome],
    rows: list[dict[str, Any]],
    differences: list[dict[str, Any]],
    recipe: str,
) -> None:
    from patchloom.report import Section, bars, write_report

    sections = []
    for pair in dict.fromkeys((row["data"], row["protocol"]) for row in rows):
        mine = [row for row in rows if (row["data"], row["protocol"]) == pair]
        scored = [row for row in mine if row.get("score") is not None]
        figures = []
        if scored:
            ends = {row["encoder"]: (row["low"], row["high"]) for row in scored if row["low"] is not None}
            values = {row["encoder"]: row["score"] for row in scored}
            figures = [bars(values, intervals=ends, y_label=scored[0]["measure"], title=" · ".join(pair))]
        columns = ("encoder", "measure", "score", "95 % interval", *BESIDE.values())
        table = [{name: value for name, value in _readable(row).items() if name in columns} for row in mine]
        sections.append(Section(title=" · ".join(pair), figures=figures, table=table))
        paired = [_readable_difference(row) for row in differences if (row["data"], row["protocol"]) == pair]
        if paired:
            shown = [name for name in paired[0] if name not in ("data", "protocol")]
            sections.append(
                Section(
                    title=f"{' · '.join(pair)}: differences",
                    text="The same images, paired; p, Holm allows for all comparisons of this report.",
                    table=[{name: row[name] for name in shown} for row in paired],
                )
            )
    write_report(
        folder / "report.html",
        title="Encoder evaluation",
        subtitle="Scores with their 95 % intervals",
        facts={
            "encoders": len({row["encoder"] for row in rows}),
            "data sets": len({row["data"] for row in rows}),
            "protocols": len({row["protocol"] for row in rows}),
            "failed cells": sum(outcome.error is not None for outcome in outcomes),
        },
        sections=sections,
        command=f"patchloom evaluate suite {Path(recipe).name} --out {folder}",
    )
