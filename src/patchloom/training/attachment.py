"""What rides on a run without the method knowing it: moving averages, experts, sharpness-aware steps, and yours.

An attachment is a Lightning callback with a few hooks more. It is handed to the engine, which calls it at its places;
a new one touches no existing file:

>>> class Frozen(Attachment):
...     '''Keeps the patch embedding as it is.'''
...     def attach(self, method):
...         method.encoder.patch_embed.requires_grad_(False)
>>> fit("pretrain mae", MAEMethod, config, attach=[Frozen()])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from torch import nn

if TYPE_CHECKING:
    from patchloom.report import Section
    from patchloom.training.method import Method


class Attachment(Callback):
    """A part of a run that attaches from outside; every hook may be left as it is.

    Attributes:
        ships: Prefix, in the method's state dict, of the tensors that are shipped in place of `encoder.`; None where
            the attachment puts nothing in the encoder's place.
    """

    ships: str | None = None

    def attach(self, method: Method) -> None:
        """Change the method's modules before training; called on every start, before a checkpoint is loaded.

        Modules that belong in checkpoints are set as attributes of the method.
        """

    def closure(self, method: Method, closure: Callable[[], Any], optimizer: Any) -> Callable[[], Any]:
        """Return what computes the gradient of a step, given what does so without this attachment."""
        return closure

    def after_step(self, method: Method) -> None:
        """Act after an optimiser step; `method.step` still is the number of that step."""

    def view(self, method: Method, model: nn.Module) -> nn.Module:
        """Return what is looked at (probe, report) and shipped in place of `model`."""
        return model

    def fold(self, model: nn.Module) -> nn.Module:
        """Return what goes to disk for a model as it was trained; `model` itself stays as it is."""
        return model

    def summary(self, method: Method) -> dict[str, Any]:
        """Return figures for `summary.json`."""
        return {}

    def report_sections(self, method: Method) -> list[Section]:
        """Return a part of the report."""
        return []
