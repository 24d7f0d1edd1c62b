"""Experts weights averaging on any run: feed-forwards become experts, which approach each other after every step."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal, cast

from torch import nn

from patchloom.encoders import Encoder
from patchloom.training.attachment import Attachment
from patchloom.training.ewa import average_experts_, average_ffn, expand_ffn, experts_of, share_rate_schedule

if TYPE_CHECKING:
    from patchloom.training.method import Method
    from patchloom.training.options import ExpertOptions


class ExpertsAveraging(Attachment):
    """Huang et al. 2023, arXiv 2308.06093; what is shipped is the plain model.

    Args:
        options: How many experts, where, and how fast they approach each other.
        trained: Whether the encoder starts from weights that were trained before.
    """

    def __init__(self, options: ExpertOptions, trained: bool) -> None:
        self.options, self.trained = options, trained

    def attach(self, method: Method) -> None:
        """Turn feed-forwards into experts: copies where they are trained already, independent ones otherwise."""
        options = self.options
        if not experts_of(method.encoder):
            start: Literal["copy", "independent"] = "copy" if self.trained else "independent"
            expand_ffn(method.encoder, options.experts, options.expert_layers, start)

    def after_step(self, method: Method) -> None:
        """Let the experts approach each other by the step's share."""
        rate = share_rate_schedule(self.options.share_schedule, self.options.share_rate, method.total_steps)
        average_experts_(experts_of(method.encoder), rate(method.step))

    def fold(self, model: nn.Module) -> nn.Module:
        """Return a copy with plain feed-forwards, the mean of their experts."""
        return average_ffn(cast(Encoder, copy.deepcopy(model))) if experts_of(model) else model
