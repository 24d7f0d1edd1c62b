"""DeiT-LT as a training method: a ViT from scratch on classes that are very unequal, taught by a small CNN.

The model and its loss are in `model.py`. Rangwani et al. 2024, arXiv 2404.02900.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.systems.deit_lt.config import DeiTLTConfig
from patchloom.systems.deit_lt.model import DistillationTokenLoss, require_two_heads, teacher_view, two_heads
from patchloom.training.metrics import read_metrics, series
from patchloom.training.teachers import DistillMethod

if TYPE_CHECKING:
    from patchloom.report import Section

HEADS = {"cls": "class token", "dist": "distillation token", "avg": "mean of both"}
PARTS = ("accuracy", "balanced_accuracy", "majority_share", "accuracy_head", "accuracy_mid", "accuracy_tail")


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
        state_dict = encoder.state_dict()
        if "dist_token" not in state_dict or "dist_token" in saved or "cls_token" not in saved:
            return saved
        warnings.warn(
            f"{self.config.init_from} has no distillation token; it begins as a copy of the class token", stacklevel=2
        )
        saved = {**saved, "dist_token": saved["cls_token"]}
        if saved["pos_embed"].shape[1] == state_dict["pos_embed"].shape[1] - 1:
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
        return teacher_view(images, self.teacher.image_size, self.config.antialias)

    def answer(self, model: Encoder, inputs: Tensor) -> Tensor:
        """Return both heads' logits and the cosine of their features, (B, 2 C + 1)."""
        out = two_heads(model, inputs)
        return torch.cat([out.cls, out.dist, out.cosine[:, None]], dim=1)

    def measure(self, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the figures of the mean of both heads, and beside them those of each head."""
        cls, dist, cosine = answers.split([len(self.class_names), len(self.class_names), 1], dim=1)
        figures = self.targets.measure((cls + dist) / 2, labels)
        for name, logits in (("cls", cls), ("dist", dist)):
            of_average = self.targets.measure(logits, labels)
            figures |= {
                f"{name}_{part}": of_average[part] for part in (*PARTS, "per_class_accuracy") if part in of_average
            }
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
        prefixes = {"cls": "cls_", "dist": "dist_", "avg": ""}
        table: list[dict[str, object]] = [
            {
                "head": text,
                **{
                    part.removeprefix("accuracy_").replace("_", " "): f"{figures[prefixes[name] + part]:.1%}"
                    for part in PARTS
                    if prefixes[name] + part in figures
                },
            }
            for name, text in HEADS.items()
        ]
        rows = read_metrics(Path(self.config.out) / "metrics.csv")
        drawn = []
        steps, cosines = series(rows, "feature_cosine")
        if len(steps) > 1:
            named = {"cosine of the two features": (steps, cosines)}
            drawn.append(
                curves(
                    named, x_label="step", y_label="cosine", title="Cosine similarity of class and distillation tokens"
                )
            )
        step = self.summary()["second_stage_step"]
        text = (
            f"The class token learns from labels, the distillation token from the teacher; the mean of their logits is "
            f"the answer. Class weights count from step {step} of {self.total_steps} on. On the images measured on, "
            f"the features have a cosine of {figures['test_feature_cosine']:.3f}."
        )
        return [
            Section(title="Class and distillation heads", text=text, table=table, figures=drawn),
            *super().report_sections(images),
        ]
