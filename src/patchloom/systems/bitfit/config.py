"""Settings of BitFit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.settings import Cited
from patchloom.training.adapter_config import HeadedAdapterConfig


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(HeadedAdapterConfig):
    """Settings of BitFit."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "lr": Cited(1e-3, "paper: 1e-4 to 1e-3, well above that of full fine-tuning"),
        "lr_base_batch": None,
    }

    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Optimiser: adamw (paper) or sgd"""
