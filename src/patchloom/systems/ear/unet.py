"""The network that repairs an excised image: a U-Net, as in the random-mask code of EAR's first author.

Park et al. 2023, arXiv 2310.04010, keep that network unchanged.

>>> RecoveryUNet(widths=(4, 8, 8, 16))(torch.rand(2, 3, 33, 30)).shape
torch.Size([2, 3, 33, 30])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError

Output = Literal["clamp", "sigmoid"]
WIDTHS = (64, 128, 256, 512)
TINY = 1e-12


class RecoveryUNet(nn.Module):
    """U-Net of plain convolutions that maps an image to an image of the same size.

    Down: at each level two convolutions, whose output is kept as skip, and one of stride 2. Up: twice the size by the
    nearest pixel, a convolution, what sticks out cut off, the skip beside it, two convolutions. The last convolution
    has neither norm nor activation.

    Args:
        in_channels: Channels of the images.
        widths: Channels of each level, the last that of the bottleneck. Published: 64, 128, 256, 512.
        output: `clamp` cuts the result to [1e-12, 1 - 1e-12] (published; no gradient reaches what lies outside),
            `sigmoid` squeezes it.
        kernel: Side of the convolutions, odd (3).

    Attributes:
        pretrained_cfg: As timm's models have it: `input_size`, the (C, H, W) it is meant for, where that was said.
        skip_filter: What each level's skip passes through on its way across, the first level first; identities.

    Raises:
        UsageError: Fewer than two widths, or an unknown output.
    """

    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        output: Output = "clamp",
        kernel: int = 3,
    ) -> None:
        super().__init__()
        self.pretrained_cfg = {}
        if len(widths) < 2 or min(widths) < 1:
            raise UsageError(f"widths is {tuple(widths)}; give at least two numbers of channels")
        if output not in ("clamp", "sigmoid"):
            raise UsageError(f"output is {output!r}; it must be clamp or sigmoid")
        self.in_channels, self.widths, self.output, self.kernel = in_channels, tuple(widths), output, kernel
        *levels, bottom = self.widths
        self.down = nn.ModuleList()
        before = in_channels
        for width in levels:
            level = {"conv1": _layer(before, width, kernel), "conv2": _layer(width, width, kernel)}
            self.down.append(nn.ModuleDict({**level, "shrink": _layer(width, width, kernel, stride=2)}))
            before = width
        self.bottom = nn.Sequential(_layer(before, bottom, kernel), _layer(bottom, bottom, kernel))
        self.up = nn.ModuleList()
        before = bottom
        for width in reversed(levels):
            level = {"grow": _layer(before, width, kernel), "conv1": _layer(2 * width, width, kernel)}
            self.up.append(nn.ModuleDict({**level, "conv2": _layer(width, width, kernel)}))
            before = width
        self.out = nn.Conv2d(before, in_channels, kernel, padding=kernel // 2)
        if output == "clamp":
            # Fresh, the output lies around 0, and no gradient reaches a channel that is cut off everywhere.
            nn.init.constant_(cast(Tensor, self.out.bias), 0.5)
        self.skip_filter = nn.ModuleList(nn.Identity() for _ in levels)

    def arguments(self) -> dict[str, Any]:
        """Return what rebuilds the network."""
        return {
            "in_channels": self.in_channels,
            "widths": list(self.widths),
            "output": self.output,
            "kernel": self.kernel,
        }

    @property
    def smallest_side(self) -> int:
        """Fewest pixels a side may have, so that something is left at the bottom."""
        return int(2 ** (len(self.widths) - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return repaired images (B, C, H, W) in [0, 1].

        Args:
            images: (B, C, H, W) in [0, 1], of any size from `smallest_side` on.

        Raises:
            UsageError: The images are too small.
        """
        if min(images.shape[-2:]) < self.smallest_side:
            raise UsageError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels are too small for {len(self.widths)} levels; "
                f"a side is at least {self.smallest_side}"
            )
        # Channels last, convolutions of a CPU take an eighth less time.
        x = images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images
        skips = []
        for level in map(_parts, self.down):
            x = level["conv2"](level["conv1"](x))
            skips.append(x)
            x = level["shrink"](x)
        x = self.bottom(x)
        across = zip(reversed(skips), reversed(self.skip_filter), strict=True)
        for level, (skip, between) in zip(map(_parts, self.up), across, strict=True):
            x = level["grow"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = torch.cat([x[..., : skip.shape[-2], : skip.shape[-1]], between(skip)], dim=1)
            x = level["conv2"](level["conv1"](x))
        x = self.out(x).contiguous()
        return x.clamp(TINY, 1 - TINY) if self.output == "clamp" else x.sigmoid()


def _parts(level: nn.Module) -> nn.ModuleDict:
    assert isinstance(level, nn.ModuleDict)
    return level


def _layer(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.LeakyReLU())
