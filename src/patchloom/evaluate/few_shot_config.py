"""Settings of few-shot classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from patchloom.base.ranges import PositiveInt
from patchloom.errors import UsageError
from patchloom.evaluate.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(EvaluationConfig):
    """Settings of few-shot episodes."""

    ways: Annotated[int, Ge(2)] = 5
    """Classes per episode"""
    shots: PositiveInt = 5
    """Images per class to learn from, of train"""
    queries: PositiveInt = 15
    """Images per class to measure on, of test"""
    episodes: Annotated[int, Ge(2)] = 600
    """Episodes; the interval shrinks with the root of their number"""
    classifier: Literal["nearest", "logistic"] = "nearest"
    """Which of the two the score is: the nearest class mean by cosine similarity, or logistic regression"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.groups is not None:
            raise UsageError("few_shot draws episodes, not images, so groups has no meaning here; leave it out")
