"""What a step and a run consist of: phases, each with an optimiser of its own, and stages, one after the other.

Most methods have one of each and need not say so. A GAN has two phases, its generator and its discriminator; learning
one task after another is a run of several stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchloom.training.optim import set_rates

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource
    from patchloom.training.method import Method

Loss = Callable[[dict[str, Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Phase:
    """A part of every step: one loss, and the optimiser that goes down it. Phases follow one another in a step."""

    name: str
    """Prefix of its figures in the log."""
    modules: tuple[str, ...]
    """Names of the method's modules whose parameters it trains; all others stand still meanwhile."""
    loss: Loss
    """From a batch to `loss` and whatever else is to be logged, as scalars."""
    rates: Callable[[int], tuple[float, float]] | None = None
    """Learning rate and weight decay of a step; None: the method's `rates`."""
    every: int = 1
    """The phase takes part in every so many steps, from step 0 on."""
    start: int = 0
    """First step it takes part in."""

    def trains(self, parameter: str) -> bool:
        """Return whether a parameter of the method, by its name, is one of this phase."""
        return any(parameter == module or parameter.startswith(f"{module}.") for module in self.modules)


@dataclass(frozen=True)
class Stage:
    """A part of the run with a source, a length and, from the second on, a fresh optimiser and schedule of its own."""

    name: str
    """What it is called in the log."""
    source: Source | StreamSource | None = None
    """Its images; None: the run's."""
    epochs: int | None = None
    """Passes over its images; None: the settings' `epochs`."""


@dataclass(frozen=True)
class Span:
    """Where a stage lies in a run, in optimiser steps."""

    start: int
    steps: int
    per_epoch: int

    @property
    def end(self) -> int:
        """First step after the stage."""
        return self.start + self.steps


def phased_step(method: Method, batch: dict[str, Any]) -> None:
    """Take a batch towards a step; the last of a step goes through the phases.

    Each phase sees all batches of the step, the second what the first has learnt.
    """
    method.held.append((batch, method.batches_done))
    method.batches_done += 1
    if len(method.held) < method.config.accumulate:
        return
    held, method.held = method.held, []
    total = torch.zeros((), device=method.device)
    figures: dict[str, Any] = {"epoch": method.epochs(method.batches_done)}
    method.before_step()
    found: Any = method.optimizers()
    optimizers = found if isinstance(found, (list, tuple)) else [found]
    for phase, optimizer in zip(method.phases(), optimizers, strict=True):
        if method.step < phase.start or method.step % phase.every:
            continue
        lr, weight_decay = (phase.rates or method.rates)(method.step)
        set_rates(optimizer, lr, weight_decay)
        with _only(phase, method):
            for part, position in held:
                method.seed_draws(position)
                losses = method.checked(part, phase.loss)
                method.manual_backward(losses["loss"] / len(held))
            optimizer.step()
            optimizer.zero_grad()
        total += losses["loss"].detach()
        figures |= {f"{phase.name}_{name}": value.detach() for name, value in losses.items()}
        figures |= {f"{phase.name}_lr": lr, f"{phase.name}_weight_decay": weight_decay}
    if method.logs_now():
        method.record(figures | {"loss": total})
    method.end_step()


@contextmanager
def _only(phase: Phase, module: nn.Module) -> Iterator[None]:
    """Let the parameters of a phase alone take gradients."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    trained = {id(parameter) for name, parameter in module.named_parameters() if phase.trains(name)}
    for parameter in learning:
        parameter.requires_grad_(id(parameter) in trained)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
