"""Settings of logistic regression over a range of penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen

from patchloom.base.ranges import Positive, PositiveInt, Rising
from patchloom.evaluate.subset_config import SubsetConfig

CHOICES = tuple(10.0 ** (quarter / 4) for quarter in range(-24, 21))


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(SubsetConfig):
    """Settings of the sweep; the defaults are DINOv2's."""

    val: str | None = None
    """Labelled images to choose the penalty on; default: a tenth of train, held out"""
    cs: Annotated[tuple[Positive, ...], MinLen(1), Rising()] = CHOICES
    """Inverse strengths of the L2 penalty to try, rising; DINOv2: 45 from 1e-6 to 1e5"""
    max_iter: PositiveInt = 1000
    """Most iterations of L-BFGS per penalty"""
    standardise: bool = False
    """Bring every feature to mean 0 and deviation 1 first; DINOv2 does not"""
