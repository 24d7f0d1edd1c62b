"""Settings of AdaptFormer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, Fraction, PositiveInt
from patchloom.training.adapter_config import HeadedAdapterConfig

Placement = Literal["parallel", "sequential"]
Norm = Literal["none", "in", "out"]
Init = Literal["zero", "trunc_normal"]
Input = Literal["residual", "normed"]


@dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(HeadedAdapterConfig):
    """Settings of AdaptFormer; the defaults are the paper's for images."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("scale", "learnable_scale", "placement", "input", "norm", "init", "blocks")

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The paper's for clips, on VideoMAE's encoders: 8 frames, 4 apart.
        "video": {
            "batch_size": 16,
            "epochs": 90,
            "warmup_epochs": 10.0,
            "clip_frames": 8,
            "clip_stride": 4,
            "multi_scale": True,
            "flip": 0.0,
            "dropout": 0.0,
            "pool": "avg",
        },
    }

    bottleneck: PositiveInt = 64
    """Width of the branch; paper: 64 (1 to 256 tried)"""
    scale: float = 0.1
    """Factor on the branch's output; paper: 0.1"""
    learnable_scale: bool = False
    """Learn the factor instead, one for each block, from 1"""
    dropout: Fraction = 0.1
    """Dropout in the branch; paper: 0.1 for images, 0 for video"""
    placement: Placement = "parallel"
    """Beside the MLP (paper) or behind it"""
    input: Input = "residual"
    """What a parallel branch reads: the stream before norm2 (published code) or after it (the paper's figure)"""
    norm: Norm = "none"
    """Layer norm of the branch: none (paper), before it (in) or after it (out)"""
    init: Init = "zero"
    """Initial weights: zero lets training start at the encoder itself; trunc_normal is the published video runs'"""
    multi_scale: bool = False
    """Of clips: crops of a few sizes and places (paper's for video) in place of crop_scale and color_jitter"""
    blocks: tuple[Count, ...] | None = None
    """Numbers of the blocks that get a branch, counted from 0; default: all"""
