"""Curves and bars, drawn with matplotlib's objects: no pyplot, no window, no state shared between charts.

Grounds are transparent; text and lines are of a middling brightness, to be read on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from patchloom.errors import UsageError
from patchloom.report.page import Figure

COLOURS = ("#259079", "#d9702b", "#6f7fe0", "#c7588f", "#9c8719", "#3596c4")
TEXT, FRAME, GRID = "#7d838d", "#9aa0a9", "#8a909a"


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    log_x: bool = False,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """Return line charts over one pair of axes.

    Args:
        series: Name to (x, y).
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        title: What the chart shows.
        log_y: Logarithmic y.
        log_x: Logarithmic x.
        bands: Name to the lower and upper ends of the intervals around a series' points.
        references: Name to a value of y that the curves are read against, drawn as a dashed line.

    Raises:
        UsageError: There is nothing to draw.
    """
    if not series:
        raise UsageError("a chart needs at least one series")
    figure, axes = _axes(title, x_label, y_label)
    for number, (name, (x, y)) in enumerate(series.items()):
        marker = "o" if len(x) < 25 else None
        axes.plot(x, y, label=name, color=COLOURS[number % len(COLOURS)], linewidth=1.8, marker=marker, markersize=3.5)
        if name in (bands or {}):
            low, high = (bands or {})[name]
            axes.fill_between(x, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.18, linewidth=0)
    for name, value in (references or {}).items():
        axes.axhline(value, color=TEXT, linewidth=1.2, linestyle="--", label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    if len(series) + len(references or {}) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT)
    ends = "; ".join(f"{name} ends at {y[-1]:.3g}" for name, (_, y) in series.items() if len(y))
    ends += "".join(f"; {name} {value:.3g}" for name, value in (references or {}).items())
    return Figure(_png(figure), f"{title}: {ends}", half=True)


def bars(
    values: Mapping[str, float],
    *,
    y_label: str,
    title: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Return horizontal bars with their values.

    Args:
        values: Name to value.
        y_label: What the values are.
        title: What the chart shows.
        intervals: Name to the lower and upper end of an interval around the value, drawn as a whisker.

    Raises:
        UsageError: There is nothing to draw.
    """
    if not values:
        raise UsageError("a bar chart needs at least one bar")
    figure, axes = _axes(title, y_label, "")
    names = list(values)
    axes.barh(range(len(names)), list(values.values()), color=COLOURS[0], height=0.6)
    for number, name in enumerate(names):
        low, high = (intervals or {}).get(name, (values[name], values[name]))
        if high > low:
            axes.plot([low, high], [number, number], color=TEXT, linewidth=1.4)
    ends = [max(values[name], (intervals or {}).get(name, (0, values[name]))[1]) for name in names]
    for number, (end, name) in enumerate(zip(ends, names, strict=True)):
        axes.annotate(
            f"{values[name]:.3g}",
            (end, number),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=TEXT,
        )
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    spoken = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return Figure(_png(figure), f"{title}: {spoken}", half=True)


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(4.4, 2.85), dpi=230, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold", color=TEXT)
    axes.set_xlabel(x_label, fontsize=9, color=TEXT)
    axes.set_ylabel(y_label, fontsize=9, color=TEXT)
    axes.tick_params(which="both", labelsize=8.5, color=FRAME, labelcolor=TEXT)
    axes.grid(True, color=GRID, alpha=0.28, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()
