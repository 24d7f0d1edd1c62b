"""Attention by the angle between queries and keys, sharpened by a factor that each head learns.

Swin Transformer V2 (Liu et al. 2021, arXiv 2111.09883, section 3.2), without its bias of positions: a variant of
VideoMAE V2 (Wang et al. 2023, arXiv 2303.16727).

>>> import torch
>>> CosineAttention(64, num_heads=4)(torch.randn(2, 10, 64)).shape
torch.Size([2, 10, 64])
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 4.6052
"""Of the learnt exponent: products are multiplied by 100 at most."""


class CosineAttention(nn.Module):
    """Self-attention whose logits are cosines times exp(scale), a stand-in for timm's `Attention`.

    Keys have no bias: here, unlike in plain attention, one would change what is computed.

    Args:
        dim: Width D, divisible by the heads.
        num_heads: Heads.
        qkv_bias: Queries and values have a bias.
        attn_drop: Dropout of the probabilities in training.
        proj_drop: Dropout of the output in training.
        **unused: What timm passes to its own attention besides.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, N, D) of tokens (B, N, D)."""
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.scale.clamp(max=LARGEST).exp()
        q, k = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, drop, is_causal, scale=1.0)
        else:
            mixed = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        out: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return out
