"""Patch flattening: element order, inverse, own-variance normalisation, and the errors."""

from __future__ import annotations

import math

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


@pytest.mark.parametrize("order", ["chw", "hwc"])
@given(cells=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4), chans=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_any_number_of_axes_has_its_inverse(order, cells, chans):
    grid, patch = tuple(n for n, _ in cells), tuple(side for _, side in cells)
    inputs = torch.randn(2, chans, *(n * side for n, side in cells))
    patches = patchify(inputs, patch, order)
    assert patches.shape == (2, math.prod(grid), chans * math.prod(patch))
    assert torch.equal(unpatchify(patches, patch, grid, chans, order), inputs)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_patches_of_any_number_of_axes_are_in_the_order_of_a_convolution_kernel(rank):
    patch, sides = (2, 3, 4)[:rank], (4, 9, 8)[:rank]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    convolution = kind(3, 5, patch, stride=patch, bias=False).double()
    inputs = torch.randn(2, 3, *sides, dtype=torch.float64)
    by_patches = patchify(inputs, patch) @ convolution.weight.flatten(1).T
    assert torch.allclose(by_patches, convolution(inputs).flatten(2).transpose(1, 2))


def test_axes_that_do_not_agree_are_refused():
    with pytest.raises(UsageError, match="of 3 axes for patches of 2x2x2, not a tensor of 4 dimensions"):
        patchify(torch.zeros(1, 3, 4, 4), (2, 2, 2))
    with pytest.raises(UsageError, match="patches of 2x2 have 2 axes and the grid 2x2x2 has 3"):
        unpatchify(torch.zeros(1, 8, 12), (2, 2), (2, 2, 2))
    with pytest.raises(UsageError, match="an input of 4x4x4 has 3 axes and patches of 2x2 have 2"):
        patch_grid((4, 4, 4), (2, 2))
    with pytest.raises(UsageError, match="a side of 4x5x4, 5 is not divisible by patch size 2; use 4 or 6"):
        patch_grid((4, 5, 4), 2)


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
