"""End-to-end fine-tuning for classification, by the recipe of BEiT and CCViT.

Layer-wise learning rates, stochastic depth, RandAugment, mixup, cutmix, random erasing, label smoothing, mean
pooling over patches. CCViT specification, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import Tensor, nn

from patchloom.adapt.labelled import LabelledConfig, LabelledMethod
from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import FinetuneTransform, make_mixup
from patchloom.encoders import Encoder, create_encoder
from patchloom.errors import UsageError
from patchloom.training.method import Transform


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LabelledConfig):
    """Settings of fine-tuning; the defaults are the paper's for a base encoder on ImageNet-1K."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # MAE's recipe for a base encoder: arXiv 2111.06377.
        "mae": {"lr": 5e-4, "lr_base_batch": 256, "warmup_epochs": 5.0},
        # Findings on chest X-rays from a small encoder: arXiv 2210.12843.
        "thorax": {
            "epochs": 75,
            "lr": 2.5e-4,
            "lr_base_batch": 256,
            "min_lr": 1e-5,
            "warmup_epochs": 5.0,
            "layer_decay": 0.55,
            "drop_path": 0.2,
            "auto_augment": "rand-m6-mstd0.5-inc1",
            "mixup": 0.0,
            "cutmix": 0.0,
            "label_smoothing": 0.0,
            "erasing": 0.0,
        },
    }

    epochs: int = 100
    """Passes over the images; paper: 100 for base, 50 for large"""
    lr: float = 2e-3
    """Peak learning rate for a global batch of 1024; paper: 2e-3 for base, 1e-3 for large"""
    lr_base_batch: int | None = 1024
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine"""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up from 0; paper: 20 for base, 10 for large; at most a fifth of the run is used"""
    layer_decay: float = 0.65
    """Factor on the learning rate from each block to the one below it; paper: 0.65 for base, 0.8 for large"""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; paper: 0.1 for base, 0.2 for large"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas"""
    clip_grad: float | None = None
    """Largest global L2 norm of the gradient; paper: no clipping"""
    pool: Literal["avg", "cls"] = "avg"
    """What the classifier reads: the mean over patches (paper) or the class token"""
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
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and most share of the image's area that a crop takes"""
    init_scale: float = 0.001
    """Factor on the classifier's initial weights"""
    relative_position_decay: bool = True
    """Apply weight decay to relative-position tables, as published"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        for name in ("erasing", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")


class FinetuneMethod(LabelledMethod):
    """End-to-end fine-tuning of all weights for classification."""

    config_class = FinetuneConfig
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        # Mixed images have shares of classes; several labels each have nothing to mix.
        mixed = (config.mixup > 0 or config.cutmix > 0) and self.targets.kind != "multi"
        self.mix = (
            make_mixup(
                len(self.class_names),
                mixup=config.mixup,
                cutmix=config.cutmix,
                switch_prob=config.switch_prob,
                label_smoothing=config.label_smoothing,
            )
            if mixed
            else None
        )

    def build_encoder(self) -> Encoder:
        """Return the encoder with a fresh classifier."""
        encoder = super().build_encoder()
        config = self.config
        model = as_classifier(encoder, len(self.class_names), config.pool, config.init_scale, config.drop_path)
        model.pretrained_cfg = {**encoder.pretrained_cfg, "label_names": self.class_names}  # timm's own place for them
        return model

    def transform(self) -> Transform:
        """Return timm's fine-tuning augmentation."""
        config = self.config
        pretrained = self.encoder.pretrained_cfg
        return FinetuneTransform(
            self.input_size,
            mean=pretrained["mean"],
            std=pretrained["std"],
            scale=config.crop_scale,
            auto_augment=config.auto_augment,
            color_jitter=config.color_jitter,
            erasing=config.erasing,
        )

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the cross-entropy against mixed, smoothed labels."""
        images, labels = batch["image"], batch["label"]
        if self.mix is not None:
            generator = torch.Generator().manual_seed(torch.initial_seed())
            images, labels = self.mix(images, labels, generator)
        return {"loss": self.targets.loss(self.encoder(images), labels)}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies; relative-position tables as the settings say."""
        if name.endswith("relative_position_bias_table") and not self.config.relative_position_decay:
            return False
        return super().decays(name, parameter)


def as_classifier(
    encoder: Encoder, num_classes: int, pool: str = "avg", init_scale: float = 0.001, drop_path: float = 0.0
) -> Encoder:
    """Return a classifier with the encoder's weights.

    A `Beit` whose blocks share one relative-position table gets a table per block, each a copy; with mean pooling
    the final norm gives way to a fresh `fc_norm` over the pooled feature (specification, section 3.2).

    Args:
        encoder: Made by `create_encoder` (it remembers what it was made from).
        num_classes: Outputs of the classifier.
        pool: `avg` or `cls`.
        init_scale: Factor on the classifier's initial weights.
        drop_path: Stochastic depth rate of the last block.
    """
    made = encoder.patchloom_args
    model_args = {
        name: value for name, value in made["model_args"].items() if name not in ("num_classes", "global_pool")
    }
    model_args["global_pool"] = "avg" if pool == "avg" else "token"
    if isinstance(encoder, Beit):
        model_args |= {"use_fc_norm": pool == "avg"}
        if encoder.rel_pos_bias is not None:
            model_args |= {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
    size = model_args.pop("img_size", None)
    channels = model_args.pop("in_chans", 3)
    model = create_encoder(made["architecture"], image_size=size, in_chans=channels, drop_path=drop_path, **model_args)
    state = dict(encoder.state_dict())
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None and isinstance(encoder, Beit):
        for number in range(len(model.blocks)):
            state[f"blocks.{number}.attn.relative_position_bias_table"] = shared.clone()
    own = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
    model.reset_classifier(num_classes)
    made_args = {**model.patchloom_args["model_args"], "num_classes": num_classes}
    model.patchloom_args = {**model.patchloom_args, "model_args": made_args}
    trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        model.head.weight.mul_(init_scale)
    return model
