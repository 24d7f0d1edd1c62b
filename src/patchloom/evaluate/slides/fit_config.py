"""How a head over the tiles of a slide is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from patchloom.base.choices import MILHeadName
from patchloom.errors import UsageError, unknown_name


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a head is trained."""

    head: str = "abmil"
    """Name of the head."""
    head_args: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments besides the widths."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    weight_decay: float = 0.0
    """Weight decay of Adam (added to the gradient)."""
    epochs: int = 50
    """Passes over the bags."""
    batch_size: int = 16
    """Bags per step; an incomplete last batch is left out."""
    seed: int = 0
    """Of the initial weights and the order of the bags."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.head not in get_args(MILHeadName):
            raise unknown_name("head", self.head, get_args(MILHeadName))
        if not self.lr > 0 or self.weight_decay < 0:
            raise UsageError(f"lr is {self.lr} and weight_decay {self.weight_decay}; above 0 and at least 0 are needed")
        if min(self.epochs, self.batch_size) < 1:
            raise UsageError(f"epochs is {self.epochs} and batch_size {self.batch_size}; at least 1 is needed")
