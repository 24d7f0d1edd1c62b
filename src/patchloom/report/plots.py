"""Curves, bars and heat maps, drawn with matplotlib's objects: no pyplot, no window, no state shared between charts.

Grounds are transparent; text and lines are of a middling brightness, to be read on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchloom.errors import UsageError
from patchloom.report.page import Figure

COLOURS = ("#259079", "#d9702b", "#6f7fe0", "#c7588f", "#9c8719", "#3596c4")
HEAT = ("#dcefe9", "#58b09b", "#0d4a3d")
"""From the least value to the greatest."""
MOST_LABELLED = 12
"""Rows or columns of a heat map whose cells have room for their values."""
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
    elif all(len(x) < 25 and all(float(value).is_integer() for value in x) for x, _ in series.values()):
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is nothing between two tasks
    if log_y:
        axes.set_yscale("log")
    else:
        axes.yaxis.get_major_formatter().set_useOffset(False)  # ticks say their values, however close they are
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


def heat_map(
    rows: Sequence[Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    x_names: Sequence[str] | None = None,
    y_names: Sequence[str] | None = None,
    span: tuple[float, float] = (0.0, 1.0),
    spoken: str = "",
) -> Figure:
    """Return a matrix as coloured cells with their values in percent; cells without a value are left empty.

    Args:
        rows: Values, row by row from the top; None for none.
        x_label: What columns are.
        y_label: What rows are.
        title: What the chart shows.
        x_names: Names of the columns; default: numbers from 1.
        y_names: Names of the rows; default: numbers from 1.
        span: Values of the lightest and of the darkest colour.
        spoken: What the chart says, for those who cannot see it.

    Raises:
        UsageError: There is nothing to draw, or rows are of different lengths.
    """
    if not rows or not rows[0]:
        raise UsageError("a heat map needs at least one cell")
    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            f"rows of a heat map have {sorted({len(row) for row in rows})} cells; they must be of one length"
        )
    from matplotlib.colors import LinearSegmentedColormap

    figure, axes = _axes(title, x_label, y_label)
    values = np.array([[np.nan if value is None else value for value in row] for row in rows])
    colours = LinearSegmentedColormap.from_list("heat", HEAT)
    axes.grid(visible=False)
    axes.imshow(values, cmap=colours, vmin=span[0], vmax=span[1], aspect="auto")
    if max(values.shape) <= MOST_LABELLED:
        middle = (span[0] + span[1]) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "white" if value > middle else HEAT[-1]
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    for axis, count, names in zip((axes.yaxis, axes.xaxis), values.shape, (y_names, x_names), strict=True):
        axis.set_ticks(range(count), names or [str(number) for number in range(1, count + 1)])
    axes.spines[["left", "bottom"]].set_visible(False)
    return Figure(_png(figure), f"{title}: {spoken}" if spoken else title, half=True)


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
