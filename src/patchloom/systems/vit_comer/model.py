"""ViT-CoMer: a plain ViT and a CNN beside it that exchange features, as a backbone of four maps.

Xia et al. 2024, "ViT-CoMer: Vision Transformer with Convolutional Multi-scale Feature Interaction for Dense
Predictions" (CVPR 2024, arXiv 2403.07392), both backbones of its published code: for segmentation and for detection.
Parameters other than the ViT's bear the published names.

>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=64, embed_dim=24, depth=4, num_heads=3)
>>> backbone = ViTCoMer(encoder, conv_width=8, deform_heads=3).eval()
>>> [tuple(x.shape) for x in backbone(torch.randn(1, 3, 64, 96))]
[(1, 24, 16, 24), (1, 24, 8, 12), (1, 24, 4, 6), (1, 24, 2, 3)]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import Encoder, depth, embed_dim, in_chans, patch_size, plane_size, run_blocks
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.families import Embedded
from patchloom.encoders.positions import PositionRule
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.vit_comer.deformable import MultiScaleDeformableAttention
from patchloom.systems.vit_comer.interaction import ConvTransformerInteraction
from patchloom.systems.vit_comer.layers import SpatialPriorCNN, as_map, pyramid_shapes, split_levels
from patchloom.systems.vit_comer.windows import check_windowed, run_windowed

STRIDE, COARSEST = 16, 32
"""Of the ViT's map, and of the coarsest: sides of images are multiples of it."""
POSITIONS = PositionRule(antialias=False)
"""How the published code brings the table of positions to the grid of an image."""
VitFeatures = Literal["per_stage", "last"]


def equal_stages(blocks: int, count: int = 4) -> list[tuple[int, int]]:
    """Return the first and last block of stages at equal parts of the depth.

    >>> equal_stages(12)
    [(0, 2), (3, 5), (6, 8), (9, 11)]

    Raises:
        UsageError: There are fewer blocks than stages.
    """
    if blocks < count:
        raise UsageError(f"{count} stages need as many blocks, and the encoder has {blocks}")
    ends = [round(blocks * (number + 1) / count) - 1 for number in range(count)]
    return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))


