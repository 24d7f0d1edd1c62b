"""How a head over the tiles of a slide is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchloom.base.choices import MILHeadName
from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt
from patchloom.base.settings import Settings


@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """How a head is trained."""

    head: MILHeadName = "abmil"
    """Name of the head."""
    head_args: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments besides the widths."""
    lr: Positive = 1e-3
    """Learning rate of Adam."""
    weight_decay: NonNegative = 0.0
    """Weight decay of Adam (added to the gradient)."""
    epochs: PositiveInt = 50
    """Passes over the bags."""
    batch_size: PositiveInt = 16
    """Bags per step; an incomplete last batch is left out."""
    seed: Count = 0
    """Of the initial weights and the order of the bags."""
    device: str = "cpu"
    """Where to compute."""
