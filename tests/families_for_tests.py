"""Encoders of signals and of volumes as someone else would add them: modules and their families, in this file alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchloom.encoders import Encoder, Family, register
from patchloom.encoders.families import Embedded
from patchloom.encoders.positions import TIMM_RULE, resample_positions


class Patches(nn.Module):
    """A convolution of any number of axes."""

    def __init__(self, size: tuple[int, ...], patch: tuple[int, ...], channels: int, width: int) -> None:
        super().__init__()
        kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
        self.img_size, self.patch = size, patch
        self.proj, self.norm = kind(channels, width, patch, patch), nn.Identity()

    @property
    def grid_size(self) -> tuple[int, ...]:
        return tuple(side // cut for side, cut in zip(self.img_size, self.patch, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Transformer(Encoder):
    """An encoder with learnt positions and two prefix tokens, of inputs of any number of axes."""

    num_prefix_tokens = 2

    def __init__(self, size: tuple[int, ...], patch: tuple[int, ...], channels: int = 2, width: int = 24) -> None:
        super().__init__()
        self.embed_dim = self.num_features = width
        self.patch_embed = Patches(size, patch, channels, width)
        self.registers = nn.Parameter(torch.empty(1, 2, width))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.patch_embed.grid_size), width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward_features(self, x: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(len(x), -1, -1), self.patch_embed(x) + self.pos_embed], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, 2:].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SignalTransformer(Transformer):
    pass


class VolumeTransformer(Transformer):
    pass


class Transformers(Family):
    patch_embeds = (Patches,)
    stem = Family.stem | {"registers"}

    def patch_shape(self, encoder):
        return encoder.patch_embed.patch

    def add_positions(self, encoder, x):
        return Embedded(torch.cat([encoder.registers.expand(len(x), -1, -1), x + encoder.pos_embed], 1))

    def add_positions_at(self, encoder, x, grid, rule):
        positions = resample_positions(encoder.pos_embed, self.grid_size(encoder), grid, 0, rule)
        return Embedded(torch.cat([encoder.registers.expand(len(x), -1, -1), x + positions], 1))

    def resize(self, encoder, size):
        old = self.grid_size(encoder)
        encoder.patch_embed.img_size = size
        with torch.no_grad():
            resampled = resample_positions(encoder.pos_embed, old, self.grid_size(encoder), 0, TIMM_RULE)
        encoder.pos_embed = nn.Parameter(resampled)


@register(SignalTransformer)
class SignalTransformers(Transformers):
    kind = "signal"


@register(VolumeTransformer)
class VolumeTransformers(Transformers):
    kind = "volume"


class WholeGrid(VolumeTransformer):
    """One whose blocks would read neighbours in the grid."""


@register(WholeGrid)
class WholeGrids(VolumeTransformers):
    drops_tokens = False


CASES = {
    "signal": (SignalTransformer, (40,), (5,), (8,), (25,)),
    "volume": (VolumeTransformer, (4, 6, 8), (2, 3, 2), (2, 2, 4), (6, 6, 4)),
}
