"""DeiT-LT as a training method: a ViT from scratch on classes that are very unequal, taught by a small CNN.

The model and its loss are in `two_heads`. Rangwani et al. 2024, arXiv 2404.02900; specification `deit_lt`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.distill.teachers import DistillConfig, DistillMethod
from patchloom.distill.two_heads import DistillationTokenLoss, require_two_heads, teacher_view, two_heads
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.training.metrics import read_metrics, series
from patchloom.training.targets import Weighting

if TYPE_CHECKING:
    from patchloom.report import Section

HEADS = {"cls": "class token", "dist": "distillation token", "avg": "mean of both"}
PARTS = ("accuracy", "balanced_accuracy", "accuracy_head", "accuracy_mid", "accuracy_tail")


@dataclass(frozen=True, kw_only=True)
class DeiTLTConfig(DistillConfig):
    """Settings of DeiT-LT; the defaults are the paper's for CIFAR-10-LT and CIFAR-100-LT."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "imagenet_lt": {"epochs": 1400, "reweight_from": 6 / 7, "mixup_late": True},
        "inaturalist": {"epochs": 1000, "reweight_from": 0.9, "mixup_late": True},
    }

    teacher: str
    """CNN trained on the same images: a run (adapt scratch --preset ldam_sam makes one), a bundle, or a timm name"""
    renormalize: bool = False
    """Normalise the student's view by the teacher's own mean and deviation; paper: the teacher gets it as it is"""
    antialias: bool = False
    """Smooth before the student's view is made smaller for the teacher; paper: not"""
    distillation: Literal["hard", "soft"] = "hard"
    """What the distillation token learns: the teacher's first choice (paper) or its whole distribution"""
    alpha: float = 0.5
    """Weight of the distillation token's loss, in [0, 1]; the class token's is 1 - alpha; paper: 0.5"""
    temperature: float = 1.0
    """Temperature of soft distillation"""
    class_weights: Weighting = "effective"
    """How much a class counts in the distillation late in the run: effective number of images (paper), or another"""
    reweight_from: float = 11 / 12
    """Share of the run, in [0, 1), from which class weights count; paper: epoch 1100 of 1200"""
    weighted_labels: bool = False
    """Weigh the class token's loss too; for late steps without mixing"""
    mixup_late: bool = False
    """Go on with mixup and cutmix where class weights count; paper: on ImageNet-LT and iNaturalist, not on CIFAR"""
    encoder: str = "deit_base_distilled_patch16_224"
    """Student: a distilled DeiT of timm, whose weights are drawn anew, or the path of a bundle or run to start from"""
    epochs: int = 1200
    """Passes over the images; paper: 1200, 1400 on ImageNet-LT, 1000 on iNaturalist"""
    lr: float = 5e-4
    """Peak learning rate for a global batch of 512; published runs leave accumulation (4) out of that count"""
    lr_base_batch: int | None = 512
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0; at most a fifth of the run is used"""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block, in [0, 1)"""
    repeated_augmentation: int = 3
    """Times each image comes in a row, augmented anew; an epoch then goes through one part in so many of the images"""
    pool: Literal["avg", "cls"] = "cls"
    """What the heads read: each its own token"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}; it must be in [0, 1]")
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")
        if self.pool != "cls":
            raise UsageError(f"pool is {self.pool}, but each head reads its own token; leave it out")
        if self.distillation == "soft" and self.class_weights != "none":
            raise UsageError(
                "soft distillation cannot be weighted by class; set class_weights=none, or distillation=hard"
            )
        if self.weighted_labels and self.mixup_late:
            raise UsageError("mixed labels are not weighted by class; leave weighted_labels or mixup_late out")
        if self.logit_adjustment or self.ordinal_distance or self.experts:
            raise UsageError("deit_lt goes without logit_adjustment, ordinal_distance and experts; leave them out")


class DeiTLTMethod(DistillMethod):
    """A ViT with a token for the labels and one for a CNN, which is asked about the student's own strong views."""

    config_class = DeiTLTConfig
    config: DeiTLTConfig

    def __init__(self, config: DeiTLTConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        labels = self.source.labels if isinstance(self.source, Source) else None
        if labels is None or self.targets.kind != "single":
            raise UsageError(
                f"deit_lt needs one class per image and their counts; {config.data} has others, or is a stream"
            )
        if unknown := int((labels < 0).sum()):
            raise UsageError(f"{unknown} images of {config.data} have no class; leave them out")
        self.teacher.check_classes(self.class_names)
        if not config.renormalize and any(
            tuple(self.teacher.model.pretrained_cfg[name]) != tuple(self.encoder.pretrained_cfg[name])
            for name in ("mean", "std")
        ):
            self.notice(
                "the teacher was trained on images normalised otherwise, and is shown the student's as they are, as "
                "published; renormalize changes that"
            )
        self.loss = DistillationTokenLoss(config.alpha, config.distillation, config.temperature, self.targets.weights)

    def build_encoder(self) -> Encoder:
        """Return the student with both heads.

        Raises:
            UsageError: A model without distillation token.
        """
        model = super().build_encoder()
        require_two_heads(model)
        return model

    def starting_weights(self, encoder: Encoder, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let a ViT with a class token alone start a student: its distillation token begins as a copy of that."""
        own = encoder.state_dict()
        if "dist_token" not in own or "dist_token" in saved or "cls_token" not in saved:
            return saved
        warnings.warn(
            f"{self.config.init_from} has no distillation token; it begins as a copy of the class token", stacklevel=2
        )
        saved = {**saved, "dist_token": saved["cls_token"]}
        if saved["pos_embed"].shape[1] == own["pos_embed"].shape[1] - 1:
            saved["pos_embed"] = torch.cat([saved["pos_embed"][:, :1], saved["pos_embed"]], dim=1)
        return saved

    def has_tail(self) -> bool:
        """Return True: the classes are unequal."""
        return True

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss, its two parts and the cosine of the two features."""
        config, late = self.config, self.targets.weighing
        mixing = config.mixup_late or not late
        images, labels = self.mixed(batch) if mixing else (batch["image"], batch["label"])
        out = two_heads(self.encoder, images)
        weighted = late and self.targets.weights is not None
        losses = self.loss(
            out.cls,
            out.dist,
            labels,
            self.teacher(self.view(images)),
            weighted=weighted,
            weighted_base=weighted and config.weighted_labels,
        )
        return {
            "loss": losses["loss"],
            "base_loss": losses["base"],
            "distill_loss": losses["distill"],
            "feature_cosine": out.cosine.mean(),
        }

    def view(self, images: Tensor) -> Tensor:
        """Return what the teacher is shown: the student's very input, augmented and mixed, at the teacher's size."""
        if self.config.renormalize:
            return self.teacher.view(images, self.encoder, "bicubic", self.config.antialias)
        return teacher_view(images, self.teacher.size[0], self.config.antialias)

    def answer(self, model: Encoder, inputs: Tensor) -> Tensor:
        """Return both heads' logits and the cosine of their features, (B, 2 C + 1)."""
        out = two_heads(model, inputs)
        return torch.cat([out.cls, out.dist, out.cosine[:, None]], dim=1)

    def measure(self, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the figures of the mean of both heads, and beside them those of each head."""
        cls, dist, cosine = answers.split([len(self.class_names), len(self.class_names), 1], dim=1)
        figures = self.targets.measure((cls + dist) / 2, labels)
        for name, logits in (("cls", cls), ("dist", dist)):
            own = self.targets.measure(logits, labels)
            figures |= {f"{name}_{part}": own[part] for part in (*PARTS, "per_class_accuracy") if part in own}
        return {**figures, "test_feature_cosine": float(cosine.mean())}

    def summary(self) -> dict[str, Any]:
        """Return what was learnt from: classes and groups, teacher, when the second stage began, a step's batch."""
        config = self.config
        world = self.trainer.world_size if self._trainer is not None else 1
        return {
            **super().summary(),
            "second_stage_step": round(config.reweight_from * self.total_steps),
            "global_batch": config.batch_size * config.accumulate * world,
        }

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return how each head fares, how their features part, and the figures of each class."""
        from patchloom.report import Section, curves

        figures = self.figures or self.validate(self.device)
        if not figures:
            return []
        own = {"cls": "cls_", "dist": "dist_", "avg": ""}
        table: list[dict[str, object]] = [
            {
                "answer": text,
                **{
                    part.removeprefix("accuracy_").replace("_", " "): f"{figures[own[name] + part]:.1%}"
                    for part in PARTS
                    if own[name] + part in figures
                },
            }
            for name, text in HEADS.items()
        ]
        rows = read_metrics(Path(self.config.out) / "metrics.csv")
        drawn = []
        steps, cosines = series(rows, "feature_cosine")
        if len(steps) > 1:
            named = {"cosine of the two features": (steps, cosines)}
            drawn.append(curves(named, x_label="step", y_label="cosine", title="How alike the two tokens are"))
        step = self.summary()["second_stage_step"]
        text = (
            f"The class token learns from labels, the distillation token from the teacher; the mean of their logits is "
            f"the answer. Class weights count from step {step} of {self.total_steps} on. On the images measured on, "
            f"the features have a cosine of {figures['test_feature_cosine']:.3f}."
        )
        return [Section(title="Two heads", text=text, table=table, figures=drawn), *super().report_sections(images)]
