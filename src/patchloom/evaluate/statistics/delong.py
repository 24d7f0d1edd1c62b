"""Where DeLong's test was before it came to stand below training: `patchloom.statistics.delong`."""

from patchloom.statistics.delong import delong, delong_interval

__all__ = ["delong", "delong_interval"]
