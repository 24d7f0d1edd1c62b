"""The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958), in plain PyTorch.

Layers learn at equal rates: weights are drawn from N(0, 1) and scaled as they are used. Blurring is a depthwise
convolution. Layout of github.com/thuanz123/enhancing-transformers (`losses/layers.py`).

>>> critic = StyleGANDiscriminator(32, channels=[8, 8, 8, 8])
>>> critic(torch.rand(4, 3, 32, 32)).shape
torch.Size([4])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError

GROUP = 4
"""Images whose spread is compared in the last layer."""
BLUR = (1.0, 3.0, 3.0, 1.0)


class StyleGANDiscriminator(nn.Module):
    """How real images look: (B, C, size, size) in [0, 1] → (B,) logits.

    Args:
        size: Side of the images, a power of two from 8 on.
        channel_multiplier: Factor on the channels of sides above 32.
        channels: Channels at each side from `size` down to 4, in place of StyleGAN2's.
        in_chans: Channels of the images.

    Raises:
        UsageError: A side that is no power of two, or channels of another number of sides.
    """

    def __init__(
        self, size: int, channel_multiplier: int = 2, channels: Sequence[int] | None = None, in_chans: int = 3
    ) -> None:
        super().__init__()
        levels = size.bit_length() - 1
        if size < 8 or size != 2**levels:
            raise UsageError(
                f"the discriminator takes images of 8, 16, 32 … pixels, not {size}; set another image_size"
            )
        if channels is None:
            channels = self.channels_of(size, channel_multiplier)
        if len(channels) != levels - 1:
            raise UsageError(f"a discriminator of {size} pixels has {levels - 1} sides, and {len(channels)} channels")
        self.size, self.channels = size, tuple(channels)
        self.stem = StyleConv(in_chans, channels[0], 1)
        self.blocks = nn.ModuleList(StyleBlock(*pair) for pair in pairwise(channels))
        last = channels[-1]
        self.conv = StyleConv(channels[-1] + 1, last, 3)
        self.hidden = EqualLinear(last * 16, last, activate=True)
        self.out = EqualLinear(last, 1)

    @staticmethod
    def channels_of(size: int, channel_multiplier: int = 2) -> list[int]:
        """Return StyleGAN2's channels at each side from `size` down to 4."""
        sides = [size >> level for level in range(size.bit_length() - 2)]
        return [512 if side <= 32 else max(16384 * channel_multiplier // side, 1) for side in sides]

    def forward(self, images: Tensor) -> Tensor:
        """Judge images.

        Raises:
            UsageError: A batch that does not divide into groups, see `group_of`, or images of another size.
        """
        if tuple(images.shape[-2:]) != (self.size, self.size):
            raise UsageError(f"the discriminator is for {self.size} pixels, not {tuple(images.shape[-2:])}")
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = self.conv(torch.cat([x, _spread(x)], 1))
        logits: Tensor = self.out(self.hidden(x.flatten(1)))
        return logits.squeeze(1)


class StyleBlock(nn.Module):
    """Two convolutions, the second to half the side, beside one of 1 pixel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = StyleConv(in_channels, in_channels, 3)
        self.conv2 = StyleConv(in_channels, out_channels, 3, down=True)
        self.skip = StyleConv(in_channels, out_channels, 1, down=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the side: (B, C, S, S) → (B, C', S / 2, S / 2)."""
        halved: Tensor = (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)
        return halved


class StyleConv(nn.Module):
    """Convolution at an equalised rate, then a leaky ReLU of gain √2; `down`: blurred, then every second pixel."""

    kernel: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, down: bool = False, activate: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.down = down
        self.margin = (kernel_size + 1) // 2 if down else kernel_size // 2
        taps = torch.tensor(BLUR)
        self.register_buffer("kernel", torch.outer(taps, taps) / taps.sum() ** 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        if self.down:
            blur = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
            x = F.conv2d(x, blur, padding=self.margin, groups=x.shape[1])
        weight = self.weight * self.scale
        x = F.conv2d(x, weight, stride=2 if self.down else 1, padding=0 if self.down else self.margin)
        return x if self.bias is None else _leaky(x + self.bias[:, None, None])


class EqualLinear(nn.Module):
    """Linear layer at an equalised rate; `activate`: then a leaky ReLU of gain √2."""

    def __init__(self, in_features: int, out_features: int, *, activate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = 1 / math.sqrt(in_features)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_features) of (B, in_features)."""
        x = F.linear(x, self.weight * self.scale, self.bias)
        return _leaky(x) if self.activate else x


def group_of(batch: int) -> int:
    """Return how many images of a batch have their spread compared.

    Raises:
        UsageError: The batch does not divide into such groups.
    """
    group = batch // (batch // min(batch, GROUP))
    if batch % group:
        raise UsageError(
            f"the discriminator compares groups of {group} images, and a batch of {batch} does not divide into them; "
            f"take a batch_size that is a multiple of {GROUP}"
        )
    return group


def _spread(x: Tensor) -> Tensor:
    """Return (B, 1, H, W), the mean standard deviation of the values over the images of a group."""
    batch, channels, height, width = x.shape
    group = group_of(batch)
    spread = (x.view(group, -1, channels, height, width).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return spread.repeat(group)[:, None, None, None].expand(-1, 1, height, width)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)
