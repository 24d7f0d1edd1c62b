"""Plain distillation of a teacher's answers, hard or soft: what every other distillation has to beat.

Hard: Touvron et al. 2021, arXiv 2012.12877. Soft: Hinton et al. 2015, arXiv 1503.02531. The losses are in `logits`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.systems.logits.config import LogitsConfig
from patchloom.training.config import TrainConfig
from patchloom.training.distillation import hard_distillation_loss, kd_loss
from patchloom.training.teacher_cache import AnswersMethod


class LogitsMethod(AnswersMethod):
    """Any student learns the answers of any teacher of the same classes, beside the labels."""

    kinds = ("image", "clip")
    config_class: ClassVar[type[TrainConfig]] = LogitsConfig
    config: LogitsConfig

    def __init__(self, config: LogitsConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.teacher.check_classes(self.class_names)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted sum of what labels and teacher ask for, and both parts."""
        config = self.config
        images, labels = self.mixed(batch)
        logits = self.encoder(images)
        answers = self.answers(batch, images)
        if config.kind == "hard":
            taught = config.alpha * hard_distillation_loss(logits, answers)
        else:
            taught = kd_loss(logits, answers, config.temperature, config.alpha)
        label_loss = (1 - config.alpha) * self.targets.loss(logits, labels)
        return {"loss": label_loss + taught, "label_loss": label_loss, "teacher_loss": taught}
