"""Settings of DINOv2's grid of linear heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from patchloom.errors import UsageError
from patchloom.evaluate.subset_config import SubsetConfig

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True, kw_only=True)
class LinearGridConfig(SubsetConfig):
    """Settings of the linear grid; the defaults are DINOv2's."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            "radiology": MappingProxyType(
                {
                    "lrs": (1e-3, 5e-3, 1e-2, 5e-2),
                    "scale_lr": False,
                    "refit": True,
                    "view": "whole",
                    "shots_by": "radiology",
                }
            ),
            "dinov3": MappingProxyType({"blocks": (1,), "shots_by": "dinov3"}),
        }
    )

    preset: str | None = None
    """Settings of another paper: radiology or dinov3"""
    val: str | None = None
    """Labelled images to choose the head on; default: a tenth of train, held out"""
    lrs: tuple[float, ...] = LRS
    """Learning rates; DINOv2: 13 from 1e-5 to 0.1"""
    scale_lr: bool = True
    """Scale learning rates by probe_batch / 256"""
    blocks: tuple[int, ...] = (1, 4)
    """How many of the last blocks give their class token"""
    avgpool: tuple[bool, ...] = (False, True)
    """Whether the mean over the last block's patches is added"""
    steps: int | None = None
    """Optimiser steps; default: ten passes over train, at least 1000 (DINOv2: 12500 on ImageNet)"""
    probe_batch: int = 128
    """Images per optimiser step"""
    refit: bool = False
    """Train the chosen head again on train and the images it was chosen on; never with shots"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for name in ("lrs", "blocks", "avgpool"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty; name at least one")
        if min(self.lrs) <= 0:
            raise UsageError(f"lrs holds {min(self.lrs)}; learning rates are above 0")
        if min(self.blocks) < 1:
            raise UsageError(f"blocks holds {min(self.blocks)}; take at least 1")
        if self.probe_batch < 1 or (self.steps is not None and self.steps < 1):
            raise UsageError(f"steps is {self.steps} and probe_batch {self.probe_batch}; both must be at least 1")
