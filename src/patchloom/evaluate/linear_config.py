"""Settings of the linear probe."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.base.ranges import Positive, PositiveInt
from patchloom.evaluate.subset_config import SubsetConfig


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(SubsetConfig):
    """Settings of the linear probe."""

    c: Positive | None = None
    """Inverse strength of the L2 penalty; default: the best of 1e-4 … 10 on a held-out fifth of the training images"""
    max_iter: PositiveInt = 500
    """Most iterations of L-BFGS"""
