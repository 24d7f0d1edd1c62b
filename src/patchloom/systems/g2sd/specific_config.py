"""Settings of the second stage of G2SD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.errors import UsageError
from patchloom.training.answers_config import AnswersConfig

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
