"""The second stage of G2SD as a training method: a student of the first one learns a task from a classifier.

The algorithm itself is in `specific`. "Generic-to-Specific Distillation of Masked Autoencoders", arXiv 2302.14771.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder, depth
from patchloom.features.class_scores import class_scores
from patchloom.systems.deit_lt.model import two_heads
from patchloom.systems.g2sd.specific import DistilledVisionTransformer, as_timm, hold_position, require_plain
from patchloom.systems.g2sd.specific_config import INIT_SCALE, G2SDSpecificConfig
from patchloom.training.distillation import hard_distillation_loss, nkd_loss, soft_distillation_loss
from patchloom.training.method import Method
from patchloom.training.teacher_cache import AnswersMethod

if TYPE_CHECKING:
    from patchloom.report import Section


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
        figures = self.targets.measure((heads[0] + heads[1]) / 2, labels)
        for name, logits in zip(("label_head", "teacher_head"), heads, strict=True):
            scores = class_scores(logits.argmax(1), labels)
            figures |= {f"{name}_accuracy": scores.accuracy, f"{name}_balanced_accuracy": scores.balanced_accuracy}
        return figures

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what both classifiers make of the test images, and how teacher and student compare."""
        from patchloom.report import Section

        figures, sections = self.figures or self.validate(self.device), super().report_sections(images)
        if "label_head_accuracy" not in figures:
            return sections
        measured = {**figures, **self.compared()}
        rows: list[dict[str, object]] = [
            {
                "classifier": name,
                "accuracy": f"{measured[f'{which}accuracy']:.1%}",
                "balanced accuracy": f"{measured[f'{which}balanced_accuracy']:.1%}",
            }
            for name, which in (
                ("class head (labels)", "label_head_"),
                ("distillation head (teacher's predictions)", "teacher_head_"),
                ("mean of both heads, which is shipped", ""),
                ("teacher", "teacher_"),
            )
        ]
        text = (
            "The two classifiers read two tokens of one encoder; what is shipped averages their outputs. Naming the "
            f"commonest class every time gives {figures['majority_share']:.1%}."
        )
        return [Section(title="Class and distillation heads", text=text, table=rows), *sections]
