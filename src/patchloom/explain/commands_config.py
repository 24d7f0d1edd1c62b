"""Settings of each explanation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import Count, Fraction, PositiveInt
from patchloom.explain.config import ExplainConfig


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(ExplainConfig):
    """Settings of attention maps."""

    layer: int = -1
    """Block whose heads are shown, from 0; negative from the end"""
    discard: Fraction = 0.0
    """Share of the smallest entries that rollout leaves out in each block, in [0, 1)"""


@dataclass(frozen=True, kw_only=True)
class TraitsConfig(ExplainConfig):
    """Settings of Prompt-CAM's traits."""

    top: PositiveInt = 4
    """Most important heads shown; paper: 4"""
    until: Literal["misclassified"] | None = None
    """Show instead the fewest heads with which an image is still taken for its class (misclassified)"""
    against: str | None = None
    """Another class: show what tells class_name from it, on images of class_name"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ExplainConfig):
    """Settings of a comparison of explanations."""

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "limit": 64,
    }

    methods: tuple[str, ...] = ()
    """Explanations to compare; default: all the model has (prompt_cam, class_attention, rollout, grad_cam, …)"""
    steps: PositiveInt = 50
    """Steps of insertion and deletion; paper: 50"""
    pictured: Count = 8
    """Most images drawn; the scores are of all"""
