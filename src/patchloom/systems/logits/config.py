"""Settings of plain distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.errors import UsageError
from patchloom.training.answers_config import AnswersConfig


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
