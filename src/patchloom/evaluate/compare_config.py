"""Settings of paired comparisons of encoders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from patchloom.base.ranges import Count
from patchloom.base.settings import Settings
from patchloom.errors import UsageError
from patchloom.evaluate.config import Resample


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Settings):
    """Settings of a comparison."""

    encoders: Any = None
    """Encoders to compare, such as runs/a,runs/b (in Python also a list), each measured by the evaluation `by`"""
    files: Any = None
    """Instead of encoders: files of predictions of the same images, such as a.npz,b.npz"""
    by: str = "knn"
    """Evaluation that measures each encoder: knn, linear …"""
    train: str | None = None
    """Labelled images to learn from"""
    test: str | None = None
    """Labelled images to measure on"""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings of the evaluation, such as --settings.k 5"""
    against: Literal["all", "first"] = "all"
    """Compare every pair, or each with the first only"""
    draws: Annotated[int, Ge(2)] = 1000
    """Draws of the paired bootstrap"""
    resample: Resample = "images"
    """What bootstrap draws choose from: images, all alike; or classes, as many images of each as there are, which takes
    the shares of the classes as given and is narrower"""
    seed: Count = 0
    """Seed of the draws, and of the evaluations"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if (self.encoders is None) == (self.files is None):
            raise UsageError("give either encoders or files of predictions to compare")
        if self.encoders is not None and (self.train is None or self.test is None):
            raise UsageError("encoders are measured on images: give train and test")
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
