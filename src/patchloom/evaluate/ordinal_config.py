"""Settings of the evaluation of grades."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.evaluate.linear_config import LinearProbeConfig


@dataclass(frozen=True, kw_only=True)
class OrdinalConfig(LinearProbeConfig):
    """Settings of the evaluation of grades."""

    grades: list[str] | None = None
    """Classes from the lowest grade to the highest; default: by number where all names are numbers, else by name"""
    decide: Literal["likeliest", "expected"] = "likeliest"
    """The likeliest grade, or the mean over all by probability, rounded"""
