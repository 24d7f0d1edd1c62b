"""Positions of patches: sines and cosines on a grid of any number of axes, and learnt ones on another grid.

>>> sincos_positions(64, (14, 14)).shape, sincos_positions(96, (8, 14, 14), prefix=0).shape
(torch.Size([197, 64]), torch.Size([1568, 96]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.encoders.patches import Grid, shown
from patchloom.errors import UsageError


@dataclass(frozen=True)
class PositionRule:
    """How absolute positions are resampled to another grid, always by cubic interpolation and in float32."""

    antialias: bool = True
    """Smooth before going to a smaller grid: timm's way, and DINOv2's with registers"""
    offset: float | None = None
    """Added to the grid's sides when the scale is computed; DINOv2 without registers: 0.1. None: scale by the sizes"""


TIMM_RULE = PositionRule()
DINOV2_RULE = PositionRule(antialias=False, offset=0.1)
"""DINO's, which DINOv2 without registers and BEiT v2's descendants follow"""


def sincos_positions(dim: int, grid: Grid, prefix: int = 1, axes: Sequence[int] | None = None) -> Tensor:
    """Return fixed sine-cosine positions on a grid (MAE, arXiv 2111.06377, and its kin for volumes).

    The width is shared out evenly among the axes, each with sines then cosines of its place at the frequencies
    10000^(-k / q), k = 0 … q - 1, q = dim / (2 · axes).

    Args:
        dim: Width, divisible by twice the number of axes; for images by 4.
        grid: Patches along each axis; of images (down, across).
        prefix: Rows of zeros in front, for class and register tokens.
        axes: The axes in the order in which the columns encode them; default: the last one first, as MAE has it.

    Returns:
        (prefix + N, dim) float32, computed in double precision.

    Raises:
        UsageError: The width is not divisible so.
    """
    rank = len(grid)
    if dim % (2 * rank):
        raise UsageError(f"sine-cosine positions need a width divisible by {2 * rank}, not {dim}")
    count = dim // (2 * rank)
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / (dim / (2 * rank)))
    places = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    parts = []
    for axis in range(rank)[::-1] if axes is None else axes:
        angles = places[axis].flatten().unsqueeze(1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat([torch.zeros(prefix, dim), torch.cat(parts, dim=1).float()])


def running_positions(positions: int, width: int) -> Tensor:
    """Return the (positions, width) float32 table of VideoMAE: one number runs over all tokens, whatever their grid.

    Sine on even and cosine on odd columns; the angle of position p in column j is p / 10000^(2 ⌊j/2⌋ / width),
    computed in float64.
    """
    columns = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (columns // 2) / width)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).float()


def resample_positions(positions: Tensor, old: Grid, new: Grid, prefix: int, rule: PositionRule = TIMM_RULE) -> Tensor:
    """Return absolute positions for another grid of as many axes, by cubic interpolation along each.

    Args:
        positions: (1, prefix + N, D).
        old: The grid of N patches the positions are for; of images (down, across).
        new: The grid of N' patches they shall be for.
        prefix: Positions in front that belong to class and register tokens; they stay.
        rule: How.

    Returns:
        (1, prefix + N', D), differentiable; `positions` itself where the grid is the same.

    Raises:
        UsageError: The grids differ in their number of axes.
    """
    if old == new:
        return positions
    if len(old) != len(new):
        raise UsageError(f"positions of a grid of {shown(old)} are not resampled to {shown(new)}: their axes differ")
    front, rest = positions[:, :prefix], positions[:, prefix:]
    maps = rest.float().reshape(1, *old, -1).movedim(-1, 1)
    if len(old) == 2:
        maps = _resized(maps, old, new, rule)
    else:
        # The cubic kernel of several axes is the product of those of each. Lines lie along the last axis of two: where
        # that has length 1, PyTorch's smoothed interpolation along the other is wrong (in 2.15, too).
        for axis, (n, o) in enumerate(zip(new, old, strict=True), start=2):
            if n != o:
                lines = maps.movedim(axis, -1)
                lined = _resized(lines.reshape(1, -1, 1, o), (1, o), (1, n), rule)
                maps = lined.reshape(*lines.shape[:-1], n).movedim(-1, axis)
    return torch.cat([front, maps.flatten(2).transpose(1, 2).to(positions)], dim=1)


def patch_positions(positions: Tensor, grid: Grid) -> int:
    """Return how many of the rows of positions (1, P + N, D) stand in front of those of the patches of a grid."""
    return int(positions.shape[1]) - math.prod(grid)


def _resized(maps: Tensor, old: Grid, new: Grid, rule: PositionRule) -> Tensor:
    """Return maps (1, D, h, w) for another grid."""
    where: dict[str, Any] = {"size": new}
    if rule.offset is not None:
        where = {"scale_factor": tuple((n + rule.offset) / o for n, o in zip(new, old, strict=True))}
    return F.interpolate(maps, mode="bicubic", antialias=rule.antialias, **where)
