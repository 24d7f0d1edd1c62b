"""What an attack makes small, against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.dta.losses import average_token_cosine, feature_distance, feature_norm, flat_cosine, similarity


def features(seed: int, shape: tuple[int, ...] = (3, 6, 5)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "kept"), [("all", range(6)), ("patches", range(2, 6)), ("cls", range(1))])
def test_the_mean_of_the_cosines_of_tokens(tokens, kept):
    a, b = features(0), features(1)
    expected = [
        sum(float(a[i, t] @ b[i, t]) / (float(a[i, t] @ a[i, t]) * float(b[i, t] @ b[i, t])) ** 0.5 for t in kept)
        / len(kept)
        for i in range(3)
    ]
    found = average_token_cosine(a, b, tokens=tokens, num_prefix=2)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert average_token_cosine(a.float(), b.float(), tokens, 2).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_token_of_no_length_counts_as_one_of_eps():
    a, b = features(0), features(1)
    a[:, 0] = 0
    a[:, 1] *= 1e-9
    unit = b[:, 1] / b[:, 1].norm(dim=-1, keepdim=True)
    small = (a[:, 1] / 1e-8 * unit).sum(-1)
    rest = average_token_cosine(a[:, 2:], b[:, 2:])
    assert torch.allclose(average_token_cosine(a, b), (0 + small + 4 * rest) / 6, atol=1e-12)


def test_the_cosine_of_all_features_as_one_vector():
    a, b = features(0, (2, 3, 4, 4)), features(1, (2, 3, 4, 4))
    expected = [(x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt() for x, y in zip(a, b, strict=True)]
    assert torch.allclose(flat_cosine(a, b), torch.stack(expected), atol=1e-12)


def test_distance_and_length_and_their_signs():
    a, b = features(0), features(1)
    distance = (a - b).square().sum((1, 2)).sqrt()
    assert torch.allclose(feature_distance(a, b), distance, atol=1e-12)
    assert torch.allclose(feature_norm(a), a.square().sum((1, 2)).sqrt(), atol=1e-12)
    assert torch.equal(similarity(a, b, "l2"), -feature_distance(a, b))
    assert torch.equal(similarity(a, b, "norm"), -feature_norm(a))
    assert torch.equal(similarity(a, b, "tokens", "cls", 1), average_token_cosine(a, b, "cls", 1))


def test_half_precision_is_compared_in_single():
    a, b = features(0).bfloat16(), features(1).bfloat16()
    assert average_token_cosine(a, b).dtype == torch.float32
    assert torch.allclose(average_token_cosine(a, b), average_token_cosine(a.float(), b.float()))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: average_token_cosine(features(0), features(0)[:2]), "cannot be compared"),
        (lambda: average_token_cosine(features(0), features(1), tokens="cls", num_prefix=0), "no class token"),
        (lambda: average_token_cosine(features(0), features(1), tokens="patch"), "unknown tokens"),
        (lambda: average_token_cosine(features(0), features(1), tokens="patches", num_prefix=6), "none is left"),
        (lambda: similarity(features(0), features(1), "cosine"), "unknown similarity"),
    ],
)
def test_bad_features_are_refused(call, said):
    with pytest.raises(UsageError, match=said):
        call()
