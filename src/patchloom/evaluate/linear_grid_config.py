"""Settings of DINOv2's grid of linear heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from annotated_types import MinLen

from patchloom.base.ranges import Positive, PositiveInt
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
    lrs: Annotated[tuple[Positive, ...], MinLen(1)] = LRS
    """Learning rates; DINOv2: 13 from 1e-5 to 0.1"""
    scale_lr: bool = True
    """Scale learning rates by probe_batch / 256"""
    blocks: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (1, 4)
    """How many of the last blocks give their class token"""
    avgpool: Annotated[tuple[bool, ...], MinLen(1)] = (False, True)
    """Whether the mean over the last block's patches is added"""
    steps: PositiveInt | None = None
    """Optimiser steps; default: ten passes over train, at least 1000 (DINOv2: 12500 on ImageNet)"""
    probe_batch: PositiveInt = 128
    """Images per optimiser step"""
    refit: bool = False
    """Train the chosen head again on train and the images it was chosen on; never with shots"""
