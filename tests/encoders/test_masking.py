"""Masks: exact counts, disjoint replacements, blocks rather than dust, reproducible draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.encoders.masking import (
    BlockMaskGenerator,
    ReplacementSampler,
    draw_running_cell_mask,
    draw_tube_mask,
    random_mask,
    running_cell_mask,
    tube_mask,
)
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


@pytest.mark.parametrize(("side", "hidden"), [(14, 176), (16, 230)])
def test_a_tube_hides_the_same_places_at_all_times(side, hidden):
    mask = draw_tube_mask((8, side, side), 0.9, torch.Generator().manual_seed(0))
    assert mask.shape == (8, side, side)
    assert mask.sum((1, 2)).tolist() == [hidden] * 8
    assert torch.equal(mask, mask[:1].expand_as(mask))
    # Visible places come first in the row that is laid out.
    order = torch.arange(side * side)
    assert torch.equal(tube_mask((1, side, side), 0.9, order).flatten(), order >= side * side - hidden)


def test_a_running_cell_moves_as_the_paper_draws_it():
    cells = {0: [[1, 1], [0, 0]], 1: [[1, 0], [0, 1]], 2: [[0, 0], [1, 1]], 3: [[0, 1], [1, 0]]}
    for phase in range(4):
        mask = running_cell_mask((8, 4, 6), 0.5, phase)
        for time in range(8):
            cell = torch.tensor(cells[(phase + time + 1) % 4], dtype=torch.bool)
            assert torch.equal(mask[time], cell.repeat(2, 3))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_running_cells_leave_every_place_out_equally_often(ratio):
    masks = [running_cell_mask((8, 4, 6), ratio, phase) for phase in range(4)]
    for phase, mask in enumerate(masks):
        assert mask.sum((1, 2)).tolist() == [int(ratio * 24)] * 8
        for time in range(5):
            assert (mask[time : time + 4].sum(0) == 4 * ratio).all()
        assert torch.equal(masks[(phase + 1) % 4][:-1], mask[1:])  # a phase later is a time later
    drawn = {
        tuple(draw_running_cell_mask((8, 4, 6), ratio, torch.Generator().manual_seed(seed)).flatten().tolist())
        for seed in range(40)
    }
    assert drawn == {tuple(mask.flatten().tolist()) for mask in masks}


def test_masks_of_clips_that_cannot_be_are_refused():
    order = torch.arange(16)
    for ratio, said in ((0.01, "hides none of 16 places"), (1.0, "hides all of 16 places")):
        with pytest.raises(UsageError, match=said):
            tube_mask((2, 4, 4), ratio, order)
    with pytest.raises(UsageError, match="3x4 patches is odd"):
        running_cell_mask((2, 3, 4), 0.5, 0)
    for ratio in (0.1, 1.0):
        with pytest.raises(UsageError, match=r"leaves out 1, 2 or 3 of 4 patches, not"):
            running_cell_mask((2, 4, 4), ratio, 0)
    with pytest.raises(UsageError, match="phase is 4"):
        running_cell_mask((2, 4, 4), 0.5, 4)
    with pytest.raises(UsageError, match="grids of 3 axes, those of clips; a grid of 4x4 has 2"):
        draw_tube_mask((4, 4), 0.5, torch.Generator())
