"""Figures of collapse: what they are on features whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.features.health import mean_pairwise_cosine, rankme, verdict


def draw(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_rankme_counts_directions_used_equally():
    assert rankme(torch.eye(7)) == pytest.approx(7, rel=1e-3)
    assert rankme(torch.cat([torch.eye(3), torch.eye(3)], 1)) == pytest.approx(3, rel=1e-3)


def test_rankme_of_one_direction_is_one():
    assert rankme(draw(50, 1) @ draw(1, 16)) == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_formula_of_the_paper():
    features = draw(40, 12)
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / np.abs(values).sum() + 1e-7
    assert rankme(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-10)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 30), dim=st.integers(1, 20), scale=st.floats(1e-3, 1e3))
def test_rankme_lies_between_one_and_the_full_rank_and_ignores_scale(n, dim, scale):
    features = draw(n, dim, seed=n * 31 + dim)
    rank = rankme(features)
    assert 1 - 1e-3 <= rank <= min(n, dim) * (1 + 1e-3)
    assert rankme(features * scale) == pytest.approx(rank, rel=1e-4)


def test_mean_cosine_is_the_mean_over_all_pairs():
    features = draw(30, 5) + 0.5
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    pairs = [float(unit[i] @ unit[j]) for i in range(30) for j in range(30) if i != j]
    assert mean_pairwise_cosine(features) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def test_mean_cosine_at_its_ends():
    assert mean_pairwise_cosine(torch.ones(4, 3)) == pytest.approx(1)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1)


def test_the_verdict_tells_collapse_from_health():
    random = draw(500, 64)
    assert "healthy" in verdict(rankme(random), mean_pairwise_cosine(random), 64)
    same = torch.ones(500, 64) + 1e-6 * random
    assert "collapsed" in verdict(rankme(same), mean_pairwise_cosine(same), 64)
    few = draw(500, 2) @ draw(2, 64) + 1e-3 * random
    assert "few directions" in verdict(rankme(few), mean_pairwise_cosine(few), 64)


def test_few_images_are_not_mistaken_for_collapse():
    assert "healthy" in verdict(9.0, 0.1, 768, images=10)


def test_features_that_are_not_finite_are_said_to_be_so():
    broken = draw(5, 4)
    broken[2, 1] = math.nan
    rank = rankme(broken)
    assert math.isnan(rank)
    assert "diverged" in verdict(rank, mean_pairwise_cosine(broken), 4)


RUNS = json.loads(Path(__file__).with_name("health_runs.json").read_text())
"""RankMe and mean cosine of held-out images of 32 pixels, before and after short runs, and of fresh encoders."""


@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
def test_recorded_runs_are_judged_as_they_were(run):
    start = None if run["start"] is None else tuple(run["start"])
    said = verdict(*run["end"], run["width"], run["images"], start=start, labelled=run["labelled"])
    assert ("have collapsed" in said) == run["collapsed"]
    assert ("healthy" in said) != run["collapsed"]


def test_what_was_so_before_training_is_no_collapse_by_it():
    assert "as they began" in verdict(1.5, 0.9995, 192, 500, start=(1.5, 0.9995))
    assert "have collapsed" in verdict(1.01, 0.99999, 192, 500, start=(1.5, 0.9995))
    assert "healthy, as nothing was lost, but use few" in verdict(2.5, 0.985, 192, 500, start=(2.6, 0.986))
    assert "may be collapsing" in verdict(2.5, 0.985, 192, 500, start=(30.0, 0.4))


def test_classes_may_gather_along_few_directions():
    assert "healthy" in verdict(2.2, 0.5, 192, 500, start=(30.0, 0.4), labelled=True)
    assert "may be collapsing" in verdict(2.2, 0.5, 192, 500, start=(30.0, 0.4))


def test_too_few_images_to_compare_are_no_collapse():
    assert "one image alone" in verdict(1.0, 1.0, 192, 1)
    assert "3 images are too few to say" in verdict(1.6, 0.4, 192, 3)
