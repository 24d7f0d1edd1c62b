"""Figures and their intervals in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def between(interval: Sequence[float | None] | None) -> str:
    """Return an interval in words, nothing where there is none."""
    low, high = interval or (None, None)
    return "" if low is None or high is None or low != low else f" (95 %: {low:.1%} to {high:.1%})"


def rate(value: float | None) -> str:
    """Return a figure in words."""
    return "not defined" if value is None or value != value else f"{value:.1%}"


def told(figures: Mapping[str, Any]) -> str:
    """Return mean IoU, pixel accuracy and boundary F with their intervals in sentences."""
    return (
        f"Mean IoU {rate(figures['miou'])}{between(figures.get('interval'))}. Pixels right: "
        f"{rate(figures['pixel_accuracy_test'])}{between(figures.get('pixel_accuracy_test_interval'))}. Borders: F "
        f"{rate(figures['boundary_f'])}{between(figures.get('boundary_f_interval'))}."
    )
