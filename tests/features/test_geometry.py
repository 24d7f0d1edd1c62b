"""Figures of feature geometry against their formulas, written out, and on features made to have known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patchloom.features.geometry import (
    alignment,
    artifact_share,
    attention_entropy,
    covariance_effective_rank,
    position_leakage,
    uniformity,
)
from patchloom.features.representation import singular_value_effective_rank


def test_effective_rank_is_the_entropy_of_the_covariance_spectrum():
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 0.5, 0.1, 0.01], dtype=torch.float64)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))
    shares = values / values.sum()
    assert covariance_effective_rank(x) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_shares_of_variance_count_fewer_directions_than_those_of_singular_values():
    torch.manual_seed(0)
    x = torch.randn(40, 6).double() * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    values = torch.linalg.svdvals(x - x.mean(0))
    shares = (values / values.sum()).numpy()
    assert singular_value_effective_rank(values) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert covariance_effective_rank(x) == pytest.approx(singular_value_effective_rank(values.square()))
    assert covariance_effective_rank(x) < singular_value_effective_rank(values)


def test_effective_rank_at_its_ends():
    assert covariance_effective_rank(torch.ones(5, 3)) == 1.0
    assert covariance_effective_rank(torch.arange(5.0)[:, None] * torch.ones(3)) == pytest.approx(1.0)
    assert math.isnan(covariance_effective_rank(torch.full((3, 2), float("nan"))))


def test_alignment_and_uniformity_equal_their_formulas():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    assert alignment(x, y) == pytest.approx(float((u - v).square().sum(1).mean()))
    pairs = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(9) for j in range(9) if i != j]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)))


def test_attention_entropy_goes_from_one_patch_to_all():
    one, all_ = torch.zeros(1, 1, 16), torch.full((1, 1, 16), 0.03)
    one[0, 0, 3] = 0.4
    assert attention_entropy(torch.cat([one, all_], 1))[0].tolist() == pytest.approx([0.0, 1.0])


def test_artifact_share_counts_what_lies_far_outside():
    norms = 10 + torch.rand(50, 100)
    norms[:, :3] = 60
    assert artifact_share(norms) == pytest.approx(0.03)
    assert artifact_share(torch.full((4, 5), 2.0)) == 0.0


def test_place_is_read_where_it_is_written_and_nowhere_else():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    noise = torch.randn(8, 20, 6)
    written = torch.cat(
        [noise, (rows + 0.5).flatten().expand(8, 20)[..., None], columns.flatten().expand(8, 20)[..., None]], 2
    )
    assert position_leakage(written, (4, 5)) > 0.99
    assert position_leakage(torch.randn(40, 20, 6), (4, 5)) < 0.1
