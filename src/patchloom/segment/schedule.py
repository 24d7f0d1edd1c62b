"""Learning rate of decoders by iteration: polynomial or half a cosine, with warm-up; layer-wise rates by BEiT's rule.

mmsegmentation's schedules (poly by iteration, warm-up), and BEiT's layer decay (arXiv 2106.08254).

>>> [round(poly(step, 10, 1.0, warmup=0), 2) for step in (0, 5, 10)]
[1.0, 0.5, 0.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from patchloom.training.optim import layer_of, parameter_groups
from patchloom.training.schedule import cosine


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a segmentation model is trained."""

    steps: int = 40_000
    """Optimiser steps"""
    lr: float = 1e-3
    """Peak learning rate"""
    min_lr: float = 0.0
    """Learning rate at the end"""
    decay: Literal["poly", "one_cycle"] = "poly"
    """How the learning rate falls: by a power, or as half a cosine"""
    power: float = 1.0
    """Power of the polynomial decay"""
    warmup: int = 1500
    """Steps of warm-up"""
    weight_decay: float = 1e-4
    """AdamW weight decay, not on vectors and biases"""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block to the one below it, where the encoder trains"""
    clip_grad: float | None = None
    """Largest global L2 norm of the gradient; None for no clipping"""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; the warm-up takes at most a fifth of the run."""
        falls = partial(poly, power=self.power) if self.decay == "poly" else one_cycle
        return falls(step, self.steps, self.lr, end=self.min_lr, warmup=min(self.warmup, self.steps // 5))


def poly(
    step: int,
    total: int,
    peak: float,
    *,
    end: float = 0.0,
    power: float = 1.0,
    warmup: int = 0,
    warmup_ratio: float = 1e-6,
) -> float:
    """Return the learning rate of a step.

    Args:
        step: From 0.
        total: Steps of the whole run.
        peak: Rate at the start of the decay.
        end: Rate at the end.
        power: 1 is a straight line.
        warmup: Steps over which the rate of the decay is multiplied by a rising factor.
        warmup_ratio: That factor at step 0.
    """
    rate = (peak - end) * (1 - min(step, total) / total) ** power + end
    return rate * _warmup_factor(step, warmup, warmup_ratio)


def one_cycle(
    step: int, total: int, peak: float, *, end: float = 0.0, warmup: int = 0, warmup_ratio: float = 1e-6
) -> float:
    """Return the learning rate of a step: half a cosine from `peak` to `end`, times the warm-up of `poly`.

    DINOv3's schedule for its linear head: the cosine runs from the first step on, the warm-up on top of it.
    """
    return cosine(step, total, peak, end) * _warmup_factor(step, warmup, warmup_ratio)


def _warmup_factor(step: int, warmup: int, ratio: float) -> float:
    return 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)


def layer_decay_param_groups(model: nn.Module, rate: float, num_layers: int) -> list[dict[str, Any]]:
    """Return AdamW groups of a segmentation model with a learning rate per layer.

    Embeddings are layer 0, block i is layer i + 1, all else (neck, heads, final norm) layer `num_layers` + 1; the rate
    of layer l is multiplied by `rate ** (num_layers + 1 - l)`. Vectors, biases and positions do not decay.

    Args:
        model: With the encoder under `backbone`, or an encoder itself.
        rate: Factor per layer, in (0, 1].
        num_layers: Blocks of the encoder.

    Returns:
        Groups with `params`, `names`, `lr_scale` and `decays`.
    """
    prefix = "backbone." if hasattr(model, "backbone") else ""
    return parameter_groups(
        model, layer_decay=rate, layer=partial(_layer, prefix=prefix, depth=num_layers), depth=num_layers
    )


def _layer(name: str, prefix: str, depth: int) -> int:
    if not name.startswith(prefix):
        return depth + 1
    # A wrapper may keep the encoder under a name of its own.
    return layer_of(name.removeprefix(prefix).removeprefix("encoder."), depth)
