"""Settings of DeiT-LT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.choices import Weighting
from patchloom.base.ranges import Fraction, Positive, Probability
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.distill_config import DistillConfig


@dataclass(frozen=True, kw_only=True)
class DeiTLTConfig(DistillConfig):
    """Settings of DeiT-LT; the defaults are the paper's for CIFAR-10-LT and CIFAR-100-LT."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("renormalize", "antialias", "weighted_labels")

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet_lt": {"epochs": 1400, "reweight_from": 6 / 7, "mixup_late": True},
        "inaturalist": {"epochs": 1000, "reweight_from": 0.9, "mixup_late": True},
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(1200, "paper: 1200, 1400 on ImageNet-LT, 1000 on iNaturalist"),
        "lr": Cited(5e-4, "published runs leave accumulation (4) out of the global batch"),
        "lr_base_batch": 512,
        "warmup_epochs": 5.0,
        "drop_path": 0.1,
        "repeated_augmentation": 3,
    }

    WITHOUT: ClassVar[Mapping[str, Any]] = {
        "pool": Cited("cls", "each head reads its own token"),
        "logit_adjustment": 0.0,
        "ordinal_distance": 0.0,
        "experts": 0,
        "expert_layers": "alternate",
        "share_rate": 0.3,
        "share_schedule": "linear",
    }

    teacher: str
    """CNN trained on the same images: a run (adapt scratch --preset ldam_sam makes one), a bundle, or a timm name"""
    renormalize: bool = False
    """Normalise the student's view by the teacher's own mean and deviation; paper: the teacher gets it as it is"""
    antialias: bool = False
    """Smooth before the student's view is made smaller for the teacher; paper: not"""
    distillation: Literal["hard", "soft"] = "hard"
    """What the distillation token learns: the teacher's first choice (paper) or its whole distribution"""
    alpha: Probability = 0.5
    """Weight of the distillation token's loss, in [0, 1]; the class token's is 1 - alpha; paper: 0.5"""
    temperature: Positive = 1.0
    """Temperature of soft distillation"""
    class_weights: Weighting = "effective"
    """How much a class counts in the distillation late in the run: effective number of images (paper), or another"""
    reweight_from: Fraction = 11 / 12
    """Share of the run, in [0, 1), from which class weights count; paper: epoch 1100 of 1200"""
    weighted_labels: bool = False
    """Weigh the class token's loss too; for late steps without mixing"""
    mixup_late: bool = False
    """Go on with mixup and cutmix where class weights count; paper: on ImageNet-LT and iNaturalist, not on CIFAR"""
    encoder: str = "deit_base_distilled_patch16_224"
    """Student: a distilled DeiT of timm, whose weights are drawn anew, or the path of a bundle or run to start from"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.distillation == "soft" and self.class_weights != "none":
            raise UsageError(
                "soft distillation cannot be weighted by class; set class_weights=none, or distillation=hard"
            )
        if self.weighted_labels and self.mixup_late:
            raise UsageError("mixed labels are not weighted by class; leave weighted_labels or mixup_late out")
