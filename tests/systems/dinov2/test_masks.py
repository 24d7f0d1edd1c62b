"""DINOv2's masks: how many crops, how much of each, blocks, and the same on one process or two."""

from __future__ import annotations

import torch

from patchloom.systems.dinov2.masks import block_mask, draw_masks, mask_shares


def test_half_the_crops_are_masked_with_one_share_in_each_bin():
    shares = mask_shares(20, 0.5, (0.1, 0.5), torch.Generator().manual_seed(0))
    masked = shares[shares > 0].sort().values
    assert len(masked) == 10
    edges = torch.linspace(0.1, 0.5, 11, dtype=torch.float64)
    assert ((edges[:-1] <= masked) & (masked <= edges[1:])).all()
    other = mask_shares(20, 0.5, (0.1, 0.5), torch.Generator().manual_seed(1))
    assert not torch.equal(shares > 0, other > 0)  # the masked ones are shuffled among the crops


def test_an_odd_half_is_rounded_down():
    shares = mask_shares(6, 0.25, (0.1, 0.5), torch.Generator().manual_seed(0))
    assert int((shares > 0).sum()) == 1


def test_blocks_hide_at_most_what_was_asked_for_and_mostly_that():
    counts = []
    for seed in range(50):
        mask = block_mask((14, 14), 80, torch.Generator().manual_seed(seed))
        counts.append(int(mask.sum()))
        assert counts[-1] <= 80
    assert sum(counts) / len(counts) > 70


def test_masks_repeat_with_the_step_and_change_with_it():
    first, again, later = (draw_masks((8, 8), 4, seed=3, step=step) for step in (5, 5, 6))
    assert first.shape == (8, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_two_processes_hide_what_one_with_the_same_images_hides():
    whole = draw_masks((8, 8), 6, seed=0, step=2).view(2, 6, 8, 8)
    for rank in range(2):
        part = draw_masks((8, 8), 3, seed=0, step=2, rank=rank, world_size=2).view(2, 3, 8, 8)
        assert torch.equal(part, whole[:, 3 * rank : 3 * rank + 3])
