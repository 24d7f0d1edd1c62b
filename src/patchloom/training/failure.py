"""A loss that is not a number: the run stops before the step is taken, and says what is known about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from patchloom.training.method import Method


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training stopped before the step was taken."""


def non_finite(method: Method, losses: dict[str, Tensor]) -> NonFiniteLossError:
    """Return the error for a loss that is not finite, with step, learning rate and the images of the batch.

    Args:
        method: Whose step it is.
        losses: `loss`, and the figures beside it; of these, those that are not finite are named too.
    """
    lr = max((group["lr"] for group in method.trainer.optimizers[0].param_groups), default=0.0)
    names = ", ".join(method.last_batch_keys[:8])
    more = len(method.last_batch_keys) - 8
    names += f" and {more} more (failure.json lists them)" if more > 0 else ""
    parts = [name for name, value in losses.items() if name != "loss" and not torch.isfinite(torch.as_tensor(value))]
    blame = f" from {', '.join(parts)}" if parts else ""
    return NonFiniteLossError(
        f"the loss is {float(losses['loss'].detach())} at step {method.step}{blame} (last learning rate {lr:.3g}, "
        f"batch: {names}); the checkpoint before it is untouched; try a smaller lr or precision=32-true"
    )
