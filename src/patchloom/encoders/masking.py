"""Which patches are hidden and which are replaced. Every draw comes from a generator that is handed in.

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> masked = BlockMaskGenerator((14, 14), num_masked=75)(generator)
>>> replaced = ReplacementSampler(20)(masked, generator)
>>> int(masked.sum()), int(replaced.sum()), bool((masked & replaced).any())
(75, 20, False)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from patchloom.base.ranges import Count, PositiveInt, Share, checked
from patchloom.encoders.patches import Grid, plane, shown
from patchloom.errors import UsageError

ATTEMPTS = 10


class BlockMaskGenerator:
    """Block-wise masks of BEiT (arXiv 2106.08254), by default of an exact number of hidden patches, as in CCViT.

    Rectangles of random area and aspect are laid over the grid until the number is reached; where none fits any
    more, single patches make up the difference.

    Args:
        grid: (h, w), patches down and across. Blocks are rectangles: other grids are refused.
        num_masked: Patches to hide, 0 … h·w.
        min_block: Least area that is drawn, in patches.
        max_block: Most patches a block may newly cover; default: as many as are wanting.
        min_aspect: Least height over width of a block; the most is its inverse.
        exact: Make up the difference by single patches; without, fewer may be hidden (DINOv2).

    Raises:
        UsageError: A number outside its range, or a grid of other than 2 axes.
    """

    @checked
    def __init__(
        self,
        grid: Grid,
        num_masked: int,
        min_block: PositiveInt = 16,
        max_block: PositiveInt | None = None,
        min_aspect: Share = 0.3,
        exact: bool = True,
    ) -> None:
        _check_count(grid, num_masked)
        self.grid = plane(grid, "block masks")
        self.num_masked = num_masked
        self.min_block = min_block
        self.max_block = num_masked if max_block is None else max_block
        self.log_aspect = math.log(min_aspect), -math.log(min_aspect)
        self.exact = exact

    def __call__(self, generator: torch.Generator) -> Tensor:
        """Return a mask (h, w) bool, True = hidden, with `num_masked` true entries (at most, unless exact)."""
        mask = torch.zeros(self.grid, dtype=torch.bool)
        count = 0
        uniform = _uniform(generator)
        while count < self.num_masked:
            added = self._add_block(mask, min(self.num_masked - count, self.max_block), uniform)
            if added == 0:
                break
            count += added
        if self.exact and count != self.num_masked:
            _correct(mask, self.num_masked, generator)
        return mask

    def _add_block(self, mask: Tensor, most: int, uniform: Iterator[float]) -> int:
        """Cover a block with at most `most` new patches; return how many were new, 0 if no attempt fitted."""
        height, width = self.grid
        low, high = self.log_aspect
        for _ in range(ATTEMPTS):
            # The interval is reversed where fewer than min_block are wanting; that is meant.
            area = self.min_block + (most - self.min_block) * next(uniform)
            aspect = math.exp(low + (high - low) * next(uniform))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (h < height and w < width):
                continue
            top = int(next(uniform) * (height - h + 1))
            left = int(next(uniform) * (width - w + 1))
            block = mask[top : top + h, left : left + w]
            new = h * w - int(block.sum())
            if 0 < new <= most:
                block.fill_(True)
                return new
        return 0


class ReplacementSampler:
    """Uniformly random patches among the visible ones (CCViT, arXiv 2303.04664).

    Args:
        num_replaced: Patches to choose.

    Raises:
        UsageError: The number is negative, or more than are visible.
    """

    @checked
    def __init__(self, num_replaced: Count) -> None:
        self.num_replaced = num_replaced

    def __call__(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Return (*grid) bool, disjoint from `mask` (*grid) bool."""
        visible = (~mask.flatten()).nonzero().flatten()
        if len(visible) < self.num_replaced:
            raise UsageError(f"{self.num_replaced} patches to replace, but only {len(visible)} are visible")
        chosen = visible[torch.randperm(len(visible), generator=generator)[: self.num_replaced]]
        replaced = torch.zeros(mask.numel(), dtype=torch.bool)
        replaced[chosen] = True
        return replaced.view_as(mask)


def random_mask(grid: Grid, num_masked: int, generator: torch.Generator) -> Tensor:
    """Return a mask (*grid) bool with `num_masked` uniformly random patches hidden, on a grid of any number of axes.

    Raises:
        UsageError: A negative number, or more patches than there are.
    """
    _check_count(grid, num_masked)
    return ReplacementSampler(num_masked)(torch.zeros(grid, dtype=torch.bool), generator)


def _check_count(grid: Grid, num_masked: int) -> None:
    most = math.prod(grid)
    if not 0 <= num_masked <= most:
        raise UsageError(f"num_masked is {num_masked}; a {shown(grid)} grid has 0 to {most} to hide")


def _correct(mask: Tensor, wanted: int, generator: torch.Generator) -> None:
    """Hide or show random patches until `wanted` are hidden."""
    flat = mask.view(-1)
    excess = int(flat.sum()) - wanted
    candidates = (flat if excess > 0 else ~flat).nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[: abs(excess)]]
    flat[chosen] = excess < 0


def _uniform(generator: torch.Generator) -> Iterator[float]:
    """Yield numbers in [0, 1), drawn many at a time: one call into torch costs more than a block."""
    while True:
        yield from torch.rand(64, generator=generator).tolist()
