"""Pairs, groups and leaks against loops over all pairs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchloom.curation import pairs
from patchloom.curation.pairs import groups_of, kept_of, leaks


def close_vectors(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(40, 6, generator=generator)
    return middles.repeat(3, 1) + 0.15 * torch.randn(120, 6, generator=generator)


def groups_by_hand(vectors: torch.Tensor, threshold: float) -> list[list[int]]:
    similar = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1) >= threshold
    left, found = set(range(len(vectors))), []
    while left:
        group, waiting = set(), [left.pop()]
        while waiting:
            number = waiting.pop()
            group.add(number)
            near = {other for other in left if similar[number, other]}
            left -= near
            waiting += near
        if len(group) > 1:
            found.append(sorted(group))
    return sorted(found, key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("block", [7, 32, 4096])
def test_groups_are_the_connected_pairs_whatever_the_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(pairs, "BLOCK", block)
    vectors = close_vectors()
    assert [group.tolist() for group in groups_of(vectors, 0.97)] == groups_by_hand(vectors, 0.97)
    assert len(groups_by_hand(vectors, 0.97)) > 5


def test_many_equal_images_are_one_group() -> None:
    vectors = torch.cat([torch.ones(600, 4), torch.eye(4)])
    assert [len(group) for group in groups_of(vectors, 0.99)] == [600]


def test_two_blocks_of_equal_images_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK", 16)  # 256 ties between two groups: as many as a byte holds, and none
    assert [len(group) for group in groups_of(torch.ones(32, 4), 0.99)] == [32]


def test_what_goes_is_close_to_what_stays_and_what_stays_is_not() -> None:
    angles = torch.linspace(0, 1.0, 11)  # a chain: neighbours are close, its ends are not
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    threshold = float(torch.tensor(0.15).cos())
    gone = kept_of(vectors, np.arange(11), np.arange(11.0), threshold)
    kept = sorted(set(range(11)) - gone.keys())
    similar = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert 10 in kept  # the best is never left out
    assert all(similar[number, instead] >= threshold and instead in kept for number, instead in gone.items())
    assert all(similar[a, b] < threshold for a in kept for b in kept if a != b)


@pytest.mark.parametrize("block", [5, 4096])
def test_leaks_are_the_nearest_above_the_threshold(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(pairs, "BLOCK", block)
    vectors, others = close_vectors(1)[:50], close_vectors(1)[40:]
    similar = F.cosine_similarity(vectors[:, None], others[None], dim=-1)
    expected = {n: int(similar[n].argmax()) for n in range(50) if similar[n].max() >= 0.99}
    found = leaks(vectors, others, 0.99)
    assert {image: other for image, other, _ in found} == expected
    assert [similarity for *_, similarity in found] == sorted((s for *_, s in found), reverse=True)
