"""Codes that follow by moving averages, against the formula; k-means on the sphere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchloom.systems.beit.quantizer import EMAVectorQuantizer, spherical_kmeans


def quantizer(codes: int = 7, dim: int = 3, **settings: float) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    return EMAVectorQuantizer(codes, dim, kmeans_init=False, **settings)


def vectors(count: int = 20, dim: int = 3) -> torch.Tensor:
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(1))


def test_a_step_moves_each_code_to_the_mean_of_its_vectors_and_leaves_the_others():
    made, z = quantizer(decay=0.9, beta=0.5), vectors(4)
    table = made.embedding.weight.double().clone()
    out = made.train()(z)
    unit = [v / v.norm() for v in z.double().flatten(0, 1)]
    ids = [int(((v - table) ** 2).sum(1).argmin()) for v in unit]
    assert out.ids.flatten().tolist() == ids
    assert 0 < len(set(range(7)) - set(ids)) < 7
    expected = table.clone()
    for code in set(ids):
        mine = [v for v, found in zip(unit, ids, strict=True) if found == code]
        mean = sum(mine) / len(mine)  # type: ignore[operator]
        moved = 0.9 * table[code] + 0.1 * mean / mean.norm()
        expected[code] = moved / moved.norm()
    torch.testing.assert_close(made.embedding.weight.double(), expected, atol=1e-6, rtol=0)
    counts = torch.tensor([ids.count(code) for code in range(7)])
    torch.testing.assert_close(made.cluster_size, 0.1 * counts)
    # What comes out, and the loss, are of the codes before they moved.
    torch.testing.assert_close(out.z_q.flatten(0, 1).double(), table[ids], atol=1e-6, rtol=0)
    error = torch.stack([(v - table[code]) ** 2 for v, code in zip(unit, ids, strict=True)]).mean()
    assert float(out.loss) == pytest.approx(0.5 * float(error), rel=1e-5)


def test_nothing_moves_or_is_counted_in_eval_mode_unless_it_is_asked_for():
    made, z = quantizer().eval(), vectors()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(z)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.counts_in_eval = True
    ids = made(z).ids
    torch.testing.assert_close(made.cluster_size, 0.01 * torch.bincount(ids.flatten(), minlength=7).float())
    assert torch.equal(made.embedding.weight, before["embedding.weight"])
    made.train().follows = False
    made(z)
    assert torch.equal(made.embedding.weight, before["embedding.weight"])


def test_gradients_go_back_through_the_normalisation():
    made, z = quantizer().eval(), vectors().requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((made(z).z_q * weight).sum(), z)
    (expected,) = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), z)
    torch.testing.assert_close(gradient, expected)


def test_kmeans_finds_groups_of_directions():
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 6, generator=g), dim=1)
    points = F.normalize(centres.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 6, generator=g), dim=1)
    torch.manual_seed(1)
    means, sizes = spherical_kmeans(points, 12)
    assert float((points @ means.T).amax(1).min()) > 0.97
    assert int(sizes.sum()) == 200
    torch.testing.assert_close(means.norm(dim=1), torch.ones(12))


def test_the_first_batch_sets_the_codes_once():
    torch.manual_seed(0)
    made = EMAVectorQuantizer(5, 3).train()
    made(vectors())
    assert made.embedding.initted
    first = made.embedding.weight.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    made(vectors())
    assert float((made.embedding.weight * first).sum(1).min()) > 0.99


def test_fewer_vectors_than_codes_are_warned_of(capsys):
    torch.manual_seed(0)
    made = EMAVectorQuantizer(50, 3).train()
    made(vectors(4))
    assert "8 patches for 50 codes" in capsys.readouterr().err


def test_vectors_without_direction_make_no_nan():
    made = quantizer(codes=1).train()
    made(torch.tensor([[[1.0, 0, 0], [-1.0, 0, 0], [0, 0, 0]]]))
    assert torch.isfinite(made.embedding.weight).all()


def _on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    made = quantizer().train()
    made(vectors()[rank])
    torch.manual_seed(rank)  # the codes of both start from the first one's draw all the same
    started = EMAVectorQuantizer(5, 3).train()
    started(vectors()[rank])
    torch.save([made.embedding.weight, made.cluster_size, started.embedding.weight], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_codes_of_two_processes_follow_the_vectors_of_both(tmp_path):
    torch.multiprocessing.spawn(_on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = quantizer().train()
    alone(vectors())
    torch.testing.assert_close(first[0], alone.embedding.weight)
    torch.testing.assert_close(first[1], alone.cluster_size)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
