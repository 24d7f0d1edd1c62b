"""Images of another size than an encoder is set up for, in the same forward pass and with gradients.

Multi-crop training shows one encoder crops of two sizes. Absolute positions, relative-position tables and rotary
positions are made for the crop's grid from those of the encoder, so that crops of every size train them.

>>> import timm, torch
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> embed_any_size(encoder, torch.randn(2, 3, 96, 96)).x.shape
torch.Size([2, 37, 192])
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders.properties import Encoder, grid_size, image_size
from patchloom.encoders.resize import EXTRA_ROWS, resize_relative_table
from patchloom.encoders.stages import Embedded, embed, insert_mask_token, run_blocks
from patchloom.errors import UsageError

Grid = tuple[int, int]


@dataclass(frozen=True)
class PositionRule:
    """How absolute positions are resampled to another grid, always bicubically and in float32."""

    antialias: bool = True
    """Smooth before going to a smaller grid: timm's way, and DINOv2's with registers"""
    offset: float | None = None
    """Added to the grid's sides when the scale is computed; DINOv2 without registers: 0.1. None: scale by the sizes"""


TIMM_RULE = PositionRule()
DINOV2_RULE = PositionRule(antialias=False, offset=0.1)
"""DINO's, which DINOv2 without registers and BEiT v2's descendants follow"""


def embed_any_size(
    encoder: Encoder,
    images: Tensor,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
    rule: PositionRule = TIMM_RULE,
) -> Embedded:
    """Return the tokens that enter the first block, for images of any size patches fill.

    Args:
        encoder: A `VisionTransformer`, `Beit` or `Eva` of timm.
        images: (B, C, H, W), normalised.
        masked: (B, N) bool over the grid of these images, see `embed`.
        mask_token: (1, 1, D) or (1, D); needed with `masked`.
        rule: How absolute positions are resampled where the size is not the encoder's own.

    Raises:
        UsageError: A side is not divisible by the patch size, or the encoder cannot work at two sizes at once.
    """
    size = (images.shape[-2], images.shape[-1])
    if size == image_size(encoder):
        return embed(encoder, images, masked=masked, mask_token=mask_token)
    grid = grid_size(encoder, size)
    x = _patches(encoder, images)
    if masked is not None:
        x = insert_mask_token(x, masked, mask_token)
    if isinstance(encoder, Beit):
        embedded = _embed_beit(encoder, x, grid, rule)
    else:
        embedded = _embed_vit(encoder, x, grid, rule)
    if isinstance(norm_pre := getattr(encoder, "norm_pre", None), nn.Module):
        embedded = Embedded(norm_pre(embedded.x), embedded.block_kwargs, embedded.rope_by_block)
    return embedded


class AnySizeVisionTransformer(VisionTransformer):
    """A timm ViT that takes images of any size patches fill, as the published DINOv2 does.

    It is made of a `VisionTransformer` by `take_any_size`, has its weights and saves as it does.
    """

    position_rule: PositionRule

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the normed tokens (B, P + N, D) of (B, C, H, W) normalised images."""
        if (x.shape[-2], x.shape[-1]) == image_size(self):
            return super().forward_features(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise UsageError(f"attention masks are for images of {image_size(self)} pixels only")
        last, _ = run_blocks(self, embed_any_size(self, x, rule=self.position_rule))
        normed: Tensor = self.norm(last)
        return normed

    def get_intermediate_layers(  # type: ignore[override]
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Return patch tokens after some blocks, as the published method of this name does (specification, 2.1).

        Args:
            x: (B, C, H, W) normalised images.
            n: How many of the last blocks, or which, from 0.
            reshape: Give maps (B, D, h, w) instead of tokens (B, N, D).
            return_class_token: Give pairs of patches and class token (B, D).
            norm: Pass each through the final norm.
        """
        total = len(self.blocks)
        numbers = [number + 1 for number in (range(total - n, total) if isinstance(n, int) else n)]
        embedded = embed_any_size(self, x, rule=self.position_rule)
        _, taps = run_blocks(self, embedded, stop=max(numbers), taps=numbers)
        grid = grid_size(self, (x.shape[-2], x.shape[-1]))
        found: list[Any] = []
        for number in numbers:
            out = self.norm(taps[number]) if norm else taps[number]
            patches = out[:, self.num_prefix_tokens :]
            if reshape:
                patches = patches.transpose(1, 2).reshape(len(x), -1, *grid)
            found.append((patches, out[:, 0]) if return_class_token else patches)
        return tuple(found)


def take_any_size(encoder: Encoder, rule: PositionRule = TIMM_RULE) -> Encoder:
    """Let a `VisionTransformer` take images of any size from now on, in place, and return it."""
    encoder.__class__ = AnySizeVisionTransformer
    encoder.position_rule = rule
    return encoder


