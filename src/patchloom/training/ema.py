"""A moving average of the encoder, which is looked at and shipped in its place (timm's `ModelEmaV3`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from timm.utils import ModelEmaV3
from torch import nn

from patchloom.training.attachment import Attachment

if TYPE_CHECKING:
    from patchloom.training.method import Method


class MovingAverage(Attachment):
    """Keeps `decay` of the average and takes the rest from the encoder, after every step.

    The average is a module of the method, `ema`, so that checkpoints hold it and sharded training shards it.
    """

    ships = "ema.module."

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def attach(self, method: Method) -> None:
        """Start the average at the encoder."""
        method.ema = ModelEmaV3(method.encoder, decay=self.decay)
        method.ema.requires_grad_(False)

    def after_step(self, method: Method) -> None:
        """Take in the step."""
        cast("ModelEmaV3", method.ema).update(method.encoder)

    def view(self, method: Method, model: nn.Module) -> nn.Module:
        """Return the average."""
        return cast("ModelEmaV3", method.ema).module
