"""Logistic regression: the minimum scikit-learn finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from patchloom.evaluate import logistic
from patchloom.evaluate.logistic import fit_logistic


def clouds(n: int = 150, dim: int = 8, classes: int = 3, seed: int = 0):
    """Classes that overlap, in directions of very unequal variance."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    x = centres[y] + 1.5 * torch.randn(n, dim, generator=generator)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(98)) * torch.logspace(0, -2, dim)
    return (x @ mix + 5).double(), y


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("widest", [0, 4096], ids=["as they are", "in better coordinates"])
@pytest.mark.parametrize(("n", "dim"), [(150, 8), (30, 45)], ids=["more images", "more features"])
def test_it_is_scikit_learns_minimum(n, dim, c, widest, monkeypatch):
    monkeypatch.setattr(logistic, "WIDEST", widest)
    x, y = clouds(n, dim)
    found = fit_logistic(x, y, 3, c=c, tolerance=1e-9, max_iter=2000)
    scaled = StandardScaler().fit_transform(x.numpy())
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(scaled, y.numpy())
    np.testing.assert_allclose(found.weight.numpy(), reference.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose((found.bias - found.bias.mean()).numpy(), reference.intercept_, rtol=1e-3, atol=1e-5)
    assert (found.predict(x).numpy() == reference.predict(scaled)).all()


def test_better_coordinates_save_steps(monkeypatch):
    x, y = clouds()
    steps = {}
    for widest in (0, 4096):
        monkeypatch.setattr(logistic, "WIDEST", widest)
        steps[widest] = fit_logistic(x, y, 3, c=1.0, tolerance=1e-6).steps
    assert steps[4096] * 1.5 < steps[0]


def test_blocks_do_not_change_the_fit(monkeypatch):
    x, y = clouds()
    whole = fit_logistic(x, y, 3, c=0.1, tolerance=1e-8)
    monkeypatch.setattr(logistic, "MOST_LOGITS", 30)
    torch.testing.assert_close(fit_logistic(x, y, 3, c=0.1, tolerance=1e-8).weight, whole.weight, rtol=1e-4, atol=1e-6)


def test_another_penalty_is_a_good_start():
    x, y = clouds()
    near = fit_logistic(x, y, 3, c=0.9, tolerance=1e-7)
    cold, warm = (fit_logistic(x, y, 3, c=1.0, tolerance=1e-7, start=start) for start in (None, near))
    torch.testing.assert_close(cold.weight, warm.weight, rtol=1e-3, atol=1e-4)
    assert warm.steps < cold.steps


def test_constant_features_and_absent_classes_are_survived():
    x, y = clouds()
    x[:, 2] = 7
    found = fit_logistic(x.float(), 2 * y, 6, c=1.0)
    assert bool(found.weight.isfinite().all())
    assert set(found.predict(x.float()).tolist()) <= {0, 2, 4}


def test_more_features_than_images():
    x, y = clouds(n=12, dim=40)
    found = fit_logistic(x.float(), y, 3, c=1e4)
    assert torch.equal(found.predict(x.float()), y)


def test_a_limit_that_is_met_is_said():
    x, y = clouds()
    assert not fit_logistic(x, y, 3, c=10.0, max_iter=2, tolerance=1e-9).converged
    assert fit_logistic(x, y, 3, c=10.0).converged
