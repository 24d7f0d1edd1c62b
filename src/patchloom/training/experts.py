"""Experts weights averaging on any run: feed-forwards become experts, which approach each other after every step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from patchloom.encoders import Encoder
from patchloom.training.attachment import Attachment
from patchloom.training.ewa import average_experts_, average_ffn, expand_ffn, experts_of, share_rate_schedule

if TYPE_CHECKING:
    from patchloom.training.config import TrainConfig
    from patchloom.training.method import Method


class ExpertsAveraging(Attachment):
    """Huang et al. 2023, arXiv 2308.06093; what is shipped is the plain model."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def attach(self, method: Method) -> None:
        """Turn feed-forwards into experts: copies where they are trained already, independent ones otherwise."""
        config = self.config
        if not experts_of(method.encoder):
            trained = config.init_from is not None or Path(config.encoder).exists()
            expand_ffn(method.encoder, config.experts, config.expert_layers, "copy" if trained else "independent")

    def after_step(self, method: Method) -> None:
        """Let the experts approach each other by the step's share."""
        rate = share_rate_schedule(self.config.share_schedule, self.config.share_rate, method.total_steps)
        average_experts_(experts_of(method.encoder), rate(method.step))

    def fold(self, model: nn.Module) -> nn.Module:
        """Return a copy with plain feed-forwards, the mean of their experts."""
        return average_ffn(cast(Encoder, copy.deepcopy(model))) if experts_of(model) else model
