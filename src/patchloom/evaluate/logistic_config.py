"""Settings of logistic regression over a range of penalties."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.errors import UsageError
from patchloom.evaluate.subset_config import SubsetConfig

CHOICES = tuple(10.0 ** (quarter / 4) for quarter in range(-24, 21))


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(SubsetConfig):
    """Settings of the sweep; the defaults are DINOv2's."""

    val: str | None = None
    """Labelled images to choose the penalty on; default: a tenth of train, held out"""
    cs: tuple[float, ...] = CHOICES
    """Inverse strengths of the L2 penalty to try, rising; DINOv2: 45 from 1e-6 to 1e5"""
    max_iter: int = 1000
    """Most iterations of L-BFGS per penalty"""
    standardise: bool = False
    """Bring every feature to mean 0 and deviation 1 first; DINOv2 does not"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if not self.cs or min(self.cs) <= 0 or list(self.cs) != sorted(self.cs):
            raise UsageError(f"cs is {self.cs}; name at least one strength above 0, in rising order")
        if self.max_iter < 1:
            raise UsageError(f"max_iter is {self.max_iter}; it must be at least 1")
