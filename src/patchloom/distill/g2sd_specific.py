"""The second stage of G2SD as a training method: a student of the first one learns a task from a classifier.

The algorithm itself is in `specific`. "Generic-to-Specific Distillation of Masked Autoencoders", arXiv 2302.14771.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.distill.losses import hard_distillation_loss, nkd_loss, soft_distillation_loss
from patchloom.distill.specific import DistilledVisionTransformer, as_timm, hold_position, require_plain
from patchloom.distill.teacher_cache import AnswersConfig, AnswersMethod
from patchloom.distill.two_heads import two_heads
from patchloom.encoders import Encoder, depth
from patchloom.errors import UsageError
from patchloom.training.method import Method

if TYPE_CHECKING:
    from patchloom.report import Section

# Of the weights that `DistilledVisionTransformer` draws, against a standard deviation of 0.02.
INIT_SCALE = 0.001


@dataclass(frozen=True, kw_only=True)
class G2SDSpecificConfig(AnswersConfig):
    """Settings of G2SD's second stage; the defaults are the paper's on ImageNet-1K."""

    encoder: str = "vit_small_patch16_224"
    """Student: run or bundle of `distill g2sd_generic`, or the name of a timm ViT to start afresh"""
    distillation: Literal["hard", "soft", "nkd"] = "hard"
    """What is learnt from the teacher: hard, its first choice, on a token of its own (paper); soft, its distribution,
    on that token; nkd, normalised distillation on the class token, with no token of its own"""
    temperature: float = 1.0
    """Temperature of soft and nkd; paper: 1"""
    nkd_alpha: float = 1.0
    """Weight of the classes beside the right one, for nkd; paper: 1"""
    epochs: int = 200
    """Passes over the images; paper: 200"""
    lr: float = 1e-3
    """Peak learning rate for a global batch of lr_base_batch; paper: 1e-3 for 256, used with 1024"""
    lr_base_batch: int | None = 256
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine; paper: 1e-6"""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0; paper: 5; at most a fifth of the run is used"""
    layer_decay: float = 0.75
    """Factor on the learning rate from each block to the one below it; paper: 0.75"""
    pool: Literal["avg", "cls"] = "cls"
    """What the labels' classifier reads; paper: the class token, the only choice beside a distillation token"""
    init_scale: float = INIT_SCALE
    """Factor on the classifiers' initial weights of standard deviation 0.02; paper: 0.001"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")
        if self.nkd_alpha < 0:
            raise UsageError(f"nkd_alpha is {self.nkd_alpha}; it must be at least 0")
        if self.pool != "cls" and self.distillation != "nkd":
            raise UsageError(f"pool is {self.pool}; beside a distillation token the class token is read, set pool=cls")


class G2SDSpecificMethod(AnswersMethod):
    """A classifier learns from labels and a fine-tuned teacher, each on a token of its own (G2SD, second stage)."""

    config_class = G2SDSpecificConfig
    config: G2SDSpecificConfig

    def __init__(self, config: G2SDSpecificConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.teacher.check_classes(self.class_names)
        if config.distillation != "nkd":
            hold_position(self.encoder)

    def build_encoder(self) -> Encoder:
        """Return the student with its classifiers, in timm's distilled layout where it has a distillation token."""
        config = self.config
        if config.distillation == "nkd":
            return super().build_encoder()
        encoder = Method.build_encoder(self)
        require_plain(encoder)
        model = as_timm(DistilledVisionTransformer(encoder, len(self.class_names)), config.drop_path)
        for head in (model.head, model.head_dist):
            head.weight.data.mul_(config.init_scale / INIT_SCALE)
        model.set_distilled_training(True)
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": self.class_names}
        return model

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return half the loss of the labels, half that of the teacher; with nkd the one that replaces both."""
        config = self.config
        images, labels = self.mixed(batch)
        answer = self.answers(batch, images)
        if config.distillation == "nkd":
            loss = nkd_loss(self.encoder(images), answer, labels, config.nkd_alpha, config.temperature)
            return {"loss": loss}
        logits, taught = self.encoder(images)
        base = self.targets.loss(logits, labels)
        if config.distillation == "hard":
            distilled = hard_distillation_loss(taught, answer)
        else:
            distilled = soft_distillation_loss(taught, answer, config.temperature)
        return {"loss": 0.5 * base + 0.5 * distilled, "label_loss": base, "teacher_loss": distilled}

    def layer(self, name: str) -> int:
        """Return the layer of a parameter; the distillation token learns as fast as the classifiers, as published."""
        return depth(self.encoder) + 1 if name.endswith("dist_token") else super().layer(name)

    def answer(self, model: Encoder, inputs: Tensor) -> Tensor:
        """Return the logits of both classifiers, (B, 2 C); of the one there is with nkd, (B, C)."""
        if self.config.distillation == "nkd":
            return super().answer(model, inputs)
        out = two_heads(model, inputs)
        return torch.cat([out.cls, out.dist], dim=1)

    def measure(self, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the figures of the mean of both classifiers, and how often each of them is right."""
        if self.config.distillation == "nkd":
            return super().measure(answers, labels)
        heads = answers.chunk(2, dim=1)
        known = labels >= 0
        figures = self.targets.measure((heads[0] + heads[1]) / 2, labels)
        for name, logits in zip(("label_head_accuracy", "teacher_head_accuracy"), heads, strict=True):
            figures[name] = float((logits.argmax(1) == labels)[known].double().mean())
        return figures

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what both classifiers make of the test images, and how teacher and student compare."""
        from patchloom.report import Section

        figures, sections = self.figures or self.validate(self.device), super().report_sections(images)
        if "label_head_accuracy" not in figures:
            return sections
        rows: list[dict[str, object]] = [
            {"classifier": name, "accuracy": f"{value:.1%}"}
            for name, value in (
                ("of the labels (class token)", figures["label_head_accuracy"]),
                ("of the teacher's choices (distillation token)", figures["teacher_head_accuracy"]),
                ("mean of both, which is shipped", figures["accuracy"]),
                ("teacher", self.compared()["teacher_accuracy"]),
            )
        ]
        text = "The two classifiers read two tokens of one encoder; what is shipped averages their outputs."
        return [Section(title="Two classifiers", text=text, table=rows), *sections]
