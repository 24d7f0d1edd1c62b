"""Settings of the classification of volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.base.choices import Plane, Window
from patchloom.base.ranges import Count, Positive, PositiveInt
from patchloom.errors import UsageError
from patchloom.evaluate.config import EvaluationConfig

SlicePool = Literal["mean", "max", "attention"]
C = 1.0


@dataclass(frozen=True, kw_only=True)
class VolumesConfig(EvaluationConfig):
    """Settings of the classification of volumes."""

    train: str
    """Volumes to learn from: a folder of .nii and .nii.gz files in a sub-folder per class"""
    test: str
    """Volumes to measure on, of the same classes"""
    slice_pool: SlicePool = "mean"
    """How slices become one volume: their mean, their maximum, or attention over them (ABMIL)"""
    plane: Plane = "axial"
    """Along which axis of the body slices follow one another"""
    window: Window = "minmax"
    """Grey values: minmax (each slice's own range, published), ct (-1024 to 600), mr (5th to 95th percentile)"""
    channel: Count | None = None
    """Which of the images of 4-D files; default: such files are refused"""
    slices: PositiveInt | None = None
    """Most slices of a volume, evenly spaced; default: all"""
    c: Positive = C
    """Inverse strength of the L2 penalty of the logistic regression, for mean and max"""
    epochs: PositiveInt = 50
    """Passes over the training volumes, for attention"""
    lr: Positive = 1e-3
    """Learning rate of Adam, for attention"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.view != "crop":
            raise UsageError(f"view is {self.view}, and slices are shown whole, in proportion; see window instead")
