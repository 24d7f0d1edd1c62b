"""ViTamin as a source of dense features (Chen et al. 2024, arXiv 2404.02132): stages, and windows over large images.

The trunk is timm's (`timm.models.vitamin`). What is here: the maps of its stages, and the sliding window by which
FC-CLIP with ViTamin (github.com/Beckschen/ViTamin, `extract_features_vitamin`) takes images larger than the trunk was
trained on.

>>> import timm, torch, patchloom
>>> trunk = timm.create_model("vitamin_tiny_64", num_classes=0).eval()
>>> maps = SlidingWindowFeatures(trunk, stride=32)(torch.zeros(1, 3, 96, 128))
>>> {name: tuple(value.shape[1:]) for name, value in maps.items()}  # doctest: +NORMALIZE_WHITESPACE
{'stem': (16, 48, 64), 'stage1': (16, 24, 32), 'stage2': (32, 12, 16), 'tokens': (96, 6, 8), 'res5': (96, 3, 4),
 'dense': (96, 6, 8)}
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, resample_abs_pos_embed
from timm.models.vitamin import MbConvStages
from torch import Tensor, nn

from patchloom.encoders import image_size
from patchloom.errors import UsageError
from patchloom.systems.clip.model import ImageTower

STRIDES = {"stem": 2, "stage1": 4, "stage2": 8, "tokens": 16}
"""Pixels from one place of a map to the next."""
CELL = 16


def require_vitamin(trunk: Any) -> None:
    """Refuse what is no ViTamin.

    Raises:
        UsageError: It has other stages.
    """
    embed = getattr(trunk, "patch_embed", None)
    if not isinstance(embed, HybridEmbed) or not isinstance(embed.backbone, MbConvStages):
        raise UsageError(f"a {type(trunk).__name__} has not the stages of ViTamin; take one of the vitamin_* models")


def stage_maps(trunk: Any, images: Tensor, add_pos_embed: bool = True) -> dict[str, Tensor]:
    """Return the maps of a ViTamin's stages.

    Args:
        trunk: A `vitamin_*` model of timm.
        images: (B, C, H, W), normalised, sides multiples of 16; positions are resampled for another size than its own.
        add_pos_embed: The published window pass leaves the positions out; the trunk was trained with them.

    Returns:
        `stem` (B, c, H/2, W/2), `stage1` (B, c, H/4, W/4), `stage2` (B, c, H/8, W/8), `tokens` (B, D, H/16, W/16).
    """
    backbone = trunk.patch_embed.backbone
    stem = backbone.stem(images)
    first = backbone.stages[0](stem)
    second = backbone.stages[1](first)
    embedded = backbone.pool(second)
    grid = embedded.shape[-2:]
    x = embedded.flatten(2).transpose(1, 2)
    if add_pos_embed and trunk.pos_embed is not None:
        positions = trunk.pos_embed
        own = tuple(trunk.patch_embed.grid_size)
        if tuple(grid) != own:
            positions = resample_abs_pos_embed(positions, list(grid), list(own), num_prefix_tokens=0)
        x = x + positions
    x = trunk.norm_pre(trunk.patch_drop(trunk.pos_drop(x)))
    for block in trunk.blocks:
        x = block(x)
    return {"stem": stem, "stage1": first, "stage2": second, "tokens": x.transpose(1, 2).unflatten(2, grid)}


class ViTaminTower(ImageTower):
    """The image tower of a ViTamin CLIP; beside its embedding (B, D) it gives the maps of its stages."""

    def intermediates(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of the stages, see `stage_maps`, and `dense`, the final norm of the tokens (B, D, h, w)."""
        maps = stage_maps(self.trunk, images)
        return {**maps, "dense": dense_map(self.trunk, maps["tokens"])}


def dense_map(trunk: Any, tokens: Tensor) -> Tensor:
    """Return the final norm of tokens (B, D, h, w), which in ViTamins is the identity."""
    normed: Tensor = trunk.norm(tokens.flatten(2).transpose(1, 2))
    return normed.transpose(1, 2).unflatten(2, tokens.shape[-2:])


