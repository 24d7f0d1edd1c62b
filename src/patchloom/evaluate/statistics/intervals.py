"""Where intervals and comparisons were before they came to stand below training: `patchloom.statistics.intervals`."""

from patchloom.statistics.intervals import (
    Difference,
    Interval,
    bootstrap_interval,
    holm,
    mean_interval,
    paired_bootstrap,
)

__all__ = ["Difference", "Interval", "bootstrap_interval", "holm", "mean_interval", "paired_bootstrap"]
