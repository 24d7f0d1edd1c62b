"""What is excised and what hint is left: formulas in float64, and what the paper promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.errors import UsageError
from patchloom.systems.ear.excision import (
    apply_hint,
    estimate_mosaic_scale,
    excise,
    mosaic,
    row_quantile,
)


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("height", "width", "cell"), [(16, 16, 4), (17, 22, 5), (9, 30, 16), (5, 5, 8), (6, 7, 1)])
def test_a_mosaic_has_the_mean_of_each_cell_over_the_pixels_there_are(height, width, cell):
    images = drawn(2, 3, height, width)
    expected = images.clone()
    for top in range(0, height, cell):
        for left in range(0, width, cell):
            tile = images[..., top : top + cell, left : left + cell]
            expected[..., top : top + cell, left : left + cell] = tile.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(mosaic(images, cell), expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1))
def test_quantiles_are_those_of_torch_and_numpy(count, quantile):
    rows = drawn(3, count, seed=count)
    ours = row_quantile(rows, quantile)
    torch.testing.assert_close(ours[:, 0], torch.quantile(rows, quantile, dim=1), atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(ours[:, 0].numpy(), np.quantile(rows.numpy(), quantile, axis=1), atol=1e-12)


def test_quantiles_have_no_largest_size():
    assert float(row_quantile(torch.linspace(0, 1, 2**24 + 10)[None], 0.5)) == pytest.approx(0.5, abs=1e-6)


def test_the_mask_is_what_reaches_the_quantile_of_its_own_image():
    images, saliency = drawn(3, 3, 20, 24), drawn(3, 1, 20, 24, seed=1)
    mask = excise(images, saliency, 0.85)
    for one, found in zip(saliency.numpy(), mask.numpy(), strict=True):
        np.testing.assert_array_equal(found, one >= np.quantile(one, 0.85))
    assert float(mask.mean()) == pytest.approx(0.15, abs=0.01)
    alone = torch.cat([excise(images[i : i + 1], saliency[i : i + 1], 0.85) for i in range(3)])
    assert torch.equal(alone, mask)


def test_a_batch_wide_quantile_depends_on_the_batch():
    images, saliency = drawn(2, 3, 20, 24), drawn(2, 1, 20, 24, seed=1)
    saliency[1] *= 0.5
    mask = excise(images, saliency, 0.85, scope="batch")
    np.testing.assert_array_equal(mask.numpy(), saliency.numpy() >= np.quantile(saliency.numpy(), 0.85))
    assert not torch.equal(mask, excise(images, saliency, 0.85))


def test_other_rules_of_the_threshold():
    images, saliency = drawn(2, 3, 12, 12), drawn(2, 1, 12, 12, seed=1)
    assert torch.equal(excise(images, saliency, threshold=0.7), (saliency >= 0.7).double())
    values = saliency.numpy()
    limit = values.mean((1, 2, 3), keepdims=True) + 1.5 * values.std((1, 2, 3), keepdims=True)
    np.testing.assert_array_equal(excise(images, saliency, deviations=1.5).numpy(), values >= limit)
    with pytest.raises(UsageError, match="two rules"):
        excise(images, saliency, threshold=0.5, deviations=1)


def test_flat_saliency_excises_nothing_and_leaves_the_other_images_theirs():
    images, saliency = drawn(2, 3, 12, 12), drawn(2, 1, 12, 12, seed=1)
    saliency[0] = 0.3
    mask = excise(images, saliency)
    assert not mask[0].any()
    assert torch.equal(mask[1:], excise(images[1:], saliency[1:]))


@pytest.mark.parametrize("hint", ["mosaic", "empty", "blur"])
def test_a_hint_stands_in_the_excised_part_alone(hint):
    images, mask = drawn(2, 3, 20, 24), (drawn(2, 1, 20, 24, seed=1) > 0.7).double()
    given_ = apply_hint(images, mask, hint, 8)
    kept = mask.expand_as(images) == 0
    assert torch.equal(given_[kept], images[kept])
    if hint == "empty":
        assert not given_[~kept].any()
    elif hint == "mosaic":
        torch.testing.assert_close(given_[~kept], mosaic(images, 8)[~kept])
    else:
        assert 0 < float(given_[~kept].std()) < float(images[~kept].std())


def test_the_cell_is_the_largest_that_costs_less_than_half_of_the_coarsest():
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64)
    stripes = 0.5 + 0.4 * torch.sin(ramp * 2 * torch.pi * 8)
    images = stripes.expand(1, 3, 64, 64)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    cell, costs = estimate_mosaic_scale([(images, mask), (images, mask)])
    assert list(costs) == [4, 8, 16, 32]
    assert costs[cell] < 0.5 * costs[32]
    assert all(costs[larger] >= 0.5 * costs[32] for larger in costs if larger > cell)
    assert estimate_mosaic_scale([(images, mask)], [8])[0] == 8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, s: excise(x, s[:, :, :5]), "does not belong"),
        (lambda x, s: excise(x, s, 1.5), r"quantile is 1\.5"),
        (lambda x, s: excise(x, s, scope="world"), "scope"),
        (lambda x, s: mosaic(x, 0), "at least 1 pixel"),
        (lambda x, s: apply_hint(x, s, "noise"), "hint"),
        (lambda x, s: estimate_mosaic_scale([]), "there is none"),
    ],
)
def test_impossible_requests_are_refused(call, words):
    with pytest.raises(UsageError, match=words):
        call(drawn(1, 3, 12, 12), drawn(1, 1, 12, 12))
