"""Curves and bars, drawn with matplotlib and no state of its own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from patchloom.report.page import Figure

COLOURS = ("#1f6f5c", "#c2571a", "#4a5fc1", "#a0356e", "#7a6a12", "#2b8cbe")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
) -> Figure:
    """Return line charts over one pair of axes.

    Args:
        series: Name to (x, y).
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        title: What the chart shows.
        log_y: Logarithmic y.
    """
    figure, axes = _axes(title, x_label, y_label)
    for number, (name, (x, y)) in enumerate(series.items()):
        marker = "o" if len(x) < 25 else None
        axes.plot(x, y, label=name, color=COLOURS[number % len(COLOURS)], linewidth=1.8, marker=marker, markersize=3.5)
    if log_y:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    ends = "; ".join(f"{name} ends at {y[-1]:.3g}" for name, (_, y) in series.items() if len(y))
    return Figure(_png(figure), f"{title}: {ends}", half=True)


def bars(values: Mapping[str, float], *, y_label: str, title: str) -> Figure:
    """Return horizontal bars with their values.

    Args:
        values: Name to value.
        y_label: What the values are.
        title: What the chart shows.
    """
    figure, axes = _axes(title, y_label, "")
    names = list(values)
    drawn = axes.barh(range(len(names)), list(values.values()), color=COLOURS[0], height=0.6)
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    spoken = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return Figure(_png(figure), f"{title}: {spoken}", half=True)


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(5.0, 3.1), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
