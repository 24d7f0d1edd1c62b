"""Settings of the linear probe, and MAE's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.training.adapter_config import HeadedAdapterConfig


@dataclass(frozen=True, kw_only=True)
class LinearConfig(HeadedAdapterConfig):
    """Settings of the linear classifier; the recipe is that of AdaptFormer's comparison."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # MAE's linear probe, for a global batch of 16384: arXiv 2111.06377.
        "mae": {"optimizer": "lars", "epochs": 90, "warmup_epochs": 10.0, "pool": "cls"},
    }
