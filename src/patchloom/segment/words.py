"""Figures and their intervals in words."""

from __future__ import annotations

from collections.abc import Sequence


def between(interval: Sequence[float | None] | None) -> str:
    """Return an interval in words, nothing where there is none."""
    low, high = interval or (None, None)
    return "" if low is None or high is None or low != low else f" (95 %: {low:.1%} to {high:.1%})"


def rate(value: float | None) -> str:
    """Return a figure in words."""
    return "not defined" if value is None or value != value else f"{value:.1%}"
