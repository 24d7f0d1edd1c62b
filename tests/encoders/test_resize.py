"""Relative tables for other grids: against the published procedure, written out on its own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import timm
import torch
from scipy.interpolate import RectBivariateSpline

from patchloom.encoders import create_encoder, image_size, resize_relative_table, set_image_size, tokens
from patchloom.errors import UsageError


def published(table: np.ndarray, source: int, target: int) -> np.ndarray:
    """BEiT's published code, step by step, with sides 2h - 1 of the tables."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        total = sum(q**power for power in range(source // 2))
        if total > target // 2:
            right = q
        else:
            left = q
    distances, current = [], 1.0
    for power in range(source // 2):
        distances.append(current)
        current += q ** (power + 1)
    x = np.array([-d for d in reversed(distances)] + [0.0] + distances)
    wanted = np.clip(np.arange(-(target // 2), target // 2 + 1.0), x[0], x[-1])
    out = []
    for head in range(table.shape[1]):
        z = table[:-3, head].reshape(source, source)
        out.append(RectBivariateSpline(x, x, z.T, kx=3, ky=3, s=0)(wanted, wanted).T.reshape(-1))
    return np.concatenate([np.stack(out, 1), table[-3:]])


@pytest.mark.parametrize(("old", "new"), [(14, 24), (8, 14), (14, 32), (4, 7)])
def test_equals_the_published_procedure(old, new):
    table = torch.randn((2 * old - 1) ** 2 + 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resized = resize_relative_table(table, (old, old), (new, new))
    expected = published(table.numpy(), 2 * old - 1, 2 * new - 1)
    np.testing.assert_allclose(resized.numpy(), expected, atol=1e-8)


def test_grids_that_are_not_square_fall_back_and_say_so():
    table = torch.randn(5 * 7 + 3, 2)
    with pytest.warns(UserWarning, match="resampled to 6x8 bicubically"):
        resized = resize_relative_table(table, (3, 4), (6, 8))
    assert resized.shape == (11 * 15 + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])


@pytest.mark.parametrize("name", ["ccvit_tiny_patch4_32", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_an_encoder_works_at_its_new_size(name):
    encoder = create_encoder(name, depth=2).eval()
    patch = encoder.patch_embed.patch_size[0]
    set_image_size(encoder, 6 * patch)
    assert image_size(encoder) == (6 * patch, 6 * patch)
    assert tokens(encoder, torch.randn(1, 3, 6 * patch, 6 * patch)).patches.shape[1] == 36
    with pytest.raises(UsageError, match="is not divisible"):
        set_image_size(encoder, 6 * patch + 1)


def test_a_resized_encoder_can_be_rebuilt_from_what_it_says_it_was_made_from():
    encoder = create_encoder("ccvit_tiny_patch4_32", depth=1).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a square grid gives no warning, timm's own included
        set_image_size(encoder, 64)
    made = encoder.patchloom_args
    again = timm.create_model(made["architecture"], num_classes=0, **made["model_args"])
    again.load_state_dict(encoder.state_dict())
    assert image_size(again) == (64, 64)
    assert not encoder.rel_pos_bias.relative_position_bias_table.requires_grad


def test_smooth_biases_stay_what_they_mean():
    """A bias that falls with distance still does, and nearest neighbours keep theirs."""
    old, new = 8, 14
    offsets = np.arange(-(old - 1), old)
    fall = -np.sqrt(np.add.outer(offsets**2, offsets**2)).reshape(-1, 1)
    table = torch.from_numpy(np.concatenate([fall, np.zeros((3, 1))]))
    resized = resize_relative_table(table, (old, old), (new, new))[:-3, 0].view(2 * new - 1, 2 * new - 1)
    centre = new - 1
    assert resized[centre, centre].item() == pytest.approx(0, abs=1e-9)
    assert resized[centre, centre + 1].item() == pytest.approx(-1, abs=1e-6)
    assert (resized[centre, centre:].diff() < 0).all()
