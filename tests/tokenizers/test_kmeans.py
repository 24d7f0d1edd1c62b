"""k-means: Lloyd's algorithm by its definition, faiss's objective, empty clusters, blocks, ranks, and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.errors import UsageError
from patchloom.tokenizers import kmeans as module
from patchloom.tokenizers.kmeans import kmeans
from patchloom.tokenizers.points import PointsInMemory, PointsOnDisk

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 39 each.*")


def blobs(n: int = 900, d: int = 20, centres: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.rand(centres, d, generator=generator)
    which = torch.randint(0, centres, (n,), generator=generator)
    return middle[which] + 0.05 * torch.randn(n, d, generator=generator)


def lloyd64(points: torch.Tensor, centroids: torch.Tensor, iters: int) -> tuple[torch.Tensor, list[float]]:
    """Lloyd's algorithm in float64, by the definition; a cluster without points stays where it is."""
    points, centroids, objective = points.double(), centroids.double(), []
    for _ in range(iters):
        distance = (points[:, None] - centroids[None]).square().sum(2)
        least, assigned = distance.min(1)
        objective.append(float(least.sum()))
        centroids = torch.stack(
            [points[assigned == j].mean(0) if (assigned == j).any() else centroids[j] for j in range(len(centroids))]
        )
    return centroids, objective


@given(n=st.integers(30, 120), d=st.integers(1, 10), k=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_is_lloyds_algorithm(n, d, k, seed):
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    result = kmeans(points, k, iters=4, init=points[:k])
    if result.repaired:
        return
    centroids, objective = lloyd64(points, points[:k], 4)
    assert result.objective == pytest.approx(objective, rel=1e-5)
    torch.testing.assert_close(result.centroids, centroids.float(), rtol=1e-4, atol=1e-5)
    assert int(result.counts.sum()) == n


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_objective_falls_and_seed_decides(init):
    points = blobs()
    first = kmeans(points, 30, iters=8, seed=3, init=init)
    assert len(first.objective) == 8
    assert all(b <= a * (1 + 1e-6) for a, b in zip(first.objective, first.objective[1:], strict=False))
    again, other = (kmeans(points, 30, iters=8, seed=seed, init=init) for seed in (3, 4))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_plus_plus_starts_better_than_random():
    points = blobs(n=1500, d=16, centres=40)
    random = [kmeans(points, 40, iters=1, seed=seed).objective[0] for seed in range(5)]
    plus = [kmeans(points, 40, iters=1, seed=seed, init="kmeans++").objective[0] for seed in range(5)]
    assert np.mean(plus) < 0.8 * np.mean(random)


def test_plus_plus_draws_in_proportion_to_squared_distance():
    """Three points on a line, at 0, 1 and 3: after 0, the second is 3 in 9 of 10 draws."""
    points = torch.tensor([[0.0], [1.0], [3.0]])
    second = {0: [], 1: [], 3: []}
    for seed in range(600):
        drawn = module._plus_plus(points, 2, torch.Generator().manual_seed(seed))[:, 0].int().tolist()
        second[drawn[0]].append(drawn[1])
    shares = {first: np.mean([number == 3 for number in seconds]) for first, seconds in second.items()}
    assert shares[0] == pytest.approx(9 / 10, abs=0.08)
    assert shares[1] == pytest.approx(4 / 5, abs=0.1)


def test_agrees_with_faiss():
    faiss = pytest.importorskip("faiss")
    points = torch.rand(4000, 64, generator=torch.Generator().manual_seed(1))  # no empty clusters, no choice
    start = points[:80].clone()
    peer = faiss.Kmeans(64, 80, niter=10, max_points_per_centroid=10**7)
    peer.train(points.numpy(), init_centroids=start.numpy())
    result = kmeans(points, 80, iters=10, init=start)
    theirs = list(peer.obj)  # newer versions stop early
    assert result.objective[: len(theirs)] == pytest.approx(theirs, rel=1e-3)


def test_empty_clusters_take_half_of_a_big_one():
    points = blobs(n=600, d=8, centres=3)
    far = torch.full((5, 8), 50.0) + torch.arange(5.0)[:, None]
    result = kmeans(points, 8, iters=6, init=torch.cat([points[:3], far]))
    assert result.repaired >= 5
    assert (result.counts > 0).all()
    assert result.objective[-1] < result.objective[0]


def test_split_halves_follow_faiss():
    centroids = torch.tensor([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0]])
    counts, sums = torch.tensor([10.0, 0.0]).double(), torch.tensor([[10.0, 20.0, 40.0], [0, 0, 0]]).double()
    squares = torch.tensor([250.0, 0.0]).double()
    assert module._split_big_clusters(centroids, sums, counts, squares) == 1
    up, down = 1 + 1 / 1024, 1 - 1 / 1024
    torch.testing.assert_close(centroids[1], torch.tensor([1.0 * up, 2.0 * down, 4.0 * up]))
    torch.testing.assert_close(centroids[0], torch.tensor([1.0 * down, 2.0 * up, 4.0 * down]))


