"""Settings of every way to learn from labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.base.choices import Weighting
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(TrainConfig):
    """Settings of learning from labels."""

    test: str | None = None
    """Labelled images to measure on; default: val_fraction of data, held out"""
    val_fraction: float = 0.1
    """Share of data held out to measure on where test is not given, in [0, 1); 0 for none"""
    groups: str | None = None
    """CSV file (columns key, group): images of one group (patient, slide, scene) are held out together or not at all"""
    label_fraction: float = 1.0
    """Share of each class's images to learn from, in (0, 1]"""
    shots: int | None = None
    """Images of each class to learn from, instead of a share"""
    imbalance: float | None = None
    """Make classes unequal: the first keeps so many times as many images as the last (long-tailed benchmarks: 100)"""
    imbalance_kind: Literal["exp", "step"] = "exp"
    """How: exp falls geometrically from class to class, step gives the second half of the classes the fewest"""
    task: Literal["auto", "single", "multi", "ordinal"] = "auto"
    """One class per image, several labels, or grades in the order of their names; auto is single or multi"""
    class_weights: Weighting = "none"
    """How much a class counts in the loss: none (all alike), balanced (1/n), sqrt (1/√n) or effective number"""
    reweight_from: float = 0.0
    """Share of the run, in [0, 1), from which class_weights count (deferred re-weighting); 0: from its start"""
    logit_adjustment: float = 0.0
    """For long-tailed classes: this times the log of a class's share is added to its logit in training; paper: 1"""
    ordinal_distance: float = 0.0
    """For grades: weight of the squared distance between cumulative distributions, beside cross-entropy"""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, where an image has one"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if not 0 < self.label_fraction <= 1:
            raise UsageError(f"label_fraction is {self.label_fraction}; it must be above 0 and at most 1")
        if not 0 <= self.val_fraction < 1:
            raise UsageError(f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1")
        if self.shots is not None and self.shots < 1:
            raise UsageError(f"shots is {self.shots}; it must be at least 1")
        if self.shots is not None and self.label_fraction < 1:
            raise UsageError("shots and label_fraction both say how many labels to learn from; give one of them")
        if self.imbalance is not None and self.imbalance < 1:
            raise UsageError(f"imbalance is {self.imbalance}; it must be at least 1")
        if not 0 <= self.reweight_from < 1:
            raise UsageError(
                f"reweight_from is {self.reweight_from}, so class weights would never count; it is a share of the run, "
                f"at least 0 and below 1"
            )
        if not 0 <= self.label_smoothing <= 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1]")
        for name in ("logit_adjustment", "ordinal_distance"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.groups is not None and self.test is not None:
            raise UsageError("groups says how to hold images out of data, and test gives others; give one of them")
