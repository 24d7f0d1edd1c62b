"""Settings of supervised training from scratch, and the published recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Positive
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.supervised_config import PooledHeadOptions, SupervisedConfig

CNN = {
    "encoder": "cifar_resnet32",
    "epochs": 200,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "lr_base_batch": None,
    "lr_drops": (0.8, 0.9),
    "lr_drop": 0.01,
    "weight_decay": 2e-4,
    "drop_path": 0.0,
    "crop_padding": 4,
    "repeated_augmentation": 1,
    "auto_augment": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class ScratchConfig(PooledHeadOptions, SupervisedConfig):
    """Settings of training from scratch; the defaults are DeiT's for a small or base ViT on ImageNet-1K."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # CNNs on small images: SGD, crop and flip.
        "cnn": CNN,
        # The same for rare classes, with flat minima: a teacher for `patchloom distill deit_lt`.
        "ldam_sam": {
            **CNN,
            "weight_decay": 5e-4,
            "loss": "ldam",
            "class_weights": "effective",
            "reweight_from": 0.8,
            "sam_rho": 0.05,
            "sam_rho_late": 0.5,
        },
    }

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "lr": 5e-4,
        "lr_base_batch": 512,
        "warmup_epochs": 5.0,
        "drop_path": 0.1,
        "pool": Cited("cls", "paper: the class token"),
        "repeated_augmentation": 3,
    }

    encoder: str = "deit_small_patch16_224"
    """Name of a timm model: a ViT, or any network; its weights are drawn anew"""
    loss: Literal["ce", "ldam"] = "ce"
    """Cross-entropy, or LDAM: on cosines, with a margin that is the wider the rarer the class; without mixed labels"""
    ldam_margin: Positive = 0.5
    """Margin of the rarest class; the others' fall with the fourth root of the number of images"""
    ldam_scale: Positive = 30.0
    """Factor on the cosines"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        given = self.init_from if self.init_from is not None else self.encoder if Path(self.encoder).exists() else None
        if given is not None:
            raise UsageError(
                f"training from scratch draws its weights anew, so {given} is not used; see adapt finetune"
            )
        if self.loss == "ldam" and (self.mixup > 0 or self.cutmix > 0 or self.label_smoothing > 0):
            raise UsageError("a margin belongs to one class: with loss=ldam set mixup, cutmix and label_smoothing to 0")
        if self.loss == "ldam" and (self.strategy == "fsdp" or self.experts or self.logit_adjustment):
            raise UsageError("loss=ldam goes without strategy=fsdp, experts and logit_adjustment; leave them out")
