"""Settings of the second stage of G2SD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import NonNegative, Positive
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.answers_config import AnswersConfig
from patchloom.training.supervised_config import PooledHeadOptions

# Of the weights that `DistilledVisionTransformer` draws, against a standard deviation of 0.02.
INIT_SCALE = 0.001


@dataclass(frozen=True, kw_only=True)
class G2SDSpecificConfig(PooledHeadOptions, AnswersConfig):
    """Settings of G2SD's second stage; the defaults are the paper's on ImageNet-1K."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "epochs": Cited(200, "paper: 200"),
        "lr": Cited(1e-3, "paper: 1e-3 for 256, used with 1024"),
        "lr_base_batch": 256,
        "min_lr": Cited(1e-6, "paper: 1e-6"),
        "warmup_epochs": Cited(5.0, "paper: 5"),
        "layer_decay": Cited(0.75, "paper: 0.75"),
        "init_scale": Cited(INIT_SCALE, "these have a standard deviation of 0.02; paper: 0.001"),
    }

    encoder: str = "vit_small_patch16_224"
    """Student: run or bundle of `distill g2sd_generic`, or the name of a timm ViT to start afresh"""
    distillation: Literal["hard", "soft", "nkd"] = "hard"
    """What is learnt from the teacher: hard, its first choice, on a token of its own (paper); soft, its distribution,
    on that token; nkd, normalised distillation on the class token, with no token of its own"""
    temperature: Positive = 1.0
    """Temperature of soft and nkd; paper: 1"""
    nkd_alpha: NonNegative = 1.0
    """Weight of the classes beside the right one, for nkd; paper: 1"""
    pool: Literal["avg", "cls"] = "cls"
    """What the labels' classifier reads; paper: the class token, the only choice beside a distillation token"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.pool != "cls" and self.distillation != "nkd":
            raise UsageError(f"pool is {self.pool}; beside a distillation token the class token is read, set pool=cls")
