"""Losses of EAR against their formulas, written out in float64 pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve

from patchloom.errors import UsageError
from patchloom.systems.ear.losses import (
    MSGMSLoss,
    RecoveryLoss,
    SSIMLoss,
    gms_map,
    msgms_map,
    ssim_map,
)


def pair(shape=(2, 3, 23, 30), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator, dtype=dtype) for _ in range(2))


def gms_formula(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    def magnitude(image):
        along = np.array([[1, 0, -1]] * 3) / 3
        gx, gy = (convolve(image, kernel, mode="constant") for kernel in (along, along.T))
        return np.sqrt(gx**2 + gy**2 + 1e-12)

    first, second = magnitude(x), magnitude(y)
    return (2 * first * second + 0.0026) / (first**2 + second**2 + 0.0026 + 1e-12)


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, corners not aligned, the border repeated."""
    out = values
    for axis, wanted in enumerate(size):
        have = out.shape[axis]
        place = np.clip((np.arange(wanted) + 0.5) * have / wanted - 0.5, 0, None)
        low = np.minimum(np.floor(place).astype(int), have - 1)
        high = np.minimum(low + 1, have - 1)
        weight = (place - low).reshape((-1, 1) if axis == 0 else (1, -1))
        out = out.take(low, axis) * (1 - weight) + out.take(high, axis) * weight
    return out


def halved(values: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in values.shape)
    return values[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def msgms_formula(x: np.ndarray, y: np.ndarray, scales: int = 3) -> np.ndarray:
    total, size = 0, x.shape
    for _ in range(scales):
        total = total + enlarged(gms_formula(x, y), size)
        x, y = halved(x), halved(y)
    return total / scales


def ssim_formula(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(values):
        return convolve(values, window, mode="constant")

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return (2 * mx * my + 0.01**2) * (2 * both + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))


def by_channel(formula, x, y):
    return torch.tensor(
        np.array(
            [
                [formula(a, b) for a, b in zip(one, two, strict=True)]
                for one, two in zip(x.numpy(), y.numpy(), strict=True)
            ]
        )
    )


@pytest.mark.parametrize(
    ("ours", "formula"), [(gms_map, gms_formula), (msgms_map, msgms_formula), (ssim_map, ssim_formula)]
)
@pytest.mark.parametrize("shape", [(2, 3, 23, 30), (1, 1, 16, 11)])
def test_maps_are_their_formulas(ours, formula, shape):
    x, y = pair(shape)
    torch.testing.assert_close(ours(x, y), by_channel(formula, x, y), atol=1e-10, rtol=1e-10)


def test_losses_are_means_of_their_maps_and_their_sum_is_weighted():
    x, y = pair()
    msgms = (1 - by_channel(msgms_formula, x, y)).mean()
    ssim = ((1 - by_channel(ssim_formula, x, y)).clamp(0, 1) / 2).mean()
    torch.testing.assert_close(MSGMSLoss()(x, y), msgms)
    torch.testing.assert_close(SSIMLoss()(x, y), ssim)
    torch.testing.assert_close(RecoveryLoss()(x, y), ((x - y) ** 2).mean() + ssim + msgms)
    torch.testing.assert_close(RecoveryLoss(2, 0.5, 3)(x, y), 2 * ((x - y) ** 2).mean() + 0.5 * ssim + 3 * msgms)


def test_negative_correlation_costs_no_more_than_none():
    x = (torch.arange(24) % 2).double().expand(1, 1, 24, 24)
    assert float(ssim_map(x, 1 - x).mean()) < -0.5
    assert float(SSIMLoss()(x, 1 - x)) == pytest.approx(0.5)


def test_the_loss_of_a_batch_is_the_mean_of_its_images_alone():
    x, y = pair()
    apart = [RecoveryLoss().per_image(x[i : i + 1], y[i : i + 1])["loss"] for i in range(2)]
    torch.testing.assert_close(torch.cat(apart), RecoveryLoss().per_image(x, y)["loss"])


def test_losses_are_taken_in_32_bits_under_mixed_precision():
    x, y = (image.float() for image in pair())
    y.requires_grad_(True)
    exact = RecoveryLoss()(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = RecoveryLoss()(x, y)
    assert torch.equal(mixed, exact)
    mixed.backward()
    assert bool(torch.isfinite(y.grad).all())


def test_gradients_are_finite_where_images_are_flat_and_equal():
    x = torch.full((1, 3, 16, 16), 0.5)
    y = x.clone().requires_grad_(True)
    RecoveryLoss()(x, y).backward()
    assert bool(torch.isfinite(y.grad).all())
    assert not math.isnan(float(y.grad.sum()))


@pytest.mark.parametrize(("loss", "side", "least"), [(ssim_map, 10, 11), (msgms_map, 3, 4)])
def test_images_that_are_too_small_are_refused(loss, side, least):
    images = torch.rand(1, 3, side, 20)
    with pytest.raises(UsageError, match=f"at least {least}"):
        loss(images, images)
    with pytest.raises(UsageError, match="cannot be compared"):
        loss(images, images[:, :1])
