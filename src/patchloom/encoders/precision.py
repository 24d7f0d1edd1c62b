"""Number formats: what has to be computed with more digits than it comes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return integers and half-precision values in float32, float32 and float64 as they are.

    Losses are sums over thousands of numbers, which half precision overflows; a model in float64 keeps its digits.
    """
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which operations on a device keep the precision of what they are given."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