class SlidingWindowFeatures(nn.Module):
    """Maps of a ViTamin over images of any size, by windows of the size that it was trained on.

    Windows go through all stages one by one, row after row, the last of a row or column shifted back inside; where they
    overlap, their maps are averaged.

    Args:
        trunk: A `vitamin_*` model of timm.
        window: Side of a window in pixels, a multiple of 16; default: what the trunk is set up for. Published: 336.
        stride: Pixels from one window to the next, a multiple of 16; default: `window`. Published: 112 in tests, 336 in
            training.
        add_pos_embed: Add the positions in every window; the published code leaves them out.

    Raises:
        UsageError: The trunk is no ViTamin, or window or stride is none that fits.
    """

    def __init__(
        self, trunk: Any, window: int | None = None, stride: int | None = None, add_pos_embed: bool = True
    ) -> None:
        super().__init__()
        require_vitamin(trunk)
        window = image_size(trunk)[0] if window is None else int(window)
        stride = window if stride is None else int(stride)
        for name, value in (("window", window), ("stride", stride)):
            if value < CELL or value % CELL:
                raise UsageError(f"{name} is {value}; it must be a multiple of {CELL}, the stride of ViTamin")
        if stride > window:
            raise UsageError(f"stride {stride} is larger than window {window}, so pixels between windows would be lost")
        self.trunk, self.window, self.stride, self.add_pos_embed = trunk, window, stride, add_pos_embed

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of images.

        Args:
            images: (B, C, H, W), normalised. What does not fill windows or cells is padded at the right and the bottom
                with what black becomes by the trunk's normalisation, and maps end where the image does.

        Returns:
            `stem`, `stage1`, `stage2`, `tokens` (FC-CLIP's `stem`, `res2`, `res3`, `res4`), `res5` (every second of
            `tokens` in both directions) and `dense` (`clip_vis_dense`).
        """
        sides = tuple(images.shape[-2:])
        padded = self._padded(images)
        height, width = padded.shape[-2:]
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for top in self._starts(height):
            for left in self._starts(width):
                view = padded[..., top : top + self.window, left : left + self.window]
                for name, part in stage_maps(self.trunk, view, self.add_pos_embed).items():
                    step = STRIDES[name]
                    if name not in sums:
                        sums[name] = part.new_zeros(*part.shape[:2], height // step, width // step)
                        counts[name] = part.new_zeros(1, 1, height // step, width // step)
                    rows = slice(top // step, top // step + part.shape[2])
                    columns = slice(left // step, left // step + part.shape[3])
                    sums[name][..., rows, columns] += part
                    counts[name][..., rows, columns] += 1
        maps = {name: total / counts[name] for name, total in sums.items()}
        maps = {
            name: value[..., : -(-sides[0] // STRIDES[name]), : -(-sides[1] // STRIDES[name])]
            for name, value in maps.items()
        }
        tokens = maps["tokens"]
        return {**maps, "res5": tokens[..., ::2, ::2], "dense": dense_map(self.trunk, tokens)}

    def _starts(self, side: int) -> list[int]:
        """Return where windows begin along a side."""
        count = -(-max(0, side - self.window) // self.stride) + 1
        return [min(number * self.stride, side - self.window) for number in range(count)]

    def _padded(self, images: Tensor) -> Tensor:
        target = [max(self.window, -(-side // CELL) * CELL) for side in images.shape[-2:]]
        missing = [wanted - side for wanted, side in zip(target, images.shape[-2:], strict=True)]
        if not any(missing):
            return images
        known = self.trunk.pretrained_cfg
        mean, std = (torch.tensor(known[name], device=images.device, dtype=images.dtype) for name in ("mean", "std"))
        black = (-mean / std).view(1, -1, 1, 1)
        return F.pad(images - black, (0, missing[1], 0, missing[0])) + black
