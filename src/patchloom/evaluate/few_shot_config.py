"""Settings of few-shot classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(EvaluationConfig):
    """Settings of few-shot episodes."""

    ways: int = 5
    """Classes per episode"""
    shots: int = 5
    """Images per class to learn from, of train"""
    queries: int = 15
    """Images per class to measure on, of test"""
    episodes: int = 600
    """Episodes; the interval shrinks with the root of their number"""
    classifier: Literal["nearest", "logistic"] = "nearest"
    """Which of the two the score is: the nearest class mean by cosine similarity, or logistic regression"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("episodes", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.groups is not None:
            raise UsageError("few_shot draws episodes, not images, so groups has no meaning here; leave it out")
        if self.classifier not in ("nearest", "logistic"):
            raise unknown_name("classifier", self.classifier, ("nearest", "logistic"))
