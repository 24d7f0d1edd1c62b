"""Sharpness-aware minimisation: step by the gradient taken where the loss is worst nearby.

Flat minima have features of lower rank, and CNNs trained so teach rare classes better. Foret et al. 2021, arXiv
2010.01412; specification `deit_lt`, section 2.6. `Method.sharpness` turns it on for a training step of the engine.

>>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
>>> (weight.square().sum() / 2).backward()
>>> with perturbed([weight], radius=0.5):  # gradient and weight point the same way
...     weight.tolist()
[3.299999952316284, 4.400000095367432]
>>> weight.tolist()
[3.0, 4.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from patchloom.training.method import Method


class SharpnessAware:
    """Lets a step of the engine go through its batches twice: at w, and where the gradient leads from there.

    All batches of a step count as one, however they are accumulated or spread over processes, and what is drawn for
    them (mixing, drop path) is drawn alike both times.

    Attributes:
        again: Whether the second pass is under way.
    """

    def __init__(self) -> None:
        self.again = False
        self._batches: list[tuple[dict[str, Any], int, int]] = []

    def keep(self, batch: dict[str, Any], batch_idx: int, position: int) -> None:
        """Remember a batch of the present step, before anything is done to it (mixing is done in place)."""
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        self._batches.append((copied, batch_idx, position))

    def closure(self, method: Method, first: Callable[[], Any], optimizer: Any, radius: float) -> Any:
        """Run a step's own closure, then leave the gradient of the second pass in its place; return its loss."""
        loss, strategy, found = first(), method.trainer.strategy, []
        unsynchronised = getattr(strategy, "block_backward_sync", nullcontext)
        self.again = True
        with perturbed(method.parameters(), radius), steady_statistics(method):
            optimizer.zero_grad()
            for number, (batch, batch_idx, position) in enumerate(self._batches, 1):
                with nullcontext() if number == len(self._batches) else unsynchronised():
                    method.seed_draws(position)
                    nearby: Any = strategy.training_step(batch, batch_idx)
                    nearby = nearby / len(self._batches)
                    strategy.backward(nearby, optimizer)
                found.append(nearby.detach())
        self.again = False
        self._batches.clear()
        if method.logs_now():
            method.record({"nearby_loss": torch.stack(found).sum()})
        return loss


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], radius: float) -> Iterator[None]:
    """Move parameters by e = ρ g / ‖g‖₂ along their gradients, and put the very same values back on leaving.

    Args:
        parameters: Those without a gradient stay where they are. All of them are one vector: ‖g‖₂ is its length.
        radius: ρ, above 0. A gradient of length 0 moves nothing.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    # Copies, not a subtraction afterwards: w + e - e is not w in floating point.
    before = [parameter.detach().clone() for parameter in moved]
    with torch.no_grad():
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        length = gradient_norm(gradients)
        factor = torch.where(length > 0, radius / length, torch.zeros_like(length))
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(gradient * factor.to(gradient))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Return the length of all gradients as one vector, a scalar; 0 of none."""
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients)


@contextmanager
def steady_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the batch's statistics without moving their running ones.

    Those belong to the weights that stay, not to the perturbed ones.
    """
    norms = [
        part
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
