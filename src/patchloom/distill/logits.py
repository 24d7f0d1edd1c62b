"""Plain distillation of a teacher's answers, hard or soft: what every other distillation has to beat.

Hard: Touvron et al. 2021, arXiv 2012.12877. Soft: Hinton et al. 2015, arXiv 1503.02531. The losses are in `logits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.distill.losses import hard_distillation_loss, kd_loss
from patchloom.distill.teacher_cache import AnswersConfig, AnswersMethod
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LogitsConfig(AnswersConfig):
    """Settings of plain distillation; the recipe is that of training from scratch."""

    kind: Literal["hard", "soft"] = "soft"
    """What is learnt of the teacher: its first choice (hard) or its whole distribution (soft)"""
    temperature: float = 1.0
    """Soft only: both distributions are taken at this temperature, and the loss is multiplied by its square"""
    alpha: float = 0.5
    """Weight of the teacher's answers, in (0, 1]; the labels have the rest"""
    epochs: int = 300
    """Passes over the images"""
    lr: float = 5e-4
    """Peak learning rate for a global batch of lr_base_batch"""
    lr_base_batch: int | None = 512
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine"""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0; at most a fifth of the run is used"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}; it must be above 0 and at most 1")
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")


class LogitsMethod(AnswersMethod):
    """Any student learns the answers of any teacher of the same classes, beside the labels."""

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
        told = (1 - config.alpha) * self.targets.loss(logits, labels)
        return {"loss": told + taught, "label_loss": told, "teacher_loss": taught}