def test_empty_clusters_are_split_as_faiss_splits_them():
    """Thirty far-away centroids run empty: the same choices of what to split give the same centroids."""
    faiss = pytest.importorskip("faiss")
    points = torch.rand(4000, 32, generator=torch.Generator().manual_seed(1))
    start = torch.cat([points[:70], torch.arange(30.0)[:, None] + torch.full((30, 32), 50.0)])
    peer = faiss.Kmeans(32, 100, niter=1, max_points_per_centroid=10**7)
    peer.train(points.numpy(), init_centroids=start.numpy())
    result = kmeans(points, 100, iters=1, init=start)
    assert result.repaired == 30
    torch.testing.assert_close(result.centroids, torch.from_numpy(peer.centroids), rtol=1e-4, atol=1e-5)
    peer = faiss.Kmeans(32, 100, niter=6, max_points_per_centroid=10**7)
    peer.train(points.numpy(), init_centroids=start.numpy())
    assert kmeans(points, 100, iters=6, init=start).objective == pytest.approx(list(peer.obj), rel=1e-3)


def test_flat_black_patches_are_not_split_for_ever():
    """Nine of ten points are equal: halving their cluster could never fill another one."""
    points = torch.cat([torch.zeros(900, 6), torch.rand(100, 6)])
    start = torch.cat([torch.zeros(10, 6), points[-10:]])
    result = kmeans(points, 20, iters=10, init=start)
    assert (result.counts > 0).all()
    assert result.repaired < 40


def test_blocks_from_disk_equal_memory(tmp_path: Path, monkeypatch):
    points = torch.randint(0, 256, (3000, 48), dtype=torch.uint8)
    np.save(tmp_path / "points.npy", points.numpy())
    kwargs = {"iters": 4, "seed": 2}
    memory = kmeans(points.float() / 255, 20, **kwargs)
    disk = kmeans(tmp_path / "points.npy", 20, memory_mb=0, **kwargs)  # the least block: 1024 points
    assert torch.equal(memory.centroids, disk.centroids)
    assert memory.objective == pytest.approx(disk.objective, rel=1e-12)


def test_points_on_disk_reads_blocks_and_rows(tmp_path: Path):
    points = torch.rand(25, 3)
    np.save(tmp_path / "points.npy", points.numpy())
    source = PointsOnDisk(tmp_path / "points.npy")
    assert source.shape == (25, 3)
    assert torch.equal(torch.cat([block.clone() for block in source.blocks(10)]), points)
    wanted = torch.tensor([7, 0, 24, 7])
    assert torch.equal(source.take(wanted), points[wanted])
    assert torch.equal(PointsInMemory(points).take(wanted), points[wanted])


def test_threads_and_inference_mode_change_nothing():
    points = blobs(n=2000, d=100)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode(threads == 3):
                found.append(kmeans(points, 40, iters=4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].centroids, found[1].centroids)
    assert found[0].objective == found[1].objective


def test_stops_when_nothing_moves():
    points = blobs(n=300, d=4, centres=3)
    calls: list[int] = []
    result = kmeans(points, 3, iters=50, progress=lambda done, total, objective: calls.append(done))
    assert len(calls) < 50
    assert len(result.objective) == 50
    assert result.objective[-1] == result.objective[len(calls) - 1]


@pytest.mark.parametrize(
    ("points", "k", "message"),
    [
        (torch.rand(5, 3), 6, "k = 6 .* there are 5"),
        (torch.tensor([[0.0], [1.0], [-0.0], [1.0]]), 3, "k = 3 .* only 2 of the 4"),
        (torch.tensor([[0.0], [torch.nan], [2.0]]), 1, "NaN"),
        (torch.rand(5), 1, r"matrix \(n, d\)"),
        (torch.rand(5, 2), 0, "at least one cluster"),
    ],
)
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_refusals(points, k, message, init):
    with pytest.raises(UsageError, match=message):
        kmeans(points, k, init=init)


def test_refuses_a_start_that_does_not_fit():
    with pytest.raises(UsageError, match=r"shape \(2, 4\), not \(3, 4\)"):
        kmeans(torch.rand(10, 4), 2, init=torch.rand(3, 4))
    with pytest.raises(UsageError, match=r"did you mean kmeans\+\+"):
        kmeans(torch.rand(10, 4), 2, init="kmeans+")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("default")
def test_warns_of_few_points():
    with pytest.warns(UserWarning, match="fewer than 39 each"):
        kmeans(torch.rand(100, 4), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kmeans(torch.rand(117, 4), 3)


def _on_rank(rank: int, folder: str, init: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    points = blobs()
    mine = points[:400] if rank == 0 else points[400:]
    result = kmeans(mine, 25, iters=6, seed=5, init=init)
    torch.save({"centroids": result.centroids, "objective": result.objective}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_two_ranks_find_what_one_process_finds(tmp_path: Path, init: str):
    mp.spawn(_on_rank, args=(str(tmp_path), init), nprocs=2)
    alone = kmeans(blobs(), 25, iters=6, seed=5, init=init)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["centroids"], alone.centroids, rtol=1e-6, atol=1e-6)
        assert found["objective"] == pytest.approx(alone.objective, rel=1e-9)
