"""The sweep of penalties: scikit-learn's classifier at the penalty chosen, chosen without the test images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.evaluate.logistic import fit_logistic
from patchloom.evaluate.logistic_config import CHOICES
from patchloom.evaluate.target import EvaluationConfig, labelled_features
from small_images import QUICK, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {"train": str(write_images(root / "train", 20)), "test": str(write_images(root / "test", 8, seed=1))}


SMALL = {"encoder": "pixels", "image_size": 4, **QUICK}


def test_the_strengths_are_the_published_ones():
    assert len(CHOICES) == 45
    assert (CHOICES[0], CHOICES[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    np.testing.assert_allclose(np.diff(np.log10(CHOICES)), 0.25)


@pytest.mark.parametrize("c", [1e-2, 1.0])
def test_without_standardising_it_is_scikit_learns_minimum_too(c):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = (torch.randn(3, 6, generator=generator)[y] + torch.randn(90, 6, generator=generator)).double() + 2
    found = fit_logistic(x, y, 3, c=c, tolerance=1e-9, max_iter=2000, standardise=False)
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(found.weight.numpy(), reference.coef_, rtol=1e-3, atol=1e-5)
    assert (found.predict(x).numpy() == reference.predict(x.numpy())).all()


def test_it_is_scikit_learn_at_the_chosen_strength(data):
    found = pl.evaluate("logistic", **SMALL, **data)
    train, test, _ = labelled_features(EvaluationConfig(**SMALL, **data))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    held, kept = order[:6], order[6:]
    x, y = train.vectors.double().numpy(), train.labels.numpy()

    def fitted(c, part):
        return LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x[part], y[part])

    for one in found["tried"][::6]:
        share = (fitted(one["c"], kept.numpy()).predict(x[held]) == y[held]).mean()
        assert one["validation"] == pytest.approx(share, abs=1 / 6 + 1e-9)  # a rough fit may differ in one image
    best = max(one["validation"] for one in found["tried"])
    assert found["c"] == next(one["c"] for one in found["tried"] if one["validation"] == best)
    said = fitted(found["c"], slice(None)).predict(test.vectors.double().numpy())
    assert found["accuracy"] == pytest.approx((said == test.labels.numpy()).mean(), abs=1 / 24 + 1e-9)


def test_the_penalty_is_chosen_on_what_is_given(data, tmp_path):
    val = str(write_images(tmp_path / "val", 5, seed=4))
    found = pl.evaluate("logistic", val=val, cs=(0.01, 1.0), **SMALL, **data)
    assert found["selected_on"] == val
    assert [one["c"] for one in found["tried"]] == [0.01, 1.0]
    assert pl.evaluate("logistic", cs=(0.1,), standardise=True, **SMALL, **data)["c"] == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"cs": ()}, "cs is"), ({"cs": (1.0, 0.1)}, "none is below the one before"), ({"max_iter": 0}, "max_iter is 0")],
)
def test_what_cannot_be_is_refused(settings, message, data):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("logistic", **{**SMALL, **data, **settings})
