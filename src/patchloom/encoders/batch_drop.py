"""Stochastic depth that leaves out work: a residual branch is computed on a random part of the batch only.

DINOv2 (arXiv 2304.07193, section 5, and its published code): at rate r each branch is computed on
s = max(int(B (1 - r)), 1) of B samples and added with weight B / s. The expectation is that of ordinary drop path, the
cost that of the samples kept. Below a rate of 0.1 gathering and scattering cost more than they save; there timm's drop
path serves.

>>> import timm, torch
>>> from patchloom.encoders import embed
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> embedded = embed(encoder, torch.randn(4, 3, 224, 224))
>>> run_blocks_on_part(encoder, embedded, rate=0.5).shape
torch.Size([4, 197, 192])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchloom.encoders.properties import Encoder
from patchloom.encoders.stages import Embedded

Branch = Callable[[Tensor], Tensor]

LEAST_RATE = 0.1
"""Rates up to this are served by ordinary drop path."""


def can_run_on_part(encoder: Encoder) -> bool:
    """Return whether the encoder's blocks are of a kind whose branches are known here: timm's pre-norm blocks."""
    return all(type(block) in (Block, BeitBlock, EvaBlock) for block in encoder.blocks)


def set_drop_path(encoder: Encoder, rate: float) -> None:
    """Give every block of an encoder the same drop path rate, in place; DINOv2's is uniform, timm's rises."""
    for block in encoder.blocks:
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate) if rate > 0 else nn.Identity())


def run_blocks_on_part(encoder: Encoder, embedded: Embedded, rate: float) -> Tensor:
    """Run all blocks, each branch on a random part of the batch.

    Args:
        encoder: One for which `can_run_on_part` holds; its own drop path is passed over.
        embedded: What enters the first block.
        rate: Share of the samples each branch leaves out, in [0, 1). The draws come from torch's global generator.

    Returns:
        (B, P + N, D), not normed.
    """
    x = embedded.x
    count = max(int(len(x) * (1 - rate)), 1)
    recompute = bool(getattr(encoder, "grad_checkpointing", False)) and torch.is_grad_enabled()
    for number, block in enumerate(encoder.blocks):
        for branch in branches(block, embedded.kwargs_of(number)):
            samples = torch.randperm(len(x), device=x.device)[:count]
            x = checkpoint(_added, x, samples, branch, use_reentrant=False) if recompute else _added(x, samples, branch)
    return x


def branches(block: Any, kwargs: dict[str, Any]) -> tuple[Branch, Branch]:
    """Return what a pre-norm block adds to its input, in two steps: attention and MLP, layer scale included."""
    if isinstance(block, Block):
        return (
            lambda x: block.ls1(block.attn(block.norm1(x), **kwargs)),
            lambda x: block.ls2(block.mlp(block.norm2(x))),
        )
    return (
        lambda x: _scaled(block.gamma_1, block.attn(block.norm1(x), **kwargs)),
        lambda x: _scaled(block.gamma_2, block.mlp(block.norm2(x))),
    )


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _added(x: Tensor, samples: Tensor, branch: Branch) -> Tensor:
    residual = branch(x.index_select(0, samples))
    return torch.index_add(x, 0, samples, residual.to(x.dtype), alpha=len(x) / len(samples))
