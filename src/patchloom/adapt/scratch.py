"""Supervised training from scratch: DeiT's recipe for ViTs, and the one that gives CNN teachers of long-tailed sets.

Touvron et al. 2021, arXiv 2012.12877; for the CNNs specification `deit_lt`, section 2.6: LDAM with deferred
re-weighting (Cao et al. 2019, arXiv 1906.07413) by sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.training.margins import LDAM, classify_by_angle_, cosines, has_linear_head
from patchloom.training.supervised import SupervisedConfig, SupervisedMethod

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
class ScratchConfig(SupervisedConfig):
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

    encoder: str = "deit_small_patch16_224"
    """Name of a timm model: a ViT, or any network; its weights are drawn anew"""
    lr: float = 5e-4
    """Peak learning rate for a global batch of 512"""
    lr_base_batch: int | None = 512
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0; at most a fifth of the run is used"""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, in [0, 1)"""
    pool: Literal["avg", "cls"] = "cls"
    """What the classifier of a ViT reads: the class token (paper) or the mean over patches"""
    repeated_augmentation: int = 3
    """Times each image comes in a row, augmented anew; an epoch then goes through one part in so many of the images"""
    loss: Literal["ce", "ldam"] = "ce"
    """Cross-entropy, or LDAM: on cosines, with a margin that is the wider the rarer the class; without mixed labels"""
    ldam_margin: float = 0.5
    """Margin of the rarest class; the others' fall with the fourth root of the number of images"""
    ldam_scale: float = 30.0
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
        for name in ("ldam_margin", "ldam_scale"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")


class ScratchMethod(SupervisedMethod):
    """Supervised training of any timm model from fresh weights."""

    config_class = ScratchConfig
    config: ScratchConfig

    def __init__(self, config: ScratchConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.margins: LDAM | None = None
        if config.loss == "ldam":
            if self.targets.kind != "single" or self.targets.counts is None:
                raise UsageError(f"loss=ldam needs one class per image and a folder; {config.data} is something else")
            self.margins = LDAM(self.targets.counts, config.ldam_margin, config.ldam_scale)

    def build_encoder(self) -> Encoder:
        """Return the model; where it is trained on cosines its classifier has no bias.

        Raises:
            UsageError: LDAM, and a model that does not classify by one linear layer.
        """
        model = super().build_encoder()
        if self.config.loss == "ldam":
            if not has_linear_head(model):
                raise UsageError(
                    f"loss=ldam needs a model that classifies by one linear layer; {self.config.encoder} does not"
                )
            classify_by_angle_(model)
            if model.get_classifier().bias is not None:
                model.get_classifier().bias.requires_grad_(False)
        return model

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss against the labels."""
        if self.margins is None:
            return super().training_loss(batch)
        images, labels = self.mixed(batch)
        weights = self.targets.weights if self.targets.weighing else None
        return {"loss": self.margins(cosines(self.encoder, images), labels, weights)}

    def bundle_model(self) -> Encoder:
        """Return what is shipped; trained on cosines, a plain model whose first choice is that of the cosines."""
        model = super().bundle_model()
        if self.margins is None:
            return model
        model = copy.deepcopy(model)
        classify_by_angle_(model)
        return model
