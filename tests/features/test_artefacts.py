"""Artefacts of patch features: each figure on features that have them by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoders_for_tests import tiny
from patchloom.errors import UsageError
from patchloom.features.artefacts import (
    artefact_verdict,
    constant_image_pattern,
    dense_features,
    find_artefacts,
    norm_outliers,
    position_explained_variance,
    position_mutual_information,
    shift_consistency,
    stride_of,
)

CLEAN = {
    "norm_outliers": 0.0,
    "artifact_share": 0.0,
    "position_explained_variance": 0.02,
    "position_leakage": 0.1,
    "constant_image_pattern": 0.05,
    "shift_consistency": 0.97,
}


def mixture(share: float, n: int = 60, seed: int = 0) -> torch.Tensor:
    """Features of which a share of the variance is a pattern of places."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(1, 6, 5, 40, generator=generator)
    content = torch.randn(n, 6, 5, 40, generator=generator)
    return share**0.5 * place + (1 - share) ** 0.5 * content + 3


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_the_share_of_place_is_found(share):
    assert position_explained_variance(mixture(share)) == pytest.approx(share, abs=0.03)


def test_the_share_of_place_is_that_of_the_formula_channel_by_channel():
    x = mixture(0.3, n=7).double().numpy().reshape(7, 30, 40)
    chance = (30 - 1) / (7 * 30 - 1)
    shares, weights = [], []
    for c in range(40):
        whole = x[..., c].var()
        shares.append((x[..., c].mean(0).var() / whole - chance) / (1 - chance))
        weights.append(whole)
    expected = np.average(shares, weights=weights)
    assert position_explained_variance(mixture(0.3, n=7)) == pytest.approx(expected, abs=1e-9)


def test_place_cannot_be_told_from_content_in_one_image():
    with pytest.raises(UsageError, match="1 image is too few"):
        position_explained_variance(torch.randn(1, 3, 3, 4))
    with pytest.raises(UsageError, match="give \\(images, height, width, channels\\)"):
        norm_outliers(torch.randn(3, 4))


def test_components_that_follow_the_place_tell_of_it():
    rows = torch.arange(6.0).view(1, 6, 1, 1).expand(8, 6, 6, 4)
    noise = torch.randn(8, 6, 6, 4, generator=torch.Generator().manual_seed(0))
    assert position_mutual_information(rows + 0.1 * noise, 1) > 0.5
    assert position_mutual_information(noise, 2) < 0.1


def test_outliers_stand_out_by_their_norm():
    features = torch.randn(10, 10, 10, 64, generator=torch.Generator().manual_seed(0))
    assert norm_outliers(features) < 0.003
    features[:, 2, 3] *= 5
    features[:, 7, 1] *= 5
    assert norm_outliers(features) == pytest.approx(0.02, abs=0.003)
    assert norm_outliers(torch.ones(2, 3, 3, 4)) == 0


def test_a_pattern_where_there_is_nothing_to_see_is_a_share_of_the_features():
    assert constant_image_pattern(torch.ones(4, 4, 8)) == 0
    halves = torch.zeros(4, 4, 2)
    halves[:, :2, 0] = 1
    halves[:, 2:, 1] = 1
    assert constant_image_pattern(halves) == pytest.approx(0.5**0.5)


def test_content_that_moves_along_is_like_itself():
    world = torch.randn(3, 9, 9, 8)
    assert shift_consistency(world[:, :7, :7], world[:, 2:, 2:], 2) == pytest.approx(1)
    assert shift_consistency(world[:, :7, :7], world[:, :7, :7], 2) < 0.5
    with pytest.raises(UsageError, match="leaves nothing"):
        shift_consistency(world, world, 9)


@pytest.mark.parametrize("kind", ["vit_registers", "eva_rotary", "beit_shared"])
def test_an_encoder_is_looked_at_in_two_places(kind):
    encoder = tiny(kind)
    assert stride_of(encoder) == (4, 4)
    images = torch.randn(5, 3, 20, 20)
    found = find_artefacts(dense_features(encoder), images, (16, 16), (4, 4), batch_size=2)
    assert set(found.figures) == set(CLEAN)
    assert found.features.shape == (5, 4, 4, 32)
    with torch.no_grad():
        one, other = (dense_features(encoder)(part) for part in (images[..., :16, :16], images[..., 4:, 4:]))
        empty = dense_features(encoder)(torch.zeros(1, 3, 16, 16))[0]
    assert torch.allclose(found.features, one, atol=1e-5)
    assert found.figures["shift_consistency"] == pytest.approx(shift_consistency(one, other, 1), abs=1e-5)
    assert found.figures["constant_image_pattern"] == pytest.approx(constant_image_pattern(empty), abs=1e-5)


def test_too_few_images_and_sizes_that_do_not_fit_are_refused():
    encoder = tiny("vit")
    with pytest.raises(UsageError, match="3 images are too few"):
        find_artefacts(dense_features(encoder), torch.zeros(3, 3, 20, 20), (16, 16), (4, 4))
    with pytest.raises(UsageError, match="whole number of patches"):
        find_artefacts(dense_features(encoder), torch.zeros(4, 3, 18, 18), (16, 16), (4, 4))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "artefact share 0.0 %: there is little to clean."),
        ({"norm_outliers": 0.021}, "artefact share 2.1 %: cleaning is worth trying."),
        (
            {"position_explained_variance": 0.31, "shift_consistency": 0.9},
            "cleaning is worth trying (place explains 31 % of what patch features differ by).",
        ),
        (
            {"position_explained_variance": 0.49},
            "little to clean (place explains 49 % of what patch features differ by, but",
        ),
        ({"constant_image_pattern": 0.5}, "an empty image shows a pattern of 50 % of the features' size"),
        ({"shift_consistency": 0.61}, "content moved by a patch is only 0.61 like itself"),
        ({"norm_outliers": float("nan")}, "not finite"),
    ],
)
def test_the_verdict_is_in_plain_words(changed, words):
    assert words in artefact_verdict(CLEAN | changed)
