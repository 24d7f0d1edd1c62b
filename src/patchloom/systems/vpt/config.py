"""Settings of visual prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.base.choices import PromptDepth
from patchloom.base.ranges import Fraction, PositiveInt
from patchloom.training.adapter_config import HeadedAdapterConfig


@dataclass(frozen=True, kw_only=True)
class VPTConfig(HeadedAdapterConfig):
    """Settings of visual prompt tuning; the recipe is that of AdaptFormer's comparison."""

    num_prompts: PositiveInt = 1
    """Learnt tokens; paper: 1 in AdaptFormer's comparison, up to 100 in VPT's own"""
    depth: PromptDepth = "deep"
    """Tokens of its own for every block (deep), or one set through all blocks (shallow)"""
    dropout: Fraction = 0.0
    """Dropout on the tokens"""
