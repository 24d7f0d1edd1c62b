"""Many linear heads trained at once on the same features: every learning rate on every input, in one pass.

Heads of one input share one weight matrix, so a step costs one matrix product per input each way, however many
learning rates there are. Heads share nothing that is trained: each ends where it would have ended alone. DINOv2's
evaluation (Oquab et al. 2023, arXiv 2304.07193), as its published code `eval/linear.py` has it.

>>> x, y = torch.eye(3).repeat(20, 1), torch.arange(3).repeat(20)
>>> heads = fit_heads(x, y, inputs=[slice(0, 3), slice(0, 2)], lrs=[0.1, 10.0], num_classes=3, steps=50, batch_size=8)
>>> len(heads.heads), heads.logits(x[:5], number=1).argmax(1)
(4, tensor([0, 1, 2, 0, 1]))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.encoders.probe import INITIAL_DEVIATION
from patchloom.errors import UsageError

MOMENTUM = 0.9
Kind = Literal["classes", "labels"]


@dataclass(frozen=True)
class HeadGrid:
    """Trained heads; number i · L + l is that of input i and learning rate l."""

    heads: list[tuple[int, float]]
    """Input and learning rate of each head."""
    inputs: list[slice]
    """Columns of the features that each input is."""
    weights: list[Tensor]
    """For each input (w, L · K)."""
    biases: list[Tensor]
    """For each input (L · K,)."""
    num_classes: int
    """K."""

    def logits(self, x: Tensor, number: int) -> Tensor:
        """Return the logits (n, K) of one head for features (n, W), on the heads' device."""
        lrs = len(self.heads) // len(self.inputs)
        which, lr = divmod(number, lrs)
        columns = slice(lr * self.num_classes, (lr + 1) * self.num_classes)
        weight, bias = self.weights[which][:, columns], self.biases[which][columns]
        return torch.cat([part[:, self.inputs[which]].to(weight) @ weight + bias for part in x.split(2**14)])


@torch.no_grad()
def fit_heads(
    x: Tensor,
    y: Tensor,
    *,
    inputs: Sequence[slice],
    lrs: Sequence[float],
    num_classes: int,
    steps: int,
    batch_size: int = 128,
    kind: Kind = "classes",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> HeadGrid:
    """Train a linear head for each input and learning rate by SGD with momentum 0.9 and a cosine to zero.

    Args:
        x: (n, W) features.
        y: (n,) int64 classes, or (n, K) in [0, 1] with NaN where unknown.
        inputs: Columns that each input is.
        lrs: Learning rates, as they are used.
        num_classes: K, classes or labels.
        steps: Optimiser steps.
        batch_size: Images per step; every pass over them is in a new order.
        kind: `classes`: cross-entropy, averaged over the batch. `labels`: binary cross-entropy, summed over batch and
            known labels and divided by the number of labels, as published.
        seed: Seed of initial weights (the same for all learning rates of an input) and of the order.
        device: Where to train.

    Raises:
        UsageError: No input, learning rate or step.
    """
    if not inputs or not lrs or steps < 1 or batch_size < 1:
        raise UsageError(
            f"{len(inputs)} inputs, {len(lrs)} learning rates, {steps} steps of {batch_size} images: each must be at "
            f"least 1"
        )
    x, y = x.to(device), y.to(device)
    count = len(lrs)
    rates = torch.tensor(lrs, device=x.device, dtype=x.dtype).repeat_interleave(num_classes)
    weights = [_initial(x, columns, num_classes, seed).repeat(1, count) for columns in inputs]
    biases = [x.new_zeros(count * num_classes) for _ in inputs]
    speeds = [torch.zeros_like(weight) for weight in weights]
    bias_speeds = [torch.zeros_like(bias) for bias in biases]
    for step, chosen in enumerate(_batches(len(x), batch_size, steps, seed)):
        chosen = chosen.to(x.device)
        batch, truth = x[chosen], y[chosen]
        rate = rates * (-0.5 * (1 + math.cos(math.pi * step / steps)))
        for columns, weight, bias, speed, bias_speed in zip(inputs, weights, biases, speeds, bias_speeds, strict=True):
            part = batch[:, columns]
            slope = _slope(torch.addmm(bias, part, weight), truth, num_classes, kind)
            speed.addmm_(part.T, slope, beta=MOMENTUM)
            bias_speed.mul_(MOMENTUM).add_(slope.sum(0))
            weight.addcmul_(speed, rate)
            bias.addcmul_(bias_speed, rate)
    heads = [(number, lr) for number in range(len(inputs)) for lr in lrs]
    return HeadGrid(heads, list(inputs), weights, biases, num_classes)


def _initial(x: Tensor, columns: slice, num_classes: int, seed: int) -> Tensor:
    """Return (w, K) from N(0, 0.01); of the input's own columns, so that it is the same alone and among others."""
    start, stop, _ = columns.indices(x.shape[1])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + start * 1009 + stop)
    return (torch.randn(stop - start, num_classes, generator=generator) * INITIAL_DEVIATION).to(x)


def _batches(n: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield the images of each step: pass after pass in a new order, without regard for where a pass ends."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randperm(n, generator=generator)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]


def _slope(logits: Tensor, truth: Tensor, num_classes: int, kind: Kind) -> Tensor:
    """Return the derivative (B, L · K) of the summed losses of all heads with respect to their logits."""
    by_head = logits.unflatten(1, (-1, num_classes))
    if kind == "classes":
        targets = F.one_hot(truth, num_classes).to(logits.dtype).unsqueeze(1)
        return (by_head.softmax(2).sub_(targets) / len(truth)).flatten(1)
    known = ~truth.isnan()
    apart = by_head.sigmoid().sub_(truth.nan_to_num(0.0).to(logits.dtype).unsqueeze(1))
    return (apart * (known.to(logits.dtype) / num_classes).unsqueeze(1)).flatten(1)
