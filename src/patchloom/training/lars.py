"""LARS: momentum with a step per tensor in proportion to the tensor's own size.

"Large Batch Training of Convolutional Networks", arXiv 1708.03888, in the form self-supervised methods use (Barlow
Twins, VICReg): biases, norms and other vectors take plain steps, without decay. timm's `Lars` trusts tensors by
|p| / (|g| + wd |p|) instead of |p| / |g + wd p|, and treats vectors alike, so these few lines are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """g ← g + wd p; g ← trust |p| / |g| g (both for more than one dimension); m ← μ m + g; p ← p - lr m.

    Args:
        params: Tensors or groups of them.
        lr: Learning rate.
        momentum: μ; paper: 0.9.
        weight_decay: wd.
        trust: Trust coefficient; paper: 0.001.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns what the closure, which computes the gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return loss

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        g = p.grad
        if p.ndim > 1:
            g = g.add(p, alpha=group["weight_decay"])
            size, slope = p.norm(), g.norm()
            usable = (size > 0) & (slope > 0)
            g = g * torch.where(usable, group["trust"] * size / slope, torch.ones_like(size))
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        moved = state["momentum"].mul_(group["momentum"]).add_(g)
        p.sub_(moved, alpha=group["lr"])
