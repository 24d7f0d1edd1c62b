"""How far a repaired image is from the original: gradient magnitudes at several scales, structure, squares.

Gradient magnitude similarity: Xue et al. 2014, arXiv 1308.3052; over several scales, and the sum of the three losses:
Zavrtanik et al. 2021, "Reconstruction by inpainting for visual anomaly detection", Pattern Recognition 112.

All of it is computed in 32-bit floats at least, under mixed precision too: its square roots and differences of squares
have no digits to spare.

>>> images = torch.rand(2, 3, 32, 32)
>>> float(RecoveryLoss()(images, images)) < 1e-6
True
>>> msgms_map(images, images.flip(-1)).shape
torch.Size([2, 3, 32, 32])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError

GMS_CONSTANT = 0.0026
TINY = 1e-12
WINDOW, SIGMA = 11, 1.5
SSIM_CONSTANTS = (0.01**2, 0.03**2)


def gms_map(x: Tensor, y: Tensor, constant: float = GMS_CONSTANT) -> Tensor:
    """Return the similarity of gradient magnitudes at every pixel, channel by channel, in (0, 1].

    Gradients are Prewitt's, divided by 3, with zeros around the image.

    Args:
        x: (B, C, H, W) in [0, 1].
        y: Likewise.
        constant: Keeps the quotient steady where both images are flat (0.0026).

    Returns:
        (B, C, H, W); 1 where the gradients are equally strong.
    """
    first, second = gradient_magnitude(x), gradient_magnitude(y)
    return (2 * first * second + constant) / (first.square() + second.square() + constant + TINY)


def gradient_magnitude(x: Tensor) -> Tensor:
    """Return the strength of the gradient at every pixel, channel by channel, (B, C, H, W)."""
    along = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=x.dtype, device=x.device) / 3
    kernels = torch.stack([along, along.T])[:, None]
    batch, channels, height, width = x.shape
    gradients = F.conv2d(x.reshape(batch * channels, 1, height, width), kernels, padding=1)
    return (gradients.square().sum(1) + TINY).sqrt().reshape(batch, channels, height, width)


def msgms_map(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """Return the mean of `gms_map` over scales, each at half the size of the one before and brought back to full size.

    Args:
        x: (B, C, H, W) in [0, 1].
        y: Likewise.
        scales: How many.

    Returns:
        (B, C, H, W) in (0, 1].

    Raises:
        UsageError: The images are too small to be halved so often, or of different shapes.
    """
    _check(x, y, 2 ** (scales - 1))
    with _without_autocast(x):
        x, y = _exact(x), _exact(y)
        size, total = x.shape[-2:], torch.zeros_like(x)
        for scale in range(scales):
            if scale:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            similarity = gms_map(x, y)
            total = total + (
                F.interpolate(similarity, size=size, mode="bilinear", align_corners=False) if scale else similarity
            )
        return total / scales


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Return structural similarity at every pixel, channel by channel (Wang et al. 2004), in [-1, 1].

    A Gaussian window of 11 pixels and deviation 1.5, zeros around the image, constants 0.01² and 0.03².

    Args:
        x: (B, C, H, W) in [0, 1].
        y: Likewise.

    Raises:
        UsageError: The images are smaller than the window, or of different shapes.
    """
    _check(x, y, WINDOW)
    with _without_autocast(x):
        x, y = _exact(x), _exact(y)
        parts = torch.stack([x, y, x * x, y * y, x * y])
        mean_x, mean_y, square_x, square_y, product = _window_mean(parts.flatten(0, 1)).view_as(parts)
        steady, contrast = SSIM_CONSTANTS
        near = (2 * mean_x * mean_y + steady) * (2 * (product - mean_x * mean_y) + contrast)
        spread = (square_x - mean_x.square()) + (square_y - mean_y.square())
        return near / ((mean_x.square() + mean_y.square() + steady) * (spread + contrast))


def _window_mean(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(x.reshape(-1, 1, height, width), weights.view(1, 1, -1, 1), padding=(WINDOW // 2, 0))
    return F.conv2d(rows, weights.view(1, 1, 1, -1), padding=(0, WINDOW // 2)).view(batch, channels, height, width)


class MSGMSLoss(nn.Module):
    """Mean of 1 - `msgms_map`.

    Args:
        scales: How many scales.
    """

    def __init__(self, scales: int = 3) -> None:
        super().__init__()
        self.scales = scales

    def per_image(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of every image, (B,) in [0, 1)."""
        return (1 - msgms_map(x, y, self.scales)).mean((1, 2, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        return self.per_image(x, y).mean()


class SSIMLoss(nn.Module):
    """Mean of 1 - `ssim_map`, cut off at 1, then halved: in [0, 0.5].

    The cut comes first, as in torchgeometry 0.1.2, which the random-mask code used: what correlates negatively costs
    no more than what does not correlate. Later versions (kornia) halve first.
    """

    def per_image(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of every image, (B,)."""
        return ((1 - ssim_map(x, y)).clamp(0, 1) / 2).mean((1, 2, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        return self.per_image(x, y).mean()


class RecoveryLoss(nn.Module):
    """Weighted sum of squared error, `SSIMLoss` and `MSGMSLoss`, over all pixels, not the excised ones alone.

    Args:
        l2: Weight of the mean squared error.
        ssim: Weight of the structural loss.
        msgms: Weight of the loss of gradient magnitudes.
    """

    def __init__(self, l2: float = 1.0, ssim: float = 1.0, msgms: float = 1.0) -> None:
        super().__init__()
        self.weights = {"l2": l2, "ssim": ssim, "msgms": msgms}
        self.parts: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "l2": squared_error,
            "ssim": SSIMLoss().per_image,
            "msgms": MSGMSLoss().per_image,
        }

    def per_image(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return `l2`, `ssim` and `msgms` of every image, (B,) each, not weighted, and their weighted sum, `loss`."""
        losses = {name: part(x, y) for name, part in self.parts.items() if self.weights[name]}
        total = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum(0)
        return {**losses, "loss": total}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            x: (B, C, H, W) in [0, 1], the original.
            y: Likewise, the repaired image.
        """
        return self.per_image(x, y)["loss"].mean()


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference of every image, (B,)."""
    with _without_autocast(x):
        return (_exact(x) - _exact(y)).square().mean((1, 2, 3))


def _exact(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check(x: Tensor, y: Tensor, least: int) -> None:
    if x.shape != y.shape:
        raise UsageError(f"images of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    if min(x.shape[-2:]) < least:
        raise UsageError(f"images of {x.shape[-2]}x{x.shape[-1]} pixels are too small; a side is at least {least}")