def resample_positions(positions: Tensor, old: Grid, new: Grid, prefix: int, rule: PositionRule = TIMM_RULE) -> Tensor:
    """Return absolute positions for another grid.

    Args:
        positions: (1, prefix + h·w, D).
        old: (h, w) the positions are for.
        new: (h', w') they shall be for.
        prefix: Positions in front that belong to class and register tokens; they stay.
        rule: How.

    Returns:
        (1, prefix + h'·w', D), differentiable; `positions` itself where the grid is the same.
    """
    if old == new:
        return positions
    front, rest = positions[:, :prefix], positions[:, prefix:]
    maps = rest.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    where: dict[str, Any] = {"size": new}
    if rule.offset is not None:
        where = {"scale_factor": tuple((n + rule.offset) / o for n, o in zip(new, old, strict=True))}
    maps = F.interpolate(maps, mode="bicubic", antialias=rule.antialias, **where)
    return torch.cat([front, maps.permute(0, 2, 3, 1).flatten(1, 2).to(positions)], dim=1)


def _patches(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the patch embedding (B, N, D) at any size; timm's own refuses other sizes than it was made for."""
    stem = encoder.patch_embed
    strict = getattr(stem, "strict_img_size", False)
    stem.strict_img_size = False
    try:
        x: Tensor = stem(images)
    finally:
        stem.strict_img_size = strict
    return x if x.ndim == 3 else x.flatten(1, 2)


def _embed_vit(encoder: Encoder, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
    family = Eva if isinstance(encoder, Eva) else VisionTransformer
    if type(encoder)._pos_embed is not family._pos_embed:
        raise UsageError(f"{type(encoder).__name__} takes images of its own size only; let all crops have that size")
    tokens = [token.expand(len(x), -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    positions = encoder.pos_embed
    if positions is not None:
        prefix = 0 if encoder.no_embed_class else int(encoder.num_prefix_tokens)
        positions = resample_positions(positions, grid_size(encoder), grid, prefix, rule)
        if encoder.no_embed_class:
            x = x + positions
    x = torch.cat([*tokens, x], dim=1)
    if positions is not None and not encoder.no_embed_class:
        x = x + positions
    x = encoder.pos_drop(x)
    rope = getattr(encoder, "rope", None)
    if not isinstance(encoder, Eva) or rope is None:
        return Embedded(x, {"rope": None} if isinstance(encoder, Eva) else {})
    angles = _rotary(rope, grid)
    if getattr(encoder, "rope_mixed", False):
        return Embedded(x, {"rope": angles[-1]}, angles)
    return Embedded(x, {"rope": angles})


def _rotary(rope: Any, grid: Grid) -> Tensor:
    """Return the rotary positions of a grid; those with a cache of one grid get it made anew in a copy."""
    if not any(True for _ in rope.parameters()):  # learned frequencies are no cache, and must learn themselves
        rope = copy.deepcopy(rope)
        if getattr(rope, "feat_shape", None) is not None:
            rope.update_feat_shape(list(grid))
    angles: Tensor = rope.get_embed(shape=list(grid))
    return angles


def _embed_beit(encoder: Encoder, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
    if encoder.blocks[0].attn.relative_position_bias_table is not None:
        raise UsageError(
            "an encoder with a relative-position table in every block takes images of its own size only; let all "
            "crops have that size, or take one with a shared table (ccvit_*) or with absolute positions (vit_*)"
        )
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    if encoder.pos_embed is not None:
        x = x + resample_positions(encoder.pos_embed, grid_size(encoder), grid, 1, rule)
    bias = None
    if encoder.rel_pos_bias is not None:
        table = encoder.rel_pos_bias.relative_position_bias_table
        matrix = _relative_matrix(grid_size(encoder), grid).to(table)
        table = torch.cat([matrix @ table[:-EXTRA_ROWS], table[-EXTRA_ROWS:]])
        index = gen_relative_position_index(grid).to(table.device)
        bias = table[index].permute(2, 0, 1).contiguous()  # (heads, 1 + N, 1 + N)
    return Embedded(encoder.pos_drop(x), {"shared_rel_pos_bias": bias})


@lru_cache(maxsize=8)
def _relative_matrix(old: Grid, new: Grid) -> Tensor:
    """Return the resampling of relative-position tables as a matrix: it is linear, and so learns through it."""
    rows = math.prod(2 * side - 1 for side in old)
    identity = torch.cat([torch.eye(rows), torch.zeros(EXTRA_ROWS, rows)])
    return resize_relative_table(identity, old, new)[:-EXTRA_ROWS]
