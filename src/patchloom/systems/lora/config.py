"""Settings of LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.training.adapter_config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Settings of LoRA."""

    rank: int = 8
    """Rank of the updates; paper: 1 to 64, 4 or 8 suffice"""
    alpha: float = 8.0
    """The update is scaled by alpha / rank"""
    targets: tuple[str, ...] = ("q", "v")
    """Layers that get one, of q, k, v, qkv (fused, as one), proj, fc1, fc2; paper: q and v"""
    dropout: float = 0.0
    """Dropout on the update's input"""
    dora: bool = False
    """Also learn the norm of each row (DoRA)"""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead"""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Optimiser: adamw (paper) or sgd"""
    lr: float = 1e-3
    """Peak learning rate; paper: 2e-4 to 2e-3"""
    lr_base_batch: int | None = None
    """Scale lr by global batch / lr_base_batch; default: lr is used as it is"""
    weight_decay: float = 0.01
    """Weight decay; paper: 0 to 0.1"""
