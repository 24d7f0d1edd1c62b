"""Nearest-centroid search: the exact answer whatever the rank, the chunk, the guess and the user's precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.errors import UsageError
from patchloom.tokenizers.nearest import NearestCentroids


def photographs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Smooth patches with a flat dark share: what image patches look like to the search."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.exp(-torch.arange(d) / 10.0)
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    points = (torch.randn(n, d, generator=generator) * decay) @ mixing
    points[: n // 10] *= 1e-3
    return points


def nearest64(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and all squared distances in float64, by the definition."""
    distance = (points.double()[:, None] - centroids.double()[None]).square().sum(2)
    return distance.argmin(1), distance


@pytest.mark.parametrize("kind", ["photographs", "gaussian"])
@pytest.mark.parametrize("rank", [None, 1, 32, 128])
def test_agrees_with_float64(kind, rank, monkeypatch):
    monkeypatch.setattr("patchloom.tokenizers.nearest._WORTH_CHOOSING", 0)
    points = photographs(700, 128) if kind == "photographs" else torch.randn(700, 128)
    centroids = points[:150] + 0.01 * torch.randn(150, 128)
    ids = NearestCentroids(centroids, rank=rank, basis=torch.eye(128)).search(points)
    expected, distance = nearest64(points, centroids)
    here, best = distance.gather(1, ids[:, None])[:, 0], distance.gather(1, expected[:, None])[:, 0]
    assert (ids == expected).float().mean() > 0.99
    assert torch.all(here <= best * (1 + 1e-5) + 1e-12)  # a difference is a tie in float32


@given(
    n=st.integers(1, 60),
    k=st.integers(1, 90),
    d=st.integers(1, 12),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    rank=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_ties_take_the_lowest_index(n, k, d, levels, seed, rank):
    """On a coarse grid of values float32 distances are exact and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, levels + 1, (n, d), generator=generator).float()
    centroids = torch.randint(0, levels + 1, (k, d), generator=generator).float()
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    guess = torch.randint(0, k, (n,), generator=generator)
    search = NearestCentroids(centroids, rank=rank, basis=basis)
    expected = nearest64(points, centroids)[0]  # argmin: the first of equals
    assert torch.equal(search.search(points), expected)
    assert torch.equal(search.search(points, guess), expected)


def test_result_does_not_depend_on_rank_batch_or_guess(monkeypatch):
    monkeypatch.setattr("patchloom.tokenizers.nearest._WORTH_CHOOSING", 0)
    points = photographs(1500, 192)
    centroids = points[torch.randperm(1500)[:300]]
    chosen = NearestCentroids(centroids)
    ids = chosen.search(points)
    assert chosen.rank < 192, "screening should pay on such points"
    full = NearestCentroids(centroids, rank=192)
    assert torch.equal(full.search(points), ids)
    assert torch.equal(torch.cat([full.search(part) for part in points.split(37)]), ids)
    assert torch.equal(chosen.search(points, torch.randint(0, 300, (1500,))), ids)


def test_uint8_stands_for_fractions_of_255():
    points = torch.randint(0, 256, (300, 48), dtype=torch.uint8)
    centroids = torch.rand(70, 48)
    search = NearestCentroids(centroids)
    assert torch.equal(search.search(points), search.search(points.float() / 255))


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_reduced_precision_of_the_user_is_left_out(precision):
    points = photographs(300, 64)
    centroids = points[:100] + 1e-3 * torch.randn(100, 64)
    search = NearestCentroids(centroids)
    expected = search.search(points)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(NearestCentroids(centroids).search(points), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_far_outlier_among_the_centroids_changes_nothing():
    points = photographs(400, 96)
    centroids = torch.cat([points[:80], torch.full((1, 96), 1e4)])
    ids = NearestCentroids(centroids, rank=32, basis=torch.eye(96)).search(points)
    assert torch.equal(ids, nearest64(points, centroids)[0])


def test_a_point_with_nan_is_out_of_range():
    points = torch.rand(5, 8)
    points[2, 3] = torch.nan
    ids = NearestCentroids(torch.rand(9, 8)).search(points)
    assert ids[2] == 9
    assert (ids[[0, 1, 3, 4]] < 9).all()


@pytest.mark.parametrize("bad", [torch.tensor([[0.0, torch.nan]]), torch.tensor([[torch.inf]]), torch.rand(3)])
def test_refuses_unusable_centroids(bad):
    with pytest.raises(UsageError, match="centroids"):
        NearestCentroids(bad)


@pytest.mark.parametrize("threads", [1, 2])
def test_inference_mode_comes_and_goes(threads):
    points = photographs(600, 64)
    search = NearestCentroids(points[:100])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            inside = search.search(points * 1)
        assert torch.equal(search.search(points), inside)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
