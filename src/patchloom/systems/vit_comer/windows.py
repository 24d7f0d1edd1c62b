"""Blocks of a plain ViT whose tokens attend within windows, as the detection backbones of ViT-CoMer have them.

Xia et al. 2024 (arXiv 2403.07392) and its published code: no shift, no relative bias, and the zeros that fill the last
windows up are keys like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from patchloom.errors import UsageError


def check_windowed(block: nn.Module) -> None:
    """Refuse a block that cannot attend within windows.

    Raises:
        UsageError: It is none of a plain ViT.
    """
    attention: Any = getattr(block, "attn", None)
    plain = type(block) is Block and type(attention) is Attention
    if not plain or not all(isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm)):
        raise UsageError(
            f"window attention is for the blocks of a plain ViT, not for a {type(block).__name__}; give it none"
        )


def windowed_attention(attention: Any, x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Return the attention of tokens to those of their window.

    Queries, keys and values are made first, and filled up with zeros on the right and below to a multiple of the
    window: what fills takes part in the softmax with logit 0 and adds nothing.

    Args:
        attention: timm's, of a plain ViT.
        x: (B, N, D), the grid's tokens row by row.
        grid: (height, width).
        window: Side of a window in tokens.

    Returns:
        (B, N, D).
    """
    (height, width), heads = grid, attention.num_heads
    down, across = -(-height // window), -(-width // window)
    qkv = attention.qkv(x).unflatten(1, (height, width))
    qkv = F.pad(qkv, (0, 0, 0, across * window - width, 0, down * window - height))
    # (B, down, window, across, window, 3, heads, d) -> (3, B, down, across, heads, tokens of a window, d)
    qkv = qkv.unflatten(3, (3, heads, -1)).unflatten(2, (across, window)).unflatten(1, (down, window))
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3).unbind(0)
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        out = attention.attn_drop((q * attention.scale @ k.transpose(-2, -1)).softmax(-1)) @ v
    out = out.unflatten(2, (window, window)).unflatten(0, (-1, down, across))  # (B, down, across, heads, w, w, d)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)  # (B, down w, across w, D)
    out = out[:, :height, :width].flatten(1, 2)
    projected: Tensor = attention.proj_drop(attention.proj(attention.norm(out)))
    return projected


def run_windowed(block: Any, x: Tensor, grid: tuple[int, int], window: int, recompute: bool = False) -> Tensor:
    """Return the output (B, N, D) of a plain ViT's block whose tokens attend within windows.

    Args:
        block: timm's `Block`.
        x: (B, N, D).
        grid: (height, width).
        window: Side of a window in tokens.
        recompute: Compute activations again in the backward pass.
    """

    def run(x: Tensor) -> Tensor:
        x = x + block.drop_path1(block.ls1(windowed_attention(block.attn, block.norm1(x), grid, window)))
        out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return out

    if recompute and torch.is_grad_enabled():
        again: Tensor = checkpoint(run, x, use_reentrant=False)
        return again
    return run(x)
