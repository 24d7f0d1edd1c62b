"""Learning rate and weight decay as functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Return the value at a step: linear from 0 to `peak`, then a cosine to `end`.

    The warm-up includes both of its ends (0 at step 0, `peak` at step `warmup` - 1); the cosine takes
    t = 0 … total - warmup - 1 over T = total - warmup steps, so `end` itself is approached, not reached
    before the run is over (`cosine_scheduler` of BEiT's published code, which CCViT uses).

    Args:
        step: Optimiser step, from 0.
        total: Steps of the whole run.
        warmup: Steps of warm-up, fewer than `total`.
        peak: Value after the warm-up.
        end: Value the cosine tends to.
    """
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    if step >= total:
        return end
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_drops(step: int, total: int, warmup: int, peak: float, drops: Sequence[float], factor: float) -> float:
    """Return the value at a step: linear from 0 to `peak`, then less by a factor from each of some moments on.

    Args:
        step: Optimiser step, from 0.
        total: Steps of the whole run.
        warmup: Steps of warm-up.
        peak: Value after the warm-up.
        drops: Shares of the run, in (0, 1), from which on one more factor applies.
        factor: In (0, 1].
    """
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    return peak * factor ** sum(step >= round(share * total) for share in drops)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Return the value at a step of a cosine from `start` to `end` without warm-up."""
    return warmup_cosine(step, total, 0, start, end)


def warmup_steps(warmup_epochs: float, steps_per_epoch: int, total: int) -> int:
    """Return the steps of warm-up: what was asked for, but at most a fifth of the run."""
    return min(round(warmup_epochs * steps_per_epoch), total // 5)
