"""UPerNet: pyramid pooling on the coarsest map, a feature pyramid over all (Xiao et al. 2018).

Xiao et al. 2018, arXiv 1807.10221, with mmsegmentation's names.

>>> head = UPerHead([16, 16, 16, 16], num_classes=5, channels=32).eval()
>>> head([torch.randn(1, 16, side, side) for side in (16, 8, 4, 2)]).shape
torch.Size([1, 5, 16, 16])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.segment.layers import ConvBN, Head, check_channels, resize, select_maps


class UPerHead(Head):
    """UPerNet's head.

    Args:
        in_channels: Channels of the maps, finest first.
        num_classes: Classes.
        channels: Width; published: 512, 768 for a base and 1024 for a large encoder of BEiT's kind.
        pool_scales: Sides of the pooled maps.
        dropout: Probability of dropping a channel.
        in_index: Which of the maps, finest first; default: all.

    Raises:
        UsageError: Fewer than two maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        in_index: Sequence[int] | None = None,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        if len(in_channels) < 2:
            raise UsageError(f"UPerNet takes several maps, finest first; in_channels is {list(in_channels)}")
        self.in_channels = tuple(in_channels)
        self.in_index = in_index
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBN(coarsest, channels)) for scale in pool_scales
        )
        self.bottleneck = ConvBN(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBN(width, channels) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvBN(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvBN(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h, w) at the size of the first map."""
        maps = select_maps(maps, self.in_index)
        if len(maps) != len(self.in_channels):
            raise UsageError(f"UPerNet was made for {len(self.in_channels)} maps and gets {len(maps)}")
        for x, width in zip(maps, self.in_channels, strict=True):
            check_channels(x, width, "UPerNet")
        coarsest = maps[-1]
        pooled = [resize(module(coarsest), coarsest.shape[-2:]) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + resize(laterals[level], laterals[level - 1].shape[-2:])
        # The coarsest lateral goes on as it is.
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        joined = torch.cat([resize(x, levels[0].shape[-2:]) for x in levels], dim=1)
        return self.classify(self.fpn_bottleneck(joined))
