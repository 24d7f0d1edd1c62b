"""Settings of each explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.explain.config import ExplainConfig


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(ExplainConfig):
    """Settings of attention maps."""

    layer: int = -1
    """Block whose heads are shown, from 0; negative from the end"""
    discard: float = 0.0
    """Share of the smallest entries that rollout leaves out in each block, in [0, 1)"""


@dataclass(frozen=True, kw_only=True)
class TraitsConfig(ExplainConfig):
    """Settings of Prompt-CAM's traits."""

    top: int = 4
    """Most important heads shown; paper: 4"""
    until: Literal["misclassified"] | None = None
    """Show instead the fewest heads with which an image is still taken for its class (misclassified)"""
    against: str | None = None
    """Another class: show what tells class_name from it, on images of class_name"""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ExplainConfig):
    """Settings of a comparison of explanations."""

    methods: tuple[str, ...] = ()
    """Explanations to compare; default: all the model has (prompt_cam, class_attention, rollout, grad_cam, …)"""
    steps: int = 50
    """Steps of insertion and deletion; paper: 50"""
    pictured: int = 8
    """Most images drawn; the scores are of all"""
    limit: int = 64
    """Most images explained, drawn at random"""
