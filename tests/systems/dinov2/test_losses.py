"""DINO, iBOT, KoLeo, centring and Sinkhorn-Knopp against their formulas in float64, and on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.dinov2.losses import (
    SoftmaxCentering,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
    soft_cross_entropy,
)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_dino_loss_is_the_sum_over_pairs_of_crops():
    student, teacher = draw(3, 5, 7), draw(2, 5, 7, seed=1).softmax(-1)
    expected = 0.0
    for s in student.numpy():
        for t in teacher.numpy():
            expected += -(t * log_softmax(s / 0.1)).sum(-1).mean()
    assert float(dino_loss(list(student), teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(dino_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_ibot_loss_weighs_images_alike_and_counts_those_without_mask():
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[0, 1], masks[2, :3], masks[3, 2:4] = True, True, True
    student, teacher = draw(6, 9), draw(6, 9, seed=1).softmax(-1)
    ce = -(teacher.numpy() * log_softmax(student.numpy() / 0.1)).sum(-1)
    expected = (ce[0] + ce[1:4].mean() + ce[4:6].mean()) / 4
    assert float(ibot_loss(student, teacher, masks)) == pytest.approx(expected, rel=1e-12)
    assert float(ibot_loss(student, teacher, masks.view(4, 2, 3))) == pytest.approx(expected, rel=1e-12)


def test_ibot_loss_of_nothing_masked_is_zero_with_a_gradient():
    student = torch.zeros(0, 9, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 9), torch.zeros(2, 6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None


def test_the_gradient_of_the_soft_cross_entropy_is_the_right_one():
    logits, targets, weights = draw(3, 4, 6).requires_grad_(), draw(4, 6, seed=1).exp(), draw(4, seed=2).abs()
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets, weights, 0.3), (logits,))
    ours = torch.autograd.grad(5 * soft_cross_entropy(logits, targets, weights, 0.3), logits)[0]
    plain = -(weights[:, None] * targets * (logits / 0.3).log_softmax(-1)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(5 * plain, logits)[0])


def test_losses_of_halves_are_computed_in_float():
    student, teacher = draw(2, 4, 8, scale=50), draw(1, 4, 8, seed=1).softmax(-1).float()
    half = student.to(torch.bfloat16).requires_grad_()
    loss = dino_loss(half, teacher)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(dino_loss(half.detach().double(), teacher.double())), rel=1e-4)
    loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_koleo_is_the_log_distance_to_the_nearest_neighbour():
    x = draw(6, 4)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    distances = np.linalg.norm(unit - unit[similarity.argmax(1)] + 1e-8, axis=1)
    assert float(koleo_loss(x)) == pytest.approx(-np.log(distances + 1e-8).mean(), rel=1e-12)


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_koleo_of_several_neighbours_is_the_mean_over_them(topk):
    x = draw(6, 4)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    logs = [
        np.log(np.linalg.norm(unit[i] - unit[j] + 1e-8) + 1e-8)
        for i in range(6)
        for j in np.argsort(-similarity[i])[:topk]
    ]
    assert float(koleo_loss(x, topk=topk)) == pytest.approx(-np.mean(logs), rel=1e-12)
    # One process is all of them.
    assert float(koleo_loss(x, topk=topk, across_processes=True)) == pytest.approx(-np.mean(logs), rel=1e-12)
    with pytest.raises(UsageError, match="at least 7 images per process for 6 neighbours, and has 6"):
        koleo_loss(x, topk=6)
    with pytest.raises(UsageError, match="groups of 4 features do not fit 6"):
        koleo_loss(x, across_processes=True, group_size=4)


def test_koleo_pushes_both_neighbours_apart():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    koleo_loss(x).backward()
    assert x.grad is not None
    assert x.grad[0, 1] > 0 > x.grad[1, 1]  # descent moves them along -grad


def test_koleo_of_one_image_is_refused():
    with pytest.raises(UsageError, match="at least 2 images per process; raise batch_size, or set koleo_weight=0"):
        koleo_loss(torch.randn(1, 4))


def sinkhorn_by_hand(z: np.ndarray, tau: float, rounds: int) -> np.ndarray:
    q = np.exp(z / tau).T
    k, b = q.shape
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True)
        q /= k
        q /= q.sum(0, keepdims=True)
        q /= b
    return (q * b).T


@pytest.mark.parametrize("rounds", [1, 3])
def test_sinkhorn_is_the_published_iteration(rounds):
    z = draw(10, 6, scale=0.2)
    expected = sinkhorn_by_hand(z.numpy(), 0.07, rounds)
    np.testing.assert_allclose(sinkhorn_knopp(z, 0.07, n_iterations=rounds).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(sinkhorn_knopp(z, 0.07, 10, rounds).numpy(), expected, rtol=1e-10)


def test_sinkhorn_balances_prototypes_and_survives_large_logits():
    q = sinkhorn_knopp(draw(64, 8, scale=0.3), 0.1, n_iterations=50)
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0, dtype=torch.float64))
    extreme = sinkhorn_knopp(draw(16, 8, scale=100).to(torch.bfloat16), 0.04)
    assert torch.isfinite(extreme).all()
    assert sinkhorn_knopp(torch.zeros(0, 8), 0.04).shape == (0, 8)


def test_sinkhorn_leaves_its_argument_alone():
    z = draw(4, 6)
    before = z.clone()
    sinkhorn_knopp(z, 1.0)
    assert torch.equal(z, before)


def test_centring_uses_the_centre_of_the_calls_before():
    centering = SoftmaxCentering(5, momentum=0.8).double()
    center = np.zeros(5)
    for seed in range(3):
        z = draw(4, 5, seed=seed)
        expected = np.exp(log_softmax((z.numpy() - center) / 0.05))
        np.testing.assert_allclose(centering(z, 0.05).numpy(), expected, rtol=1e-10)
        center = 0.8 * center + 0.2 * z.numpy().mean(0)
        np.testing.assert_allclose(centering.center[0].numpy(), center, rtol=1e-12)
    centering.eval()
    centering(draw(4, 5), 0.05)
    np.testing.assert_allclose(centering.center[0].numpy(), center, rtol=1e-12)


def test_centring_without_rows_keeps_the_centre():
    centering = SoftmaxCentering(5)
    centering.center.fill_(2.0)
    assert centering(torch.zeros(0, 5), 0.05).shape == (0, 5)
    assert (centering.center == 2).all()


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from patchloom.systems.dinov2.losses import SoftmaxCentering, koleo_loss, sinkhorn_knopp

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
z = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
mine = z[:7] if rank == 0 else z[7:]
q = sinkhorn_knopp(mine, 0.07)
centering = SoftmaxCentering(6).double()
centering(mine, 0.07)
rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
own = rows.chunk(2)[rank].clone().requires_grad_()
far = koleo_loss(own, topk=2, across_processes=True)
near = koleo_loss(own, topk=2, across_processes=True, group_size=4)
far.backward()
mean = far.detach().clone()
dist.all_reduce(mean)
dist.destroy_process_group()
together = rows.clone().requires_grad_()
koleo_loss(together, topk=2).backward()
torch.testing.assert_close(mean / 2, koleo_loss(rows, topk=2))
torch.testing.assert_close(own.grad / 2, together.grad.chunk(2)[rank])
torch.testing.assert_close(near, koleo_loss(own, topk=2))
whole = sinkhorn_knopp(z, 0.07)
torch.testing.assert_close(q, whole[:7] if rank == 0 else whole[7:])
torch.testing.assert_close(centering.center[0], 0.1 * z.mean(0))
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
