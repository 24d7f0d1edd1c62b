"""Convolutions as long as the grid they run over, causal from its first corner: y[i] = Σ_{a ≤ i} k[a] u[i - a].

Poli et al. 2023, "Hyena Hierarchy", arXiv 2302.10866; on grids of several axes Zimerman and Wolf 2024,
"Multi-Dimensional Hyena for Spatial Inductive Bias", arXiv 2309.13600. By Fourier transforms of the grid doubled along
every axis, or, for small grids and as the reference, as the sums they stand for.

>>> import torch
>>> u, k = torch.randn(2, 3, 5, 7), torch.randn(3, 5, 7)
>>> torch.allclose(fft_long_conv(u, k), direct_long_conv(u, k), atol=1e-5)
True
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchloom.encoders.patches import Grid
from patchloom.encoders.precision import at_least_float32, without_autocast
from patchloom.errors import UsageError


def fft_long_conv(u: Tensor, k: Tensor, skip: Tensor | None = None, scale: Tensor | float | None = None) -> Tensor:
    """Return scale · (k ∗ u) + skip · u, computed in float32 (float64 stays) by Fourier transforms.

    Args:
        u: (B, C, *grid) of any real type.
        k: (C, *grid), the kernel of each channel, as large as the grid.
        skip: (C,), what each channel gets of the input itself; default: nothing.
        scale: Factor of the convolution; default: 1.

    Returns:
        (B, C, *grid) of the type of `u`.

    Raises:
        UsageError: Kernels and input have other channels or grids.
    """
    _check(u, k)
    kernel = at_least_float32(k) if scale is None else at_least_float32(k) * scale
    signal = at_least_float32(u)
    if kernel.dtype != signal.dtype:
        kernel, signal = kernel.double(), signal.double()
    learns = torch.is_grad_enabled() and (signal.requires_grad or kernel.requires_grad)
    convolved: Tensor = _LongConvolution.apply(signal, kernel) if learns else _convolved(signal, kernel)
    return _skipped(convolved, signal, skip).to(u.dtype)


def direct_long_conv(u: Tensor, k: Tensor, skip: Tensor | None = None, scale: Tensor | float | None = None) -> Tensor:
    """Return the same as `fft_long_conv`, as sums: less work on grids of a few places a side.

    Raises:
        UsageError: Kernels and input have other channels or grids, or grids have more than 3 axes.
    """
    _check(u, k)
    rank = k.ndim - 1
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}.get(rank)
    if convolution is None:
        raise UsageError(f"a grid has 1, 2 or 3 axes, not {rank}")
    kernel = at_least_float32(k) if scale is None else at_least_float32(k) * scale
    signal = at_least_float32(u)
    if kernel.dtype != signal.dtype:
        kernel, signal = kernel.double(), signal.double()
    axes = tuple(range(1, rank + 1))
    before = [pad for side in reversed(k.shape[1:]) for pad in (side - 1, 0)]
    with without_autocast(u.device):
        convolved = convolution(F.pad(signal, before), kernel.flip(axes).unsqueeze(1), groups=len(k))
    return _skipped(convolved, signal, skip).to(u.dtype)


def fast_length(least: int) -> int:
    """Return the smallest number from `least` on that has no prime factor above 7: transforms of it are quick."""
    length = max(least, 1)
    while True:
        rest = length
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


class _LongConvolution(torch.autograd.Function):
    """The convolution, which keeps the two transforms alone; its way back takes as many as its way there."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor) -> Tensor:
        grid = tuple(k.shape[1:])
        of_u, of_k = _spectrum(u, grid), _spectrum(k, grid)
        ctx.save_for_backward(of_u, of_k)
        ctx.grid = grid
        return _cropped(of_u * of_k, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        of_u, of_k = ctx.saved_tensors
        spectrum = _spectrum(grad, ctx.grid)
        grad_u = grad_k = None
        if ctx.needs_input_grad[1]:
            grad_k = _cropped(of_u.conj_physical().mul_(spectrum).sum(0), ctx.grid)
        if ctx.needs_input_grad[0]:
            grad_u = _cropped(spectrum.mul_(of_k.conj_physical()), ctx.grid)
        return grad_u, grad_k


def _convolved(u: Tensor, k: Tensor) -> Tensor:
    grid = tuple(k.shape[1:])
    return _cropped(_spectrum(u, grid) * _spectrum(k, grid), grid)


def _spectrum(x: Tensor, grid: Grid) -> Tensor:
    """Return the transform of (..., *grid), padded so that nothing wraps around.

    Axes come in another order, each in its turn the last one: transforms along others are slow. Lines of zeros are not
    transformed.
    """
    lengths = [fast_length(2 * side - 1) for side in grid]
    spectrum = torch.fft.rfft(x.contiguous(), n=lengths[-1])
    for axis, length in enumerate(reversed(lengths[:-1]), start=2):
        spectrum = torch.fft.fft(spectrum.movedim(-axis, -1), n=length)
    return spectrum


def _cropped(spectrum: Tensor, grid: Grid) -> Tensor:
    """Return the places of the grid of an inverse transform; what is cut off is not transformed further."""
    for axis, side in zip(range(len(grid), 1, -1), grid, strict=False):
        spectrum = torch.fft.ifft(spectrum)[..., :side].movedim(-1, -axis)
    return torch.fft.irfft(spectrum, n=fast_length(2 * grid[-1] - 1))[..., : grid[-1]]


def _skipped(convolved: Tensor, u: Tensor, skip: Tensor | None) -> Tensor:
    if skip is None:
        return convolved
    return convolved + u * skip.view(-1, *[1] * (u.ndim - 2))


def _check(u: Tensor, k: Tensor) -> None:
    if u.ndim != k.ndim + 1 or u.shape[1:] != k.shape:
        raise UsageError(
            f"kernels of shape {tuple(k.shape)} do not fit an input of shape {tuple(u.shape)}; (C, *grid) and "
            f"(B, C, *grid) do"
        )
