"""Tensors of all processes as one, for losses that look at a whole batch at once.

A variance, a covariance or a batch norm of half a batch isn't half of that of the whole. Gathered, two processes with
batch b compute what one computes with batch 2b.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(x: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of their ranks; `x` itself where there is one process.

    Gradients go back to the process a row came from: the sum of what every process makes of it. A loss that all
    processes compute alike from gathered rows therefore gives each of them world-size times its own gradient, which the
    averaging of data-parallel training turns into the gradient of the whole batch.

    Args:
        x: (B, …), of the same shape in every process.

    Returns:
        (world_size · B, …).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    rows: Tensor = _Gather.apply(x)
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        first = dist.get_rank() * ctx.rows
        return whole[first : first + ctx.rows]
