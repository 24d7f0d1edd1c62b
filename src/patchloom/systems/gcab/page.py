"""What the report of a run shows of its tasks."""

from __future__ import annotations

from typing import Any

from patchloom.report import Figure, Section, bars, curves, heat_map
from patchloom.systems.gcab.measures import forgotten_by_task, is_whole

SHOWN = 6
"""Classes of a task that are listed."""


def task_sections(tasks: list[list[str]], history: list[dict[str, Any]], results: dict[str, Any]) -> list[Section]:
    """Return accuracy over tasks, accuracy by task after each task, and what gates have reserved.

    Args:
        tasks: Names of the classes of each.
        history: Figures after each task, see `measures.measured`.
        results: What they come to, see `GCABMethod.results`.
    """
    if not history:
        return []
    sections = [Section("Tasks", spoken(results), accuracy_figures(history), listed(tasks, history))]
    if any("accuracy" in figures for figures in history):
        how = {"": "nobody says which task an image is of", "task_aware_": "the best of the classes of its own task"}
        for prefix, words in how.items():
            title = "Accuracy by task" if not prefix else "Accuracy by task, the task known"
            text = f"Rows: after each task; columns: images of each task ({words}). Down a column, what is forgotten."
            rows = results[f"{prefix}accuracy_matrix"]
            sections.append(Section(title, text, matrix_figures(rows, title), matrix(rows)))
    if any("free" in figures for figures in history):
        sections.append(gate_section(history))
    return sections


def spoken(results: dict[str, Any]) -> str:
    """Return the figures of the whole run as a sentence."""
    parts = []
    for prefix, when in (("", "where nobody says the task"), ("task_aware_", "where the task is known")):
        if f"{prefix}last_accuracy" not in results:
            continue
        part = f"{when}, {results[f'{prefix}last_accuracy']:.1%} at the end"
        if (mean := results.get(f"{prefix}average_incremental_accuracy")) is not None:
            part += f" and {mean:.1%} on average over tasks"
        if (lost := results.get(f"{prefix}forgetting")) is not None:
            part += f", forgetting {lost:.1%}"
        parts.append(part)
    if not parts:
        return "Nothing was measured: there were no test images of the classes seen."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def accuracy_figures(history: list[dict[str, Any]]) -> list[Figure]:
    """Return accuracy on all classes seen over tasks, with intervals; nothing of a single task."""
    rows = [figures for figures in history if is_whole(figures)]
    if len(rows) < 2:
        return []
    x = [float(figures["task"]) for figures in rows]
    series, bands = {}, {}
    for name, prefix in (("task unknown", ""), ("task known", "task_aware_")):
        series[name] = (x, [figures[f"{prefix}accuracy"] for figures in rows])
        low, high = zip(*(figures[f"{prefix}interval"] for figures in rows), strict=True)
        bands[name] = (low, high)
    title = "Accuracy on all classes seen"
    return [curves(series, x_label="tasks learnt", y_label="share", title=title, bands=bands)]


def listed(tasks: list[list[str]], history: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Return the tasks with their classes and the accuracy on all classes seen after each."""
    rows: list[dict[str, object]] = []
    for number, task in enumerate(tasks, 1):
        more = f" and {len(task) - SHOWN} more" if len(task) > SHOWN else ""
        row: dict[str, object] = {"task": number, "classes": ", ".join(task[:SHOWN]) + more}
        figures = history[number - 1] if number <= len(history) else {}
        for name, prefix in (("task unknown", ""), ("task known", "task_aware_")):
            if f"{prefix}accuracy" in figures:
                low, high = figures[f"{prefix}interval"]
                row[name] = f"{figures[f'{prefix}accuracy']:.1%} ({low:.1%} to {high:.1%}){of(figures)}"
        rows.append(row)
    return rows


def of(figures: dict[str, Any]) -> str:
    """Return which tasks figures are of, where it is not all so far."""
    if is_whole(figures):
        return ""
    return " on task " + ", ".join(str(task) for task, count in enumerate(figures["images_by_task"], 1) if count)


def matrix_figures(rows: list[list[float | None]], title: str) -> list[Figure]:
    """Return an accuracy matrix in colours, and what was lost of each task; nothing of a single task."""
    if len(rows) < 2:
        return []
    ends = [share for share in rows[-1] if share is not None]
    said = f"at the end {min(ends):.0%} to {max(ends):.0%} by task" if ends else ""
    drawn = [heat_map(rows, x_label="images of task", y_label="after task", title=f"{title}, in percent", spoken=said)]
    lost = forgotten_by_task(rows)
    if lost:
        named = {f"task {task}": 100 * value for task, value in lost.items()}
        drawn.append(bars(named, y_label="points", title="Forgotten since its best accuracy"))
    return drawn


def matrix(rows: list[list[float | None]]) -> list[dict[str, object]]:
    """Return an accuracy matrix as a table, empty where nothing was measured."""
    return [
        {
            "after": f"task {number}",
            **{f"task {task}": f"{share:.1%}" if share is not None else "" for task, share in enumerate(row, 1)},
        }
        for number, row in enumerate(rows, 1)
    ]


def gate_section(history: list[dict[str, Any]]) -> Section:
    """Return the share of the gated block that tasks have reserved."""
    rows = [figures for figures in history if "free" in figures]
    table: list[dict[str, object]] = [
        {
            "after": f"task {figures['task']}",
            "width reserved": f"{figures['reserved']['width']:.1%}",
            "hidden reserved": f"{figures['reserved']['hidden']:.1%}",
            "free": f"{figures['free']:.1%}",
        }
        for figures in rows
    ]
    drawn = []
    if len(rows) > 1:
        x = [float(figures["task"]) for figures in rows]
        series = {name: (x, [figures["reserved"][name] for figures in rows]) for name in ("width", "hidden")}
        drawn = [curves(series, x_label="tasks learnt", y_label="share", title="Channels that tasks have reserved")]
    text = (
        "Channels of the gated block that the tasks so far have reserved: of the width of the tokens and of the middle "
        "of the MLP. What is reserved is not changed by later tasks; where nothing is free, they learn by the encoder, "
        "a token and a head alone."
    )
    return Section("Gates", text, drawn, table)
