"""Settings of BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.training.adapter_config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Settings of BitFit."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Optimiser: adamw (paper) or sgd"""
    lr: float = 1e-3
    """Peak learning rate; paper: 1e-4 to 1e-3, well above that of full fine-tuning"""
    lr_base_batch: int | None = None
    """Scale lr by global batch / lr_base_batch; default: lr is used as it is"""
