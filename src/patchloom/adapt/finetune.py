"""End-to-end fine-tuning for classification, by the recipe of BEiT and CCViT.

Layer-wise learning rates, stochastic depth, RandAugment, mixup, cutmix, random erasing, label smoothing, mean
pooling over patches. CCViT specification, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from patchloom.data import make_loader, open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import EvalTransform, FinetuneTransform, make_mixup
from patchloom.encoders import Encoder, create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.method import Method, Transform

if TYPE_CHECKING:
    from patchloom.report import Section


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Settings of fine-tuning; the defaults are the paper's for a base encoder on ImageNet-1K."""

    test: str | None = None
    """Labelled images to measure accuracy on; default: none are held out"""
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
        for name in ("label_smoothing", "erasing", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")


class FinetuneMethod(Method):
    """End-to-end fine-tuning of all weights for classification."""

    config_class = FinetuneConfig
    needs_labels = True
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, source: Source | StreamSource) -> None:
        if source.class_names is None or len(source.class_names) < 2:
            raise UsageError(f"fine-tuning needs at least two classes; {config.data} has {source.class_names}")
        self.class_names = list(source.class_names)
        super().__init__(config, source)
        self.test = None if config.test is None else open_source(config.test, in_chans=config.in_chans)
        if self.test is not None and self.test.class_names != self.class_names:
            raise UsageError(
                f"the test images {config.test} have other classes than {config.data}: "
                f"{self.test.class_names} and {self.class_names}"
            )
        mixed = config.mixup > 0 or config.cutmix > 0
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
            images, targets = self.mix(images, labels, generator)
            loss = torch.sum(-targets * F.log_softmax(self.encoder(images).float(), dim=-1), dim=-1).mean()
        else:
            logits = self.encoder(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies; relative-position tables as the settings say."""
        if name.endswith("relative_position_bias_table") and not self.config.relative_position_decay:
            return False
        return super().decays(name, parameter)

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return accuracy, the mean over classes, and the accuracy of each class, on the test images."""
        if self.test is None:
            return {}
        config, classes = self.config, len(self.class_names)
        model = self.bundle_model()
        training = model.training
        model.eval()
        per_class = MulticlassAccuracy(classes, average="none").to(device)
        overall = MulticlassAccuracy(classes, average="micro").to(device)
        transform = EvalTransform(self.input_size)
        loader = make_loader(
            self.test, transform, config.batch_size, seed=0, shuffle=False, num_workers=config.num_workers
        )
        present = torch.zeros(classes, dtype=torch.bool)
        for batch in loader:
            if not batch["key"]:
                continue
            logits = model(normalize(self.pixels(batch["image"].to(device)), model)).float()
            labels = batch["label"].to(device)
            present[batch["label"]] = True
            per_class.update(logits, labels)
            overall.update(logits, labels)
        model.train(training)
        shares = per_class.compute().cpu()
        return {
            "accuracy": float(overall.compute()),
            "balanced_accuracy": float(shares[present].mean()),
            "per_class_accuracy": {
                name: float(share)
                for name, share, seen in zip(self.class_names, shares, present.tolist(), strict=True)
                if seen
            },
        }

    def summary(self) -> dict[str, Any]:
        """Return the classes the model tells apart, in the order of its outputs."""
        return {"class_names": self.class_names}

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the accuracy of each class."""
        from patchloom.report import Section

        figures = self.validate(self.device)
        if not figures:
            return []
        table: list[dict[str, object]] = [
            {"class": name, "accuracy": f"{share:.1%}"} for name, share in figures["per_class_accuracy"].items()
        ]
        text = f"{figures['accuracy']:.1%} of the test images; mean over classes {figures['balanced_accuracy']:.1%}."
        return [Section(title="Accuracy by class", text=text, table=table)]


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
