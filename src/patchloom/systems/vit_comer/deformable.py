"""Attention over several maps at a few places that each query chooses: multi-scale deformable attention.

Zhu et al. 2020 (Deformable DETR, arXiv 2010.04159), in plain torch: one `grid_sample` for each map, no compiled
extension. Parameters bear the published names.

>>> attention = MultiScaleDeformableAttention(dim=24, num_heads=6, num_levels=2)
>>> shapes = [(4, 6), (2, 3)]
>>> tokens = torch.randn(1, 30, 24)
>>> attention(tokens, reference_points(shapes), tokens, shapes).shape
torch.Size([1, 30, 24])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return weighted sums of what maps hold at some places, bilinear between pixels and zero outside.

    Args:
        value: (B, S, M, d), the maps one after the other, each row by row.
        spatial_shapes: (height, width) of each of the L maps; their areas add up to S.
        sampling_locations: (B, Q, M, L, P, 2), as (x, y) in [0, 1] from the maps' left and upper edges.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * d), at least float32.

    Raises:
        UsageError: The areas do not add up to S.
    """
    areas = [height * width for height, width in spatial_shapes]
    batch, tokens, heads, dim = value.shape
    if sum(areas) != tokens:
        raise UsageError(f"maps of {list(spatial_shapes)} hold {sum(areas)} tokens, and there are {tokens}")
    maps = at_least_float32(value).permute(0, 2, 3, 1).flatten(0, 1).split(areas, dim=2)  # (B M, d, h w) each
    grids = (2 * at_least_float32(sampling_locations) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B M, Q, P, 2)
    weights = at_least_float32(attention_weights).permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)  # (L, B M, 1, Q, P)
    total: Tensor | None = None
    for tokens_of, shape, grid, weight in zip(maps, spatial_shapes, grids, weights, strict=True):
        sampled = F.grid_sample(
            tokens_of.unflatten(2, tuple(shape)), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (B M, d, Q, P)
        part = (sampled * weight).sum(-1)
        total = part if total is None else total + part
    assert total is not None
    return total.view(batch, heads * dim, -1).transpose(1, 2)


class MultiScaleDeformableAttention(nn.Module):
    """Each query looks at `num_points` places of every map, in every head.

    Places and weights are computed in float32 under autocast, too: half precision is too coarse for offsets of
    fractions of a pixel.

    Args:
        dim: Width D of queries and values.
        num_heads: M.
        num_levels: Maps.
        num_points: Places in a map, P.
        value_ratio: r; values have the width int(r D), shared out among the heads.

    Raises:
        UsageError: Heads do not share the widths out evenly.
    """

    def __init__(
        self, dim: int, num_heads: int = 6, num_levels: int = 3, num_points: int = 4, value_ratio: float = 1.0
    ) -> None:
        super().__init__()
        value_dim = int(value_ratio * dim)
        if dim % num_heads or value_dim % num_heads or value_dim == 0:
            raise UsageError(
                f"{num_heads} heads of deformable attention do not share a width of {dim} and values of {value_dim} "
                f"(ratio {value_ratio:g}) out evenly; choose deform_heads that divides both"
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.output_proj = nn.Linear(value_dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let each head look in a direction of its own, point after point one pixel further, with equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = directions[:, None, None, :] * steps[:, None]  # (M, 1, P, 2)
        self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference_points: Tensor, value: Tensor, spatial_shapes: Shapes) -> Tensor:
        """Return (B, Q, D).

        Args:
            query: (B, Q, D).
            reference_points: (1 or B, Q, 1 or L, 2), (x, y) in [0, 1]: where each query looks from.
            value: (B, S, D), the maps one after the other.
            spatial_shapes: (height, width) of each map.

        Raises:
            UsageError: Another number of maps than it was made for, or their areas do not add up to S.
        """
        if len(spatial_shapes) != self.num_levels:
            raise UsageError(f"deformable attention was made for {self.num_levels} maps and gets {len(spatial_shapes)}")
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        values = self.value_proj(value).unflatten(2, (heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            offsets = _in_float32(self.sampling_offsets, query).unflatten(2, (heads, levels, points, 2))
            weights = _in_float32(self.attention_weights, query).unflatten(2, (heads, levels * points))
            weights = weights.softmax(-1).unflatten(3, (levels, points))
            sides = offsets.new_tensor([[width, height] for height, width in spatial_shapes])
            places = reference_points[:, :, None, :, None, :] + offsets / sides[:, None, :]
            attended = ms_deform_attn(values, spatial_shapes, places, weights)
        out: Tensor = self.output_proj(attended.to(values.dtype))
        return out


def reference_points(shapes: Shapes, like: Tensor | None = None) -> Tensor:
    """Return the centres of the cells of maps, one map after the other: (1, Q, 1, 2) as (x, y) in [0, 1].

    Args:
        shapes: (height, width) of each map.
        like: A tensor of the type and device wanted; default: float32.
    """
    about: dict[str, Any] = {} if like is None else {"dtype": at_least_float32(like[:0]).dtype, "device": like.device}
    rows = []
    for height, width in shapes:
        y = (torch.arange(height, **about) + 0.5) / height
        x = (torch.arange(width, **about) + 0.5) / width
        rows.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    return torch.cat(rows)[None, :, None, :]


def _in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(at_least_float32(x), at_least_float32(layer.weight), at_least_float32(layer.bias))
