"""Masks: exact counts, disjoint replacements, blocks rather than dust, reproducible draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.encoders.masking import BlockMaskGenerator, ReplacementSampler, random_mask
from patchloom.errors import UsageError


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 16), w=st.integers(1, 16), share=st.floats(0, 1), seed=st.integers(0, 2**31), data=st.data())
def test_counts_are_exact_and_sets_disjoint_on_any_grid(h, w, share, seed, data):
    count = round(share * h * w)
    generator = torch.Generator().manual_seed(seed)
    mask = BlockMaskGenerator((h, w), count, min_block=data.draw(st.integers(1, 20)))(generator)
    assert mask.shape == (h, w)
    assert int(mask.sum()) == count
    wanted = data.draw(st.integers(0, h * w - count))
    replaced = ReplacementSampler(wanted)(mask, generator)
    assert int(replaced.sum()) == wanted
    assert not (mask & replaced).any()
    assert int(random_mask((h, w), count, generator).sum()) == count


@settings(max_examples=40, deadline=None)
@given(grid=st.lists(st.integers(1, 6), min_size=1, max_size=4), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_random_masks_are_exact_on_grids_of_any_number_of_axes(grid, share, seed):
    count = round(share * math.prod(grid))
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(tuple(grid), count, generator)
    assert mask.shape == tuple(grid)
    assert int(mask.sum()) == count
    replaced = ReplacementSampler(math.prod(grid) - count)(mask, generator)
    assert torch.equal(replaced, ~mask)


def test_blocks_are_rectangles_of_images():
    with pytest.raises(UsageError, match="block masks are for grids of 2 axes, those of images; a grid of 8x4x4 has 3"):
        BlockMaskGenerator((8, 4, 4), 5)


def test_masks_come_in_blocks():
    """Neighbours of a hidden patch are hidden far more often than patches are on average."""
    generator = torch.Generator().manual_seed(0)
    draw = BlockMaskGenerator((14, 14), 75)
    masks = torch.stack([draw(generator) for _ in range(200)]).float()
    both = (masks[:, :, 1:] * masks[:, :, :-1]).mean() / masks.mean()
    assert both > 0.75  # 0.38 for single patches
    share = masks.mean(0)
    assert share.min() > 0.005
    assert share[5:9, 5:9].mean() > share[0].mean()  # blocks that touch the border are fewer


def test_no_block_spans_the_grid():
    """Blocks are strictly smaller than the grid, so one block alone never fills a row of it."""
    generator = torch.Generator().manual_seed(0)
    draw = BlockMaskGenerator((4, 4), 3, min_block=3, max_block=3)
    assert not any(draw(generator).all(dim=1).any() for _ in range(100))


def test_draws_depend_on_the_generator_alone():
    draw = BlockMaskGenerator((14, 14), 75)
    torch.manual_seed(1)
    first = draw(torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, draw(torch.Generator().manual_seed(7)))
    assert not torch.equal(first, draw(torch.Generator().manual_seed(8)))


def test_replacements_are_uniform_over_the_visible():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0] = True
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([ReplacementSampler(2)(mask, generator) for _ in range(3000)]).float().mean(0)
    assert draws[0].max() == 0
    torch.testing.assert_close(draws[1:], torch.full((2, 3), 2 / 6), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMaskGenerator((4, 4), 17), "num_masked is 17; a 4x4 grid has 0 to 16"),
        (lambda: BlockMaskGenerator((4, 4), 4, min_aspect=0), "min_aspect is 0"),
        (lambda: BlockMaskGenerator((4, 4), 4, min_block=0), "min_block is 0"),
        (lambda: random_mask((4, 4), 17, torch.Generator()), "num_masked is 17; a 4x4 grid has 0 to 16"),
        (lambda: ReplacementSampler(-1), "num_replaced is -1"),
        (lambda: ReplacementSampler(3)(torch.ones(2, 2, dtype=torch.bool), torch.Generator()), "only 0 are visible"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
