"""What a step and a run consist of: phases, each with an optimiser of its own, and stages, one after the other.

Most methods have one of each and need not say so. A GAN has two phases, its generator and its discriminator; learning
one task after another is a run of several stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource

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


@contextmanager
def only(phase: Phase, module: nn.Module) -> Iterator[None]:
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
