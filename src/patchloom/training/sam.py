"""Sharpness-aware minimisation: step by the gradient taken where the loss is worst nearby.

Flat minima have features of lower rank, and CNNs trained so teach rare classes better. Foret et al. 2021, arXiv
2010.01412; for teachers, Rangwani et al. 2024, arXiv 2404.02900. A method with a radius attaches `SharpnessAware` to
its run.

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
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as lp
import torch
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.training.attachment import Attachment

if TYPE_CHECKING:
    from patchloom.training.method import Method


class SharpnessAware(Attachment):
    """Lets a step of the engine go through its batches twice: at w, and where the gradient leads from there.

    All batches of a step count as one, however they are accumulated or spread over processes, and what is drawn for
    them (mixing, drop path) is drawn alike both times.

    Args:
        radius: Returns ρ for the present step; 0 for a plain one.
    """

    def __init__(self, radius: Callable[[], float]) -> None:
        self.radius = radius
        self._batches: list[tuple[dict[str, Any], int, int]] = []

    def attach(self, method: Method) -> None:
        """Refuse methods with several optimisers: whose gradient would lead?"""
        if method.phases():
            raise UsageError("sharpness-aware minimisation is for methods with one optimiser")

    def on_train_batch_start(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember a batch of the present step, before anything is done to it (mixing is done in place)."""
        if not self.radius():
            return
        position = cast("Method", pl_module).batches_done
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        self._batches.append((copied, batch_idx, position))

    def closure(self, method: Method, closure: Callable[[], Any], optimizer: Any) -> Callable[[], Any]:
        """Return the step's own closure, followed by a second pass whose gradient takes the place of the first's."""
        radius = self.radius()
        return partial(self._twice, method, closure, optimizer, radius) if radius else closure

    def _twice(self, method: Method, first: Callable[[], Any], optimizer: Any, radius: float) -> Any:
        loss, strategy, nearby_losses = first(), method.trainer.strategy, []
        unsynchronised = getattr(strategy, "block_backward_sync", nullcontext)
        with method.further_passes(), perturbed(method.parameters(), radius), steady_statistics(method):
            optimizer.zero_grad()
            for number, (batch, batch_idx, position) in enumerate(self._batches, 1):
                with nullcontext() if number == len(self._batches) else unsynchronised():
                    method.seed_draws(position)
                    nearby: Any = strategy.training_step(batch, batch_idx)
                    nearby = nearby / len(self._batches)
                    strategy.backward(nearby, optimizer)
                nearby_losses.append(nearby.detach())
        self._batches.clear()
        if method.logs_now():
            method.record({"nearby_loss": torch.stack(nearby_losses).sum()})
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
