"""Patch flattening: element order, inverse, own-variance normalisation, and the errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from patchloom.encoders.patches import normalize_patches, patch_grid, patchify, unpatchify
from patchloom.errors import UsageError


@pytest.mark.parametrize("order", ["chw", "hwc"])
@given(
    batch=st.integers(1, 3),
    chans=st.integers(1, 4),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    patch_size=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_unpatchify_inverts_patchify(order, batch, chans, h, w, patch_size):
    images = torch.randn(batch, chans, h * patch_size, w * patch_size)
    patches = patchify(images, patch_size, order)
    assert patches.shape == (batch, h * w, chans * patch_size**2)
    assert torch.equal(unpatchify(patches, patch_size, (h, w), chans, order), images)


def test_elements_lie_where_the_published_code_puts_them():
    images = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    chw, hwc = patchify(images, 4, "chw"), patchify(images, 4, "hwc")
    for b, c, y, x in [(0, 0, 0, 0), (1, 2, 7, 11), (0, 1, 3, 9), (1, 0, 5, 2)]:
        n, row, col = (y // 4) * 3 + x // 4, y % 4, x % 4
        assert chw[b, n, c * 16 + row * 4 + col] == images[b, c, y, x]
        assert hwc[b, n, row * 12 + col * 3 + c] == images[b, c, y, x]


def test_chw_is_the_order_of_a_convolution_kernel():
    convolution = nn.Conv2d(3, 5, 4, stride=4, bias=False).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    by_patches = patchify(images, 4) @ convolution.weight.flatten(1).T
    assert torch.allclose(by_patches, convolution(images).flatten(2).transpose(1, 2))


def test_uint8_stays_uint8():
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert patchify(images, 4).dtype == torch.uint8


def test_normalisation_uses_own_mean_and_unbiased_variance():
    patches = torch.rand(2, 3, 12, dtype=torch.float64)
    expected = torch.empty_like(patches)
    for b in range(2):
        for n in range(3):
            x = patches[b, n]
            mean = x.sum() / 12
            expected[b, n] = (x - mean) / (((x - mean) ** 2).sum() / 11 + 1e-6).sqrt()
    assert torch.allclose(normalize_patches(patches), expected, atol=1e-12)
    assert torch.allclose(normalize_patches(patches.float()), expected.float(), atol=1e-5)
    assert normalize_patches(patches.half()).dtype == torch.float32


def test_constant_patch_becomes_zeros_even_in_half_precision():
    constant = torch.full((1, 2, 48), 0.3, dtype=torch.float16)
    assert torch.equal(normalize_patches(constant), torch.zeros(1, 2, 48))
    nearly = constant.clone()
    nearly[0, 0, 0] = 0.3003
    assert torch.isfinite(normalize_patches(nearly)).all()


def test_indivisible_size_names_sizes_that_fit():
    with pytest.raises(UsageError, match="image size 225 is not divisible by patch size 16; use 224 or 240"):
        patchify(torch.zeros(1, 3, 224, 225), 16)
    with pytest.raises(UsageError, match="image size 7 is not divisible by patch size 16; use 16"):
        patch_grid((7, 16), 16)
    with pytest.raises(UsageError, match="patch size 0"):
        patch_grid((16, 16), 0)


def test_wrong_shapes_and_orders_are_refused():
    with pytest.raises(UsageError, match="3 dimensions"):
        patchify(torch.zeros(3, 16, 16), 16)
    with pytest.raises(UsageError, match=r"\(B, 4, 48\) does"):
        unpatchify(torch.zeros(1, 5, 48), 4, (2, 2))
    with pytest.raises(UsageError, match="patch order 'cwh'"):
        patchify(torch.zeros(1, 3, 16, 16), 16, "cwh")  # type: ignore[arg-type]
