"""A balanced choice: equal shares, and rare images beside common ones."""

import numpy as np
import torch

from patchloom.curation.curate import Level, balanced, effective, hierarchy, shares


def test_rare_kinds_are_chosen_as_often_as_common_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = 10 * torch.eye(5)
    counts = [1000, 60, 60, 60, 60]
    drawn = [torch.randn(count, 5, generator=generator) for count in counts]
    vectors = torch.cat([middle + 0.5 * noise for middle, noise in zip(middles, drawn, strict=True)])
    kind = np.repeat(np.arange(5), counts)
    levels = hierarchy(vectors, (100, 5), seed=1, device="cpu")
    chosen = balanced(levels, 200, seed=0)
    assert len(np.unique(chosen)) == 200
    found = np.bincount(kind[chosen], minlength=5)
    assert found.min() >= 30  # at random about 9 of each rare kind
    assert (balanced(levels, 200, seed=0) == chosen).all()


def test_a_level_without_enough_images_hands_its_share_on() -> None:
    levels = [
        Level(torch.zeros(4, 1), np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])),
        Level(torch.zeros(2, 1), np.array([0, 0, 1, 1])),
    ]
    chosen = balanced(levels, 8, seed=0)
    assert len(chosen) == 8
    assert {0, 1, 2} <= set(chosen.tolist())  # the first cluster of the top holds three, fewer than its share of four


def test_shares_are_equal_but_for_what_is_not_there() -> None:
    generator = np.random.default_rng(0)
    assert shares(np.array([0, 1, 9, 9]), 11, generator).tolist() == [0, 1, 5, 5]
    assert shares(np.array([2, 2]), 9, generator).tolist() == [2, 2]
    assert sorted(shares(np.array([9, 9, 9]), 10, generator).tolist()) == [3, 3, 4]


def test_effective_number_of_clusters() -> None:
    assert abs(effective(np.array([5, 5, 5, 0])) - 3) < 1e-9
    assert effective(np.array([10, 1])) < 2
