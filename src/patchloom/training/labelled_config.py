"""Settings of every way to learn from labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from patchloom.base.choices import Weighting
from patchloom.base.ranges import Fraction, NonNegative, PositiveInt, Probability, Share
from patchloom.base.settings import Settings
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import AdversaryOptions


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(AdversaryOptions, TrainConfig):
    """Settings of learning from labels."""

    test: str | None = None
    """Labelled images to measure on; default: val_fraction of data, held out"""
    val_fraction: Fraction = 0.1
    """Share of data held out to measure on where test is not given, in [0, 1); 0 for none"""
    groups: str | None = None
    """CSV file (columns key, group): images of one group (patient, slide, scene) are held out together or not at all"""
    label_fraction: Share = 1.0
    """Share of each class's images to learn from, in (0, 1]"""
    shots: PositiveInt | None = None
    """Images of each class to learn from, instead of a share"""
    imbalance: Annotated[float, Ge(1)] | None = None
    """Make classes unequal: the first keeps so many times as many images as the last (long-tailed benchmarks: 100)"""
    imbalance_kind: Literal["exp", "step"] = "exp"
    """How: exp falls geometrically from class to class, step gives the second half of the classes the fewest"""
    task: Literal["auto", "single", "multi", "ordinal"] = "auto"
    """One class per image, several labels, or grades in the order of their names; auto is single or multi"""
    class_weights: Weighting = "none"
    """How much a class counts in the loss: none (all alike), balanced (1/n), sqrt (1/√n) or effective number"""
    reweight_from: Fraction = 0.0
    """Share of the run, in [0, 1), from which class_weights count (deferred re-weighting); 0: from its start"""
    label_smoothing: Probability = 0.0
    """Share of the target spread over all classes, where an image has one"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.shots is not None and self.label_fraction < 1:
            raise UsageError("shots and label_fraction both say how many labels to learn from; give one of them")
        if self.groups is not None and self.test is not None:
            raise UsageError("groups says how to hold images out of data, and test gives others; give one of them")


@dataclass(frozen=True, kw_only=True)
class LossOptions(Settings):
    """What the loss against the labels knows of classes and grades."""

    logit_adjustment: NonNegative = 0.0
    """For long-tailed classes: this times the log of a class's share is added to its logit in training; paper: 1"""
    ordinal_distance: NonNegative = 0.0
    """For grades: weight of the squared distance between cumulative distributions, beside cross-entropy"""