class CoMerAdapter(nn.Module):
    """What ViT-CoMer adds to a ViT: the CNN, the exchanges, and what makes maps of both, under the published names.

    Args:
        dim: Width D of the ViT.
        in_chans: Channels of the images.
        conv_width: Channels of the CNN's stem.
        interactions: The stages' exchanges.
    """

    def __init__(
        self, dim: int, in_chans: int, conv_width: int, interactions: Iterable[ConvTransformerInteraction]
    ) -> None:
        super().__init__()
        self.spm = SpatialPriorCNN(conv_width, dim, in_chans)
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.interactions = nn.ModuleList(interactions)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in range(4))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as the published code does."""
        for part in (self.spm, self.interactions, self.up):
            part.apply(_init_weights)
        for module in self.interactions.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def pyramid(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the CNN's map (B, D, H / 4, W / 4) and its pyramid (B, 21 n, D) of strides 8, 16 and 32."""
        c1, *levels = self.spm(images)
        return c1, torch.cat([x + embed for x, embed in zip(levels, self.level_embed, strict=True)], dim=1)

    def maps(self, c1: Tensor, c: Tensor, vit: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
        """Return maps of strides 4, 8, 16 and 32, with the ViT's tokens (B, N, D) for each in them, normed."""
        shapes = pyramid_shapes(height, width)
        c2, c3, c4 = (as_map(x, shape) for x, shape in zip(split_levels(c, height, width), shapes, strict=True))
        maps = [self.up(c2) + c1, c2, c3, c4]
        for number, tokens in enumerate(vit):
            added = as_map(tokens, (height, width))
            if number != 2:
                added = F.interpolate(added, size=maps[number].shape[-2:], mode="bilinear", align_corners=False)
            maps[number] = maps[number] + added
        return [norm(x) for norm, x in zip((self.norm1, self.norm2, self.norm3, self.norm4), maps, strict=True)]


class ViTCoMer(nn.Module):
    """Images to maps of strides 4, 8, 16 and 32, all as wide as the encoder.

    Class and register tokens of a `VisionTransformer` are left out, as published; those of other encoders, whose blocks
    need them, go along. The encoder's final norm is not applied. Where its patches are not 16 pixels, it is shown the
    image at such a size that its grid has stride 16 all the same.

    Args:
        encoder: A ViT.
        interaction_indexes: First and last block of each stage; default: four at equal parts of the depth (published).
        conv_width: Channels of the CNN's stem.
        deform_heads: Heads of deformable attention; published: 6, 12 for a base and 16 for a large encoder.
        deform_ratio: Width of its values by the encoder's; published: 1, and 0.5 for base and large.
        num_points: Places per head and map.
        cffn_ratio: Width of the middle of convolutional feed-forward layers by the encoder's.
        mrfp_ratio: Width of the middle of the receptive-field pyramids, likewise; published for segmentation: 6, for S
            1.5; for detection: 0.5.
        use_to_vit: Exchange towards the ViT, for all stages or each.
        use_to_cnn: Exchange towards the CNN, likewise.
        cnn_interaction: Let the pyramid attend to itself on the way back, likewise.
        num_extra: Further exchanges towards the CNN behind the last stage.
        window_size: Side, in tokens, of the windows that the tokens of each block attend within, None or 0 for all
            tokens: a list of one for each block; default: none.
        vit_features: What is added to the four maps: the ViT's tokens after each of four stages (segmentation), its
            last ones (detection), or None for nothing.
        drop_path: Stochastic depth of the exchanges; that of the encoder is its own.
        init_values: Start of the factor on what the ViT is given; at 0 it begins as it was.

    Attributes:
        encoder: The ViT.
        adapter: What is added to it.
        out_channels: Width of the maps.
        strides: Of the maps.

    Raises:
        UsageError: Stages that leave blocks out or overlap, widths that heads do not share, blocks that cannot attend
            within windows, or an encoder that takes no images.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        encoder: Encoder,
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        *,
        conv_width: int = 64,
        deform_heads: int = 6,
        deform_ratio: float = 1.0,
        num_points: int = 4,
        cffn_ratio: float = 0.25,
        mrfp_ratio: float = 6.0,
        use_to_vit: bool | Sequence[bool] = True,
        use_to_cnn: bool | Sequence[bool] = True,
        cnn_interaction: bool | Sequence[bool] = True,
        num_extra: int = 4,
        window_size: Sequence[int | None] | None = None,
        vit_features: VitFeatures | None = "per_stage",
        drop_path: float = 0.0,
        init_values: float = 0.0,
    ) -> None:
        super().__init__()
        plane_size(encoder, "the maps of ViT-CoMer")
        dim, count = embed_dim(encoder), depth(encoder)
        self.stages = _checked_stages(interaction_indexes or equal_stages(count), count)
        if vit_features not in ("per_stage", "last", None):
            raise unknown_name("vit_features", str(vit_features), ("per_stage", "last"))
        if vit_features == "per_stage" and len(self.stages) != len(self.strides):
            raise UsageError(
                f"the ViT's tokens after each stage are added to four maps, and there are {len(self.stages)} stages; "
                f"name four, or set vit_features to last"
            )
        self.encoder = encoder
        self.vit_features = vit_features
        self.windows = _checked_windows(encoder, window_size)
        self.out_channels = dim
        self.channels = [dim] * len(self.strides)
        count = len(self.stages)
        switches = [
            _by_stage(name, value, count)
            for name, value in (
                ("use_to_vit", use_to_vit),
                ("use_to_cnn", use_to_cnn),
                ("cnn_interaction", cnn_interaction),
            )
        ]
        sizes = (int(dim * mrfp_ratio), deform_heads, num_points, deform_ratio, cffn_ratio, drop_path, init_values)
        extras = [0] * (count - 1) + [num_extra]
        exchanges = (
            ConvTransformerInteraction(dim, *sizes, to_vit, to_cnn, interacts, extra)
            for to_vit, to_cnn, interacts, extra in zip(*switches, extras, strict=True)
        )
        self.adapter = CoMerAdapter(dim, in_chans(encoder), conv_width, exchanges)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return (B, D, H / 4, W / 4), … (B, D, H / 32, W / 32) of normalised images (B, C, H, W).

        Raises:
            UsageError: A side is no multiple of 32; or the coarsest map of a batch in training is a single pixel.
        """
        height, width = self._grid(images)
        c1, c = self.adapter.pyramid(images)
        embedded, prefix = self._embedded(images, (height, width))
        front, x = embedded.x[:, :prefix], embedded.x[:, prefix:]
        after = []
        for (first, last), interaction in zip(self.stages, self.adapter.interactions, strict=True):
            # What goes along in front of the patches, blocks change and exchanges leave alone.
            blocks = _Stage(self, embedded, front, range(first, last + 1), (height, width))
            x, c = interaction(x, c, [blocks], height, width)
            front = blocks.front
            after.append(x)
        vit = {"per_stage": after, "last": after[-1:] * len(self.strides), None: []}[self.vit_features]
        return self.adapter.maps(c1, c, vit, height, width)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        sides = images.shape[-2], images.shape[-1]
        if any(side % COARSEST or side == 0 for side in sides):
            fitting = tuple(max(COARSEST, round(side / COARSEST) * COARSEST) for side in sides)
            raise UsageError(
                f"images of {sides[0]} x {sides[1]} pixels; sides must be multiples of {COARSEST}, such as "
                f"{fitting[0]} x {fitting[1]}"
            )
        if self.training and len(images) * math.prod(sides) == COARSEST**2:
            raise UsageError(
                "the coarsest map of one image of 32 x 32 pixels is a single pixel, which batch normalisation cannot "
                "train on; take larger images, or more of them at a time"
            )
        return sides[0] // STRIDE, sides[1] // STRIDE

    def _embedded(self, images: Tensor, grid: tuple[int, int]) -> tuple[Embedded, int]:
        """Return what enters the first block, and how many tokens stand in front of the patches."""
        patch = patch_size(self.encoder)
        if patch != STRIDE:
            size = (grid[0] * patch, grid[1] * patch)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        embedded = embed_any_size(self.encoder, images, rule=POSITIONS)
        prefix = embedded.x.shape[1] - grid[0] * grid[1]
        if isinstance(self.encoder, VisionTransformer):
            return replace(embedded, x=embedded.x[:, prefix:]), 0
        return embedded, prefix


class _Stage:
    """The blocks of a stage, as a function of patch tokens; what stands in front of them is kept beside."""

    def __init__(
        self, model: ViTCoMer, embedded: Embedded, front: Tensor, numbers: range, grid: tuple[int, int]
    ) -> None:
        self.model, self.embedded, self.front, self.numbers, self.grid = model, embedded, front, numbers, grid

    def __call__(self, x: Tensor) -> Tensor:
        """Return the patch tokens (B, N, D) behind the stage's blocks."""
        encoder, prefix = self.model.encoder, self.front.shape[1]
        x = torch.cat([self.front, x], dim=1) if prefix else x
        for number in self.numbers:
            if window := self.model.windows[number]:
                recompute = bool(getattr(encoder, "grad_checkpointing", False))
                x = run_windowed(encoder.blocks[number], x, self.grid, window, recompute)
            else:
                x, _ = run_blocks(encoder, replace(self.embedded, x=x), start=number, stop=number + 1)
        self.front = x[:, :prefix]
        return x[:, prefix:]


def _checked_stages(indexes: Sequence[Sequence[int]], count: int) -> list[tuple[int, int]]:
    """Return first and last block of each stage, which follow on one another from the first block to the last."""
    stages = [(int(first), int(last)) for first, last in indexes]
    begins = [0, *(last + 1 for _, last in stages[:-1])]
    fits = all(begin == first <= last for begin, (first, last) in zip(begins, stages, strict=True))
    if not fits or stages[-1][1] != count - 1:
        raise UsageError(
            f"interaction_indexes are {stages}: stages must follow on one another from block 0 to block {count - 1}, "
            f"such as {equal_stages(count) if count >= 4 else [(0, count - 1)]}"
        )
    return stages


def _checked_windows(encoder: Encoder, window_size: Sequence[int | None] | None) -> list[int | None]:
    count = depth(encoder)
    windows: list[int | None] = list(window_size) if window_size is not None else [None] * count
    if len(windows) != count:
        raise UsageError(f"window_size has {len(windows)} values, and the encoder {count} blocks; give one for each")
    for number, window in enumerate(windows):
        if window:
            check_windowed(encoder.blocks[number])
    return windows


def _by_stage(name: str, value: bool | Sequence[bool], count: int) -> list[bool]:
    values = [bool(value)] * count if isinstance(value, (bool, int)) else [bool(each) for each in value]
    if len(values) != count:
        raise UsageError(f"{name} has {len(values)} values for {count} stages; give one for all, or one for each")
    return values


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
