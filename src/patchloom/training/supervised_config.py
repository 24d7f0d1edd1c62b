"""Settings of every way to train a whole classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.errors import UsageError
from patchloom.training.labelled_config import LabelledConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(LabelledConfig):
    """Settings of training a whole classifier."""

    optimizer: Literal["adamw", "sgd", "lamb"] = "adamw"
    """Optimiser; sgd has momentum"""
    momentum: float = 0.9
    """Momentum of sgd"""
    lr_drops: tuple[float, ...] = ()
    """Shares of the run, in (0, 1), at which the learning rate is multiplied by lr_drop; empty for the cosine"""
    lr_drop: float = 0.1
    """Factor on the learning rate at each of lr_drops"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of adamw and lamb"""
    sam_rho: float = 0.0
    """Sharpness-aware minimisation: ρ, how far from the weights the gradient is taken; twice the time; 0 for none"""
    sam_rho_late: float | None = None
    """ρ from reweight_from on; default: as before"""
    clip_grad: float | None = None
    """Largest global L2 norm of the gradient; null for no clipping"""
    pool: Literal["avg", "cls"] = "avg"
    """What the classifier of a ViT reads: the mean over patches or the class token"""
    mixup: float = 0.8
    """Alpha of mixup; 0 turns it off"""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 turns it off"""
    switch_prob: float = 0.5
    """Probability of cutmix where both are on"""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes"""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment as timm spells it; null for none"""
    color_jitter: float = 0.4
    """Strength of colour jitter, in force without RandAugment only"""
    erasing: float = 0.25
    """Probability of random erasing"""
    flip: float = 0.5
    """Probability of the horizontal flip; 0 where left and right differ, as in digits"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and most share of the image's area that a crop takes"""
    crop_padding: int | None = None
    """Instead, a crop of the whole image with so many black pixels around it; 4 is usual for images of 32 pixels"""
    repeated_augmentation: int = 1
    """Times each image comes in a row, augmented anew; an epoch then goes through one part in so many of the images"""
    init_scale: float = 1.0
    """Factor on the classifier's initial weights"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        for name in ("erasing", "switch_prob", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        for name in ("sam_rho", "sam_rho_late"):
            if (getattr(self, name) or 0.0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if (self.sam_rho or self.sam_rho_late) and (self.strategy == "fsdp" or self.precision == "16-mixed"):
            raise UsageError(
                "sharpness-aware minimisation needs whole gradients as they are: strategy=fsdp holds them in shards "
                "and precision=16-mixed scales them; use ddp, and bf16-mixed or 32-true"
            )
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
        if self.repeated_augmentation < 1:
            raise UsageError(f"repeated_augmentation is {self.repeated_augmentation}; it must be at least 1")
        if self.crop_padding is not None and self.crop_padding < 0:
            raise UsageError(f"crop_padding is {self.crop_padding}; it must be at least 0")
        if not all(0 < share < 1 for share in self.lr_drops):
            raise UsageError(f"lr_drops is {self.lr_drops}; give shares of the run, above 0 and below 1")
        if not 0 < self.lr_drop <= 1:
            raise UsageError(f"lr_drop is {self.lr_drop}; it must be above 0 and at most 1")
