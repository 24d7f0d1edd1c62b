"""Settings of LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Fraction, PositiveInt
from patchloom.base.settings import Cited
from patchloom.training.adapter_config import HeadedAdapterConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(HeadedAdapterConfig):
    """Settings of LoRA."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "lr": Cited(1e-3, "paper: 2e-4 to 2e-3"),
        "lr_base_batch": None,
        "weight_decay": Cited(0.01, "here of whatever trains; paper: 0 to 0.1"),
    }

    rank: PositiveInt = 8
    """Rank of the updates; paper: 1 to 64, 4 or 8 suffice"""
    alpha: float = 8.0
    """The update is scaled by alpha / rank"""
    targets: tuple[str, ...] = ("q", "v")
    """Layers that get one, of q, k, v, qkv (fused, as one), proj, fc1, fc2; paper: q and v"""
    dropout: Fraction = 0.0
    """Dropout on the update's input"""
    dora: bool = False
    """Also learn the norm of each row (DoRA)"""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead"""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Optimiser: adamw (paper) or sgd"""
