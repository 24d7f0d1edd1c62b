"""Settings of every way to train a whole classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import (
    Count,
    Fraction,
    NonNegative,
    PositiveInt,
    Probability,
    Proportion,
    Share,
)
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.labelled_config import LabelledConfig, LossOptions
from patchloom.training.options import AverageOptions, EncoderOptions, ExpertOptions, ViewOptions


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(ViewOptions, LabelledConfig):
    """Settings of learning from labels on images augmented as timm does for classifiers."""

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment as timm spells it; null for none"""
    erasing: Probability = 0.25
    """Probability of random erasing"""
    crop_padding: Count | None = None
    """Instead, a crop of the whole image with so many black pixels around it; 4 is usual for images of 32 pixels"""


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(AverageOptions, EncoderOptions, AugmentationConfig):
    """Settings of training a whole classifier."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "betas": (0.9, 0.999),
        "clip_grad": None,
        "label_smoothing": 0.1,
        "crop_scale": (0.08, 1.0),
        "color_jitter": Cited(0.4, "in force without RandAugment only"),
    }

    optimizer: Literal["adamw", "sgd", "lamb"] = "adamw"
    """Optimiser; sgd has momentum"""
    momentum: Fraction = 0.9
    """Momentum of sgd"""
    lr_drops: tuple[Proportion, ...] = ()
    """Shares of the run, in (0, 1), at which the learning rate is multiplied by lr_drop; empty for the cosine"""
    lr_drop: Share = 0.1
    """Factor on the learning rate at each of lr_drops"""
    sam_rho: NonNegative = 0.0
    """Sharpness-aware minimisation: ρ, how far from the weights the gradient is taken; twice the time; 0 for none"""
    sam_rho_late: NonNegative | None = None
    """ρ from reweight_from on; default: as before"""
    mixup: NonNegative = 0.8
    """Alpha of mixup; 0 turns it off"""
    cutmix: NonNegative = 1.0
    """Alpha of cutmix; 0 turns it off"""
    switch_prob: Probability = 0.5
    """Probability of cutmix where both are on"""
    repeated_augmentation: PositiveInt = 1
    """Times each image comes in a row, augmented anew; an epoch then goes through one part in so many of the images"""
    init_scale: NonNegative = 1.0
    """Factor on the classifier's initial weights"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if (self.sam_rho or self.sam_rho_late) and (self.strategy == "fsdp" or self.precision == "16-mixed"):
            raise UsageError(
                "sharpness-aware minimisation needs whole gradients as they are: strategy=fsdp holds them in shards "
                "and precision=16-mixed scales them; use ddp, and bf16-mixed or 32-true"
            )


@dataclass(frozen=True, kw_only=True)
class PooledHeadOptions(ExpertOptions, LossOptions):
    """Of a classifier with one head on what the encoder pools."""

    pool: Literal["avg", "cls"] = "avg"
    """What the classifier of a ViT reads: the mean over patches or the class token"""
