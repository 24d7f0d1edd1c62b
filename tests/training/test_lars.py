"""LARS against its update written out."""

from __future__ import annotations

import copy

import torch
from torch import nn

from patchloom.training.lars import Lars


def test_steps_are_the_formula():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(3).double())
    unused = nn.Parameter(torch.zeros(2, 2).double())
    optimizer = Lars([matrix, vector, unused], lr=0.3, momentum=0.9, weight_decay=0.1, trust=0.01)
    p, q = matrix.detach().clone(), vector.detach().clone()
    m, n = torch.zeros_like(p), torch.zeros_like(q)
    for step in range(3):
        matrix.grad, vector.grad = torch.full_like(p, 0.5 + step), torch.full_like(q, -1.0)
        unused.grad = torch.zeros_like(unused)
        g = matrix.grad + 0.1 * p
        m = 0.9 * m + g * 0.01 * p.norm() / g.norm()
        n = 0.9 * n + vector.grad
        p, q = p - 0.3 * m, q - 0.3 * n
        optimizer.step()
    torch.testing.assert_close(matrix.detach(), p)
    torch.testing.assert_close(vector.detach(), q)
    assert torch.equal(unused, torch.zeros(2, 2).double())  # nothing to divide by: no NaN


def test_a_closure_computes_the_gradients():
    weight = nn.Parameter(torch.ones(2, 2))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Lars([weight], lr=1.0).step(closure) == 4
    assert weight.max() < 1


def test_the_state_goes_through_a_checkpoint():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizers = [Lars([weight], lr=0.1) for weight in weights]
    for weight in weights:
        weight.grad = torch.ones(2, 2)
    optimizers[0].step()
    optimizers[0].step()
    optimizers[1].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    with torch.no_grad():
        weights[1].copy_(weights[0])
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    assert torch.equal(*weights)
