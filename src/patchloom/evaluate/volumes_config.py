"""Settings of the classification of volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from patchloom.base.choices import Plane, Window
from patchloom.errors import UsageError, unknown_name
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
    channel: int | None = None
    """Which of the images of 4-D files; default: such files are refused"""
    slices: int | None = None
    """Most slices of a volume, evenly spaced; default: all"""
    c: float = C
    """Inverse strength of the L2 penalty of the logistic regression, for mean and max"""
    epochs: int = 50
    """Passes over the training volumes, for attention"""
    lr: float = 1e-3
    """Learning rate of Adam, for attention"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.view != "crop":
            raise UsageError(f"view is {self.view}, and slices are shown whole, in proportion; see window instead")
        for name, value, known in (("slice_pool", self.slice_pool, SlicePool), ("window", self.window, Window)):
            if value not in get_args(known):
                raise unknown_name(name, str(value), get_args(known))
        if self.slices is not None and self.slices < 1:
            raise UsageError(f"slices is {self.slices}; at least one is needed")
        if self.epochs < 1 or not self.lr > 0 or not self.c > 0:
            raise UsageError(f"epochs {self.epochs}, lr {self.lr} and c {self.c} must be at least 1, and above 0")
