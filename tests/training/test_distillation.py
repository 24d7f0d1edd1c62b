"""Losses on logits against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.training.distillation import (
    channel_wise_distillation,
    hard_distillation_loss,
    kd_loss,
    logit_kl_loss,
    nkd_loss,
    soft_distillation_loss,
)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def test_hard_labels(pair):
    s, t = pair
    expected = [-math.log(softmax(a.tolist())[max(range(6), key=b.tolist().__getitem__)]) for a, b in zip(s, t)]  # noqa: B905
    assert float(hard_distillation_loss(s, t)) == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_soft_answers(pair):
    s, t = pair
    tau = 2.0
    rows = [(softmax((a / tau).tolist()), softmax((b / tau).tolist())) for a, b in zip(s, t, strict=True)]
    cross = sum(-sum(q * math.log(p) for p, q in zip(*row, strict=True)) for row in rows) / 4
    assert float(kd_loss(s, t, temperature=tau)) == pytest.approx(0.5 * tau**2 * cross)
    divergence = sum(sum(q * math.log(q / p) for p, q in zip(*row, strict=True)) for row in rows)
    assert float(soft_distillation_loss(s, t, tau)) == pytest.approx(divergence * tau**2 / 24)
    assert float(logit_kl_loss(s, t, tau)) == pytest.approx(divergence * tau**2 / 24)


def test_normalised_distillation(pair):
    s, t = pair
    target = torch.tensor([2, 0, 5, 3])
    soft = distributed = 0.0
    for a, b, y in zip(s.tolist(), t.tolist(), target.tolist(), strict=True):
        soft -= softmax(b)[y] * math.log(softmax(a)[y]) / 4
        others = [c for c in range(6) if c != y]
        p, q = softmax([a[c] for c in others]), softmax([b[c] for c in others])
        distributed -= sum(x * math.log(z) for z, x in zip(p, q, strict=True)) / 4
    assert float(nkd_loss(s, t, target)) == pytest.approx(soft + distributed)
    shares = torch.nn.functional.one_hot(target, 6) * 0.9 + 0.1 / 6
    assert float(nkd_loss(s, t, shares)) == pytest.approx(soft + distributed)


def test_channel_wise_is_where_and_not_what():
    torch.manual_seed(1)
    s, t = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    total = 0.0
    for n in range(2):
        for c in range(3):
            p, q = softmax(s[n, c].flatten().tolist()), softmax(t[n, c].flatten().tolist())
            total -= sum(x * math.log(z) for z, x in zip(p, q, strict=True))
    assert float(channel_wise_distillation(s, t, weight=3.0)) == pytest.approx(3 * total / 6)
    entropy = -(t.flatten(2).softmax(2) * t.flatten(2).log_softmax(2)).sum() / 6
    assert float(channel_wise_distillation(t, t)) == pytest.approx(float(entropy))
    with pytest.raises(UsageError, match="differ"):
        channel_wise_distillation(s, t[:, :2])


def test_teachers_get_no_gradient(pair):
    s, t = (x.clone().requires_grad_(True) for x in pair)
    loss = kd_loss(s, t) + soft_distillation_loss(s, t) + nkd_loss(s, t, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert t.grad is None
    assert s.grad.any()
