"""Settings of plain distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Positive, Share
from patchloom.training.answers_config import AnswersConfig
from patchloom.training.supervised_config import PooledHeadOptions


@dataclass(frozen=True, kw_only=True)
class LogitsConfig(PooledHeadOptions, AnswersConfig):
    """Settings of plain distillation; the recipe is that of training from scratch."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": 300,
        "lr": 5e-4,
        "lr_base_batch": 512,
        "min_lr": 1e-5,
        "warmup_epochs": 5.0,
    }

    kind: Literal["hard", "soft"] = "soft"
    """What is learnt of the teacher: its first choice (hard) or its whole distribution (soft)"""
    temperature: Positive = 1.0
    """Soft only: both distributions are taken at this temperature, and the loss is multiplied by its square"""
    alpha: Share = 0.5
    """Weight of the teacher's answers, in (0, 1]; the labels have the rest"""
