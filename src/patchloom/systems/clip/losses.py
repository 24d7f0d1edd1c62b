"""The contrastive loss of two modalities (CLIP, Radford et al. 2021, arXiv 2103.00020), over all processes.

>>> torch.manual_seed(0)  # doctest: +ELLIPSIS
<torch._C.Generator object at ...>
>>> images, texts = (F.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
>>> round(float(contrastive_loss(images, texts, torch.tensor(1.0)).loss), 3) > 0
True
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from patchloom.training.gather import gathered


class Contrast(NamedTuple):
    """The loss, and how often it is right."""

    loss: Tensor
    accuracy: Tensor
    """Share of the first modality's rows that are nearest to their own of the second."""


def contrastive_loss(first: Tensor, second: Tensor, scale: Tensor, ids: Tensor | None = None) -> Contrast:
    """Return the mean cross-entropy of finding the partner among all, in both directions.

    Every process takes its own rows against the rows of all; averaged over processes, as data-parallel training does,
    loss and gradients are those of one process with the whole batch.

    Args:
        first: (b, D), L2-normalised; as many in every process.
        second: (b, D), likewise; row i belongs to row i of `first`.
        scale: Factor on similarities, a scalar.
        ids: (b,) int64, equal where pairs say the same, which then are no negatives of each other; None: all are.
    """
    rows = torch.arange(len(first), device=first.device)
    parallel = dist.is_available() and dist.is_initialized()
    targets = rows + (dist.get_rank() if parallel else 0) * len(first)
    with torch.autocast(first.device.type, enabled=False):  # bfloat16 cannot tell similarities of neighbours apart
        forth = scale * first @ gathered(second).T
        back = scale * second @ gathered(first).T
    if ids is not None:
        same = ids[:, None] == gathered(ids)[None]
        same[rows, targets] = False
        forth, back = forth.masked_fill(same, -torch.inf), back.masked_fill(same, -torch.inf)
    loss = (F.cross_entropy(forth, targets) + F.cross_entropy(back, targets)) / 2
    return Contrast(loss, (forth.detach().argmax(1) == targets).float().mean())
