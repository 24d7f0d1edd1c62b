"""Settings of the linear probe."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.errors import UsageError
from patchloom.evaluate.subset_config import SubsetConfig


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(SubsetConfig):
    """Settings of the linear probe."""

    c: float | None = None
    """Inverse strength of the L2 penalty; default: the best of 1e-4 … 10 on a held-out fifth of the training images"""
    max_iter: int = 500
    """Most iterations of L-BFGS"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.c is not None and not self.c > 0:
            raise UsageError(f"c is {self.c}; it must be above 0")
        if self.max_iter < 1:
            raise UsageError(f"max_iter is {self.max_iter}; it must be at least 1")
