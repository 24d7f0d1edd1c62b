"""Relative-position tables of `Beit` on other grids. They are of images: one row for each offset (down, across)."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.encoders.patches import Grid, plane

EXTRA_ROWS = 3  # class to token, token to class, class to class


def resize_relative_table(table: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """Return a relative-position table for another grid, as BEiT's published fine-tuning does.

    Source positions are spaced in a geometric progression, dense near zero offset, so that near offsets keep
    their meaning and far ones are stretched; a cubic spline is read off at the target's offsets.

    Args:
        table: ((2h - 1)(2w - 1) + 3, heads) of the old grid (h, w); the last three rows are kept as they are.
        old_grid: Patches (down, across) the table is for.
        new_grid: Patches it shall be for.

    Returns:
        The table of the new grid, of the same type.

    Raises:
        UsageError: A grid of other than 2 axes.
    """
    old_grid, new_grid = (plane(grid, "relative-position tables") for grid in (old_grid, new_grid))
    if old_grid == new_grid:
        return table.clone()
    source, target = ((2 * h - 1, 2 * w - 1) for h, w in (old_grid, new_grid))
    body, extra = table[:-EXTRA_ROWS], table[-EXTRA_ROWS:]
    maps = body.T.reshape(-1, *source)  # (heads, 2h - 1, 2w - 1)
    if source[0] == source[1] >= 4 and target[0] == target[1]:
        resized = _spline(maps, target[0])
    else:
        warnings.warn(
            f"relative positions of a {old_grid[0]}x{old_grid[1]} grid are resampled to {new_grid[0]}x{new_grid[1]} "
            f"bicubically: the published spline is for square grids of at least 3x3",
            stacklevel=2,
        )
        resized = F.interpolate(maps[None].float(), size=target, mode="bicubic", align_corners=True)[0].to(table)
    return torch.cat([resized.flatten(1).T, extra])


@lru_cache(maxsize=8)
def relative_matrix(old: Grid, new: Grid) -> Tensor:
    """Return the resampling of relative-position tables as a matrix: it is linear, and so learns through it."""
    rows = math.prod(2 * side - 1 for side in old)
    identity = torch.cat([torch.eye(rows), torch.zeros(EXTRA_ROWS, rows)])
    return resize_relative_table(identity, old, new)[:-EXTRA_ROWS]


def _spline(maps: Tensor, side: int) -> Tensor:
    from scipy.interpolate import RectBivariateSpline

    old = maps.shape[-1]
    where = _source_positions(old, side)
    wanted = np.clip(np.arange(-(side // 2), side // 2 + 1, dtype=np.float64), where[0], where[-1])
    values = maps.double().cpu().numpy()
    resized = np.stack([RectBivariateSpline(where, where, z, kx=3, ky=3, s=0)(wanted, wanted) for z in values])
    return torch.from_numpy(resized).to(maps)


def _source_positions(old: int, new: int) -> np.ndarray:
    """Return the offsets 0, ±1, ±(1 + q), … of the old table, with q such that the last one is new // 2."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1 - q ** (old // 2)) / (1 - q)
        if reach > new // 2:
            high = q
        else:
            low = q
    steps = np.cumsum(q ** np.arange(old // 2))
    return np.concatenate([-steps[::-1], [0.0], steps])
