"""The lens: what brings tokens of another sense into the space that the blocks of a ViT know (ViT-Lens, 2311.16081).

`PerceiverLens` is that of the paper: learnt queries that read the tokens and one another (Jaegle et al. 2021, arXiv
2103.03206). `SelfAttentionLens` is made of blocks of a ViT.

>>> lens = PerceiverLens(in_dim=24, width=32, num_latents=9, depth=2, heads=4, head_dim=8, cross_head_dim=8)
>>> lens(torch.randn(2, 100, 24)).shape
torch.Size([2, 9, 32])
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchloom.errors import UsageError


class CrossAttention(nn.Module):
    """Attention whose heads together need not be as wide as what they read.

    Args:
        width: Of the queries, W.
        context_dim: Of what is read, C.
        heads: How many.
        head_dim: Width of each.
    """

    def __init__(self, width: int, context_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return (B, n, W) of x (B, n, W) and context (B, m, C); `mask` (B, m) is True where a token may be read."""
        context = x if context is None else context
        parts = self.to_q(x), *self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        allowed = None if mask is None else mask[:, None, None]
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))
        return out


class GatedGELU(nn.Module):
    """The first half of the channels times the GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, n) of (…, 2 n)."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated layer, four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8 * width), GatedGELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, n, W)."""
        out: Tensor = self.net(x)
        return out


class PreNorm(nn.Module):
    """A sub-layer of normed inputs."""

    def __init__(self, width: int, fn: nn.Module, context_dim: int | None = None) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(width)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return what the sub-layer makes of x and, where it reads one, of the context."""
        if self.norm_context is None:
            return cast(Tensor, self.fn(self.norm(x)))
        return cast(Tensor, self.fn(self.norm(x), self.norm_context(context), mask))


def fourier_positions(shape: Sequence[int], bands: int, max_freq: float) -> Tensor:
    """Return what is appended to tokens that lie on a grid: sine, cosine and value of their place along each axis.

    Args:
        shape: Sides of the grid.
        bands: Frequencies, evenly from 1 to max_freq / 2, times pi.
        max_freq: See there.

    Returns:
        (*shape, axes * (2 * bands + 1)).
    """
    places = [torch.linspace(-1.0, 1.0, steps=side) for side in shape]
    place = torch.stack(torch.meshgrid(*places, indexing="ij"), -1)[..., None]
    angles = place * torch.linspace(1.0, max_freq / 2, bands) * math.pi
    return torch.cat([angles.sin(), angles.cos(), place], -1).flatten(-2)


class PerceiverLens(nn.Module):
    """Learnt queries that read the tokens, then one another, stage after stage; what becomes of them is the output.

    Args:
        in_dim: Width of the tokens.
        width: Of the ViT, W.
        num_latents: Queries L, the tokens that the ViT is given.
        depth: Stages.
        self_per_cross: How often the queries read one another in a stage.
        cross_heads: Heads that read the tokens.
        cross_head_dim: Width of each.
        heads: Heads by which queries read one another.
        head_dim: Width of each.
        tie_weights: All stages but the first are one.
        fourier_bands: Frequencies of the positions appended to tokens, see `fourier_positions`; 0: none (published
            models).
        max_freq: See there.
    """

    def __init__(
        self,
        in_dim: int,
        width: int,
        num_latents: int = 256,
        depth: int = 4,
        self_per_cross: int = 1,
        cross_heads: int = 1,
        cross_head_dim: int = 64,
        heads: int = 16,
        head_dim: int = 64,
        tie_weights: bool = False,
        fourier_bands: int = 0,
        max_freq: float = 10.0,
    ) -> None:
        super().__init__()
        self.width, self.tie_weights = width, tie_weights
        self.fourier_bands, self.max_freq = fourier_bands, max_freq
        read = in_dim + (2 * fourier_bands + 1 if fourier_bands else 0)

        def stage() -> nn.ModuleList:
            inner = [
                nn.ModuleList(
                    [PreNorm(width, CrossAttention(width, width, heads, head_dim)), PreNorm(width, FeedForward(width))]
                )
                for _ in range(self_per_cross)
            ]
            cross = PreNorm(width, CrossAttention(width, read, cross_heads, cross_head_dim), read)
            return nn.ModuleList([cross, PreNorm(width, FeedForward(width)), nn.ModuleList(inner)])

        self.latents = nn.Parameter(torch.randn(num_latents, width))
        stages = [stage() for _ in range(min(depth, 2) if tie_weights else depth)]
        # Shared weights stand under the number of each stage that has them, as in the published checkpoints.
        self.layers = nn.ModuleList(stages[min(number, len(stages) - 1)] for number in range(depth))

    @property
    def num_tokens(self) -> int:
        """Tokens that come out, L."""
        return len(self.latents)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, L, W) of tokens (B, n, in_dim), of which those are read where `mask` (B, n) is True."""
        if self.fourier_bands:
            places = fourier_positions(tokens.shape[1:2], self.fourier_bands, self.max_freq).to(tokens)
            tokens = torch.cat([tokens, places.expand(len(tokens), -1, -1)], -1)
        x = self.latents.expand(len(tokens), -1, -1)
        layers: Any = self.layers
        for cross, feed, inner in layers:
            x = x + cross(x, tokens, mask)
            x = x + feed(x)
            for attention, forward in inner:
                x = x + attention(x)
                x = x + forward(x)
        return x


class SelfAttentionLens(nn.Module):
    """Blocks of a ViT over the tokens, each sample by itself.

    The published code lets the samples of a batch read one another here; this does not.

    Args:
        width: Of the tokens and of the ViT, W.
        depth: Blocks.
        heads: Of each.
        mlp_ratio: Of the widths of an MLP.
        init_from: A ViT whose first blocks these begin as.
    """

    def __init__(
        self, width: int, depth: int = 4, heads: int = 16, mlp_ratio: float = 4.0, init_from: Any = None
    ) -> None:
        super().__init__()
        self.width = width
        if init_from is None:
            norm: Any = partial(nn.LayerNorm, eps=1e-5)
            blocks = [Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        else:
            if len(init_from.blocks) < depth:
                raise UsageError(f"a lens of {depth} blocks cannot begin as the first of {len(init_from.blocks)}")
            blocks = [copy.deepcopy(block) for block in init_from.blocks[:depth]]
        self.blocks = nn.ModuleList(blocks).requires_grad_(True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, n, W) of tokens (B, n, W)."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens
