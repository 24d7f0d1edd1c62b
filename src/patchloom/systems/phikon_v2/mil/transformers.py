"""Heads that let the tiles of a bag speak with one another: TransMIL and HIPT's.

Shao et al., "TransMIL", arXiv 2106.00908; Chen et al., "Scaling Vision Transformers to Gigapixel Images", arXiv
2206.02647. Both as the published code of Phikon-v2's group (owkin/HistoSSLscaling) runs them.

>>> TransMIL(16)(torch.zeros(2, 5, 16)).shape
torch.Size([2, 1])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.systems.phikon_v2.mil.base import MILHead
from patchloom.systems.phikon_v2.mil.nystrom import NystromAttention

AttentionType = Literal["original", "nystrom"]


class TransMIL(MILHead):
    """Two attention blocks around a convolution over the tiles laid out as a square.

    The published code knows no mask: padding is a tile of zeros like any other, so what it says of a bag depends on
    the bags beside it. Here too; `needs_single_bags` tells whoever trains and evaluates to give one bag at a time.

    Args:
        in_features: Width of the tile features.
        out_features: Logits per bag.
        proj_dim: Project the features to this width first.
        proj_dropout: Dropout after the projection.
        num_heads: Attention heads of both blocks.
        attention_type: Exact attention, or Nystrom's approximation for long bags.
        qkv_bias: Bias of queries, keys and values.
        num_landmarks: Landmarks of Nystrom's.
        residual_kernel_size: Width of Nystrom's convolution along the values.
        attn_dropout: Dropout of the attention weights, in exact attention.
        block_dropout: Dropout after each block's projection.
        depthwise: Convolve each channel by itself, as the paper says; the published code mixes them.
        metadata_cols: Columns in front of the features.
        second_block: Settings of the second block where they differ from the first's: `num_heads`, `attention_type`,
            `qkv_bias`, `num_landmarks`, `residual_kernel_size`, `attn_dropout`, `block_dropout`.

    Raises:
        UsageError: The heads do not divide the width, or an unknown setting of the second block.
    """

    needs_single_bags = True

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        proj_dim: int | None = None,
        proj_dropout: float = 0.0,
        num_heads: int = 8,
        attention_type: AttentionType = "original",
        qkv_bias: bool = False,
        num_landmarks: int = 256,
        residual_kernel_size: int = 33,
        attn_dropout: float = 0.0,
        block_dropout: float = 0.0,
        depthwise: bool = False,
        metadata_cols: int = 0,
        second_block: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, metadata_cols)
        width = proj_dim or in_features
        first: dict[str, Any] = {
            "num_heads": num_heads,
            "attention_type": attention_type,
            "qkv_bias": qkv_bias,
            "num_landmarks": num_landmarks,
            "residual_kernel_size": residual_kernel_size,
            "attn_dropout": attn_dropout,
            "block_dropout": block_dropout,
        }
        for name in second_block or {}:
            if name not in first:
                raise unknown_name("setting of the second block", name, first)
        self.proj = (
            nn.Identity()
            if proj_dim is None
            else nn.Sequential(nn.Linear(in_features, proj_dim), nn.Dropout(proj_dropout))
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

        self.cor = AttentionBlock(width, _attention(width, **first))
        self.pos_enc = PyramidConvolution(width, depthwise)
        self.agg = AttentionBlock(width, _attention(width, **first | dict(second_block or {})))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_features)
        self.apply(_truncated_normal)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features), see `MILHead.forward`; the mask is checked, but changes nothing."""
        x, _ = self.checked(x, mask)
        return self.head(self.norm(self.agg(self._squared(x))[:, 0]))

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return where the class token looks in the second block, mean over heads, (B, N); exact attention only."""
        x, _ = self.checked(x, mask)
        if not isinstance(self.agg.attn, SelfAttention):
            return super().tile_scores(x, mask)
        weights = self.agg.attn.weights(self.agg.norm1(self._squared(x)))[:, :, 0, 1:].mean(1)
        return weights[:, : x.shape[1]]

    def _squared(self, x: Tensor) -> Tensor:
        """Return (B, 1 + side², width): the tiles, the first of them again up to a square, after the first block."""
        x = self.proj(x)
        side = math.isqrt(x.shape[1] - 1) + 1
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x, x[:, : side**2 - x.shape[1]]], 1)
        return self.pos_enc(self.cor(x))


def _attention(
    width: int,
    num_heads: int,
    attention_type: AttentionType,
    qkv_bias: bool,
    num_landmarks: int,
    residual_kernel_size: int,
    attn_dropout: float,
    block_dropout: float,
) -> nn.Module:
    """Return the attention of a block."""
    if width % num_heads:
        raise UsageError(f"{num_heads} heads do not divide a width of {width}; set proj_dim to a multiple")
    if attention_type not in ("original", "nystrom"):
        raise unknown_name("attention_type", attention_type, ("original", "nystrom"))
    if attention_type == "nystrom":
        return NystromAttention(width, num_heads, qkv_bias, num_landmarks, residual_kernel_size, dropout=block_dropout)
    return SelfAttention(width, num_heads, qkv_bias, attn_dropout, block_dropout)


class AttentionBlock(nn.Module):
    """Attention on normalised tokens, added to them; no MLP."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.norm1 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, width)."""
        return x + self.attn(self.norm1(x))


class SelfAttention(nn.Module):
    """Exact multi-head attention."""

    def __init__(
        self, width: int, num_heads: int, qkv_bias: bool = False, attn_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.attn_dropout = attn_dropout
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, width)."""
        q, k, v = self._heads(x)
        rate = self.attn_dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention (B, heads, N, N)."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, heads, N, width / heads) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class PyramidConvolution(nn.Module):
    """Convolutions of three sizes over the square of tiles, added to it; the class token passes by."""

    def __init__(self, width: int, depthwise: bool = False) -> None:
        super().__init__()
        groups = width if depthwise else 1
        self.group_conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.group_conv2 = nn.Conv2d(width, width, 5, padding=2, groups=groups)
        self.group_conv3 = nn.Conv2d(width, width, 7, padding=3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 1 + side², width)."""
        side = math.isqrt(x.shape[1] - 1)
        square = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        square = square + self.group_conv1(square) + self.group_conv2(square) + self.group_conv3(square)
        return torch.cat([x[:, :1], square.flatten(2).transpose(1, 2)], 1)


class HIPTMIL(MILHead):
    """A small Transformer encoder over the tiles, then gated attention; sizes are fixed, tiles have no place.

    Published code takes one bag at a time. So does this one inside: of a batch each bag is computed by itself,
    without its padding.

    Args:
        in_features: Width of the tile features.
        out_features: Logits per bag.
        metadata_cols: Columns in front of the features.
    """

    WIDTH, DROPOUT = 192, 0.25

    def __init__(self, in_features: int, out_features: int = 1, metadata_cols: int = 0) -> None:
        super().__init__(in_features, out_features, metadata_cols)
        width, rate = self.WIDTH, self.DROPOUT
        self.phi = nn.Sequential(nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(rate))
        layer = nn.TransformerEncoderLayer(width, nhead=3, dim_feedforward=width, dropout=rate, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.gat = HIPTAttention(width, rate)
        self.rho = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(rate))
        self.classifier = nn.Linear(width, out_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features), see `MILHead.forward`."""
        pooled = [(weights * tiles).sum(0) for tiles, weights in self._attended(*self.checked(x, mask))]
        return self.classifier(self.rho(torch.stack(pooled)))

    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weight of each tile, (B, N), zero where padded."""
        x, mask = self.checked(x, mask)
        attention = x.new_zeros(x.shape[:2])
        for number, (_, weights) in enumerate(self._attended(x, mask)):
            kept = slice(None) if mask is None else ~mask[number, :, 0]
            attention[number, kept] = weights.squeeze(-1)
        return attention

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention, (B, N)."""
        return self.attention(x, mask)

    def _attended(self, x: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return for each bag its tiles (n, width) and their weights (n, 1)."""
        attended = []
        for number, bag in enumerate(x):
            tiles = self.phi(bag if mask is None else bag[~mask[number, :, 0]])
            tiles = self.transformer(tiles[None])[0]
            attended.append((tiles, self.gat(tiles).softmax(0)))
        return attended


class HIPTAttention(nn.Module):
    """Gated attention with dropout on both branches."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))
        self.attention_b = nn.Sequential(nn.Linear(width, width), nn.Sigmoid(), nn.Dropout(dropout))
        self.attention_c = nn.Linear(width, 1)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the logits (n, 1) of tiles (n, width)."""
        return self.attention_c(self.attention_a(tiles) * self.attention_b(tiles))


def _truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
