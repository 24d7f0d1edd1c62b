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


def tube_mask(grid: Grid, ratio: float, permutation: Tensor) -> Tensor:
    """Return a mask that hides the same places at all times (VideoMAE, Tong et al. 2022, arXiv 2203.12602).

    Args:
        grid: Patches of a clip, (time, down, across).
        ratio: Share of the places hidden: int(ratio * h * w) of them.
        permutation: (h * w,) int64, the order in which a row of visible places, then hidden ones, is laid out.

    Returns:
        (*grid) bool, True = hidden.

    Raises:
        UsageError: A grid of other than 3 axes, or a ratio that hides no place or leaves none visible.
    """
    times, height, width = clip_grid(grid, "tube masks")
    places = height * width
    if not 0 < ratio < 1 or not 0 < (hidden := int(ratio * places)) < places:
        raise UsageError(
            f"a mask ratio of {ratio:g} hides {'all' if ratio >= 1 else 'none'} of {places} places of a frame; it must "
            f"hide some and leave some visible"
        )
    row = torch.arange(places) >= places - hidden
    return row[permutation].view(1, height, width).repeat(times, 1, 1)


def running_cell_mask(grid: Grid, ratio: float, phase: int) -> Tensor:
    """Return which patches the decoder leaves out: of cells of 2 x 2 places some, others at each time.

    VideoMAE V2 (Wang et al. 2023, arXiv 2303.16727, section 3.2): of four times each place is left out 4 ratio times.

    Args:
        grid: Patches of a clip, (time, down, across); down and across even.
        ratio: Share left out: 0.25, 0.5 (paper) or 0.75.
        phase: Where in the cycle the first time stands, 0 to 3.

    Returns:
        (*grid) bool, True = not decoded.

    Raises:
        UsageError: A grid of other than 3 axes or of odd sides, another ratio or phase.
    """
    times, height, width = clip_grid(grid, "running cells")
    if height % 2 or width % 2:
        raise UsageError(
            f"a running cell covers 2x2 patches, and a grid of {height}x{width} patches is odd; take another image "
            f"size, or decoder_mask=none"
        )
    if not 1 <= (dropped := int(4 * ratio)) <= 3:
        raise UsageError(f"a running cell leaves out 1, 2 or 3 of 4 patches, not {ratio:g}; take 0.25, 0.5 or 0.75")
    if not 0 <= phase < 4:
        raise UsageError(f"phase is {phase}; a running cell has phases 0 to 3")
    places = torch.arange(height)[:, None] % 2 * 2 + torch.arange(width) % 2  # number of a place within its cell
    moments = torch.arange(times)[:, None, None] + phase + 1
    return (places + moments) % 4 < dropped


def draw_tube_mask(grid: Grid, ratio: float, generator: torch.Generator) -> Tensor:
    """Return a `tube_mask` of places drawn uniformly."""
    _, height, width = clip_grid(grid, "tube masks")
    return tube_mask(grid, ratio, torch.randperm(height * width, generator=generator))


def draw_running_cell_mask(grid: Grid, ratio: float, generator: torch.Generator) -> Tensor:
    """Return a `running_cell_mask` of a phase drawn uniformly."""
    return running_cell_mask(grid, ratio, int(torch.randint(4, (), generator=generator)))


def clip_grid(grid: Grid, what: str) -> tuple[int, int, int]:
    """Return a grid as (time, down, across), for what is defined on clips alone.

    Raises:
        UsageError: The grid has another number of axes.
    """
    if len(grid) != 3:
        raise UsageError(f"{what} are for grids of 3 axes, those of clips; a grid of {shown(grid)} has {len(grid)}")
    return grid[0], grid[1], grid[2]


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
