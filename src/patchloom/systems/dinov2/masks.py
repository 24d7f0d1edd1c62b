"""Which patches of which crops DINOv2 hides (`collate.py` and `masking.py` of its published code).

Half of the global crops get a mask; their ratios are spread over 0.1 to 0.5, one in each of as many equal bins as there
are masked crops. The choice is made for the crops of all processes together, and the blocks of a crop come from a
generator of its own, so that several processes hide what one with the same global batch would.

>>> import torch
>>> masks = draw_masks((14, 14), batch_size=4, seed=0, step=0)
>>> masks.shape, int(masks.flatten(1).any(1).sum())
(torch.Size([8, 14, 14]), 4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchloom.data.order import draw_seed
from patchloom.encoders.masking import BlockMaskGenerator

GLOBAL_CROPS = 2


def draw_masks(
    grid: tuple[int, int],
    batch_size: int,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    min_block: int = 4,
) -> Tensor:
    """Return the masks of one process's global crops.

    Args:
        grid: (h, w), patches of a global crop down and across.
        batch_size: Images B of this process.
        seed: Seed of the run.
        step: Number of the batch.
        rank: This process.
        world_size: Number of processes.
        probability: Share of the crops that get a mask.
        ratio: Least and most share of the patches hidden where there is a mask.
        min_block: Fewest patches of a block that is tried.

    Returns:
        (2B, h, w) bool, crop-major, True = hidden. A mask may hide fewer patches than its share.
    """
    images = batch_size * world_size
    crops = GLOBAL_CROPS * images
    generator = torch.Generator().manual_seed(draw_seed(seed, step, 0, "masked crops"))
    shares = mask_shares(crops, probability, ratio, generator)
    masks = torch.zeros(GLOBAL_CROPS, batch_size, *grid, dtype=torch.bool)
    for view in range(GLOBAL_CROPS):
        for number in range(batch_size):
            crop = view * images + rank * batch_size + number
            hidden = int(grid[0] * grid[1] * float(shares[crop]))
            if hidden:
                own_generator = torch.Generator().manual_seed(draw_seed(seed, step, crop, "mask"))
                masks[view, number] = block_mask(grid, hidden, own_generator, min_block)
    return masks.flatten(0, 1)


def mask_shares(crops: int, probability: float, ratio: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Return the share of patches to hide in each crop, (crops,) float64; 0 where there is no mask."""
    masked = int(crops * probability)
    edges = torch.linspace(ratio[0], ratio[1], masked + 1, dtype=torch.float64)
    drawn = torch.rand(masked, generator=generator, dtype=torch.float64)
    shares = torch.zeros(crops, dtype=torch.float64)
    shares[:masked] = edges[:-1] + (edges[1:] - edges[:-1]) * drawn
    return shares[torch.randperm(crops, generator=generator)]


def block_mask(grid: tuple[int, int], hidden: int, generator: torch.Generator, min_block: int = 4) -> Tensor:
    """Return a mask (h, w) of blocks that hides up to `hidden` patches; a block is at most half the grid."""
    most = max(1, grid[0] * grid[1] // 2)
    return BlockMaskGenerator(grid, hidden, min_block=min_block, max_block=most, exact=False)(generator)
