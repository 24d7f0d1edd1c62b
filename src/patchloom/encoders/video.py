"""Encoders of clips: VideoMAE's ViT (Tong et al. 2022, arXiv 2203.12602), as timm models.

A patch is a tube of pixels through some frames; tokens come frame by frame, then row by row, without class token, and
a fixed sine-cosine position runs over all of them, so clips of any length and size can be read. AdaptFormer's video
model is one of these.

>>> import torch
>>> from patchloom.encoders import create_encoder, feature_map, grid_size, patch_shape
>>> encoder = create_encoder("videomae_tiny_patch16_224", image_size=(8, 32, 32))
>>> grid_size(encoder), patch_shape(encoder)
((4, 2, 2), (2, 16, 16))
>>> feature_map(encoder, torch.randn(1, 3, 8, 32, 32)).shape
torch.Size([1, 192, 4, 2, 2])
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders.families import Embedded, register
from patchloom.encoders.patches import Grid, patch_grid
from patchloom.encoders.positions import PositionRule, running_positions
from patchloom.encoders.timm_families import VisionTransformers
from patchloom.errors import UsageError

FRAMES, TUBELET = 16, 2


class TubeletEmbed(nn.Module):
    """Patch embedding of clips by one convolution over tubes: a stand-in for timm's `PatchEmbed`.

    Args:
        img_size: Side of the frames, or (H, W), pixels.
        patch_size: Side of a patch.
        in_chans: Channels of a frame.
        embed_dim: Width D of the tokens.
        bias: The convolution has a bias.
        num_frames: Frames of a clip the encoder is set up for; others can be read.
        tubelet_size: Frames in a tube.
        **unused: What timm passes to `PatchEmbed` and has no meaning here.

    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        num_frames: int = FRAMES,
        tubelet_size: int = TUBELET,
        **unused: Any,
    ) -> None:
        super().__init__()
        side = patch_size if isinstance(patch_size, int) else int(patch_size[0])
        self.patch_size: tuple[int, int, int] = (tubelet_size, side, side)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.set_size((num_frames, int(height), int(width)))
        self.proj = nn.Conv3d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)
        self.norm = nn.Identity()

    def set_size(self, size: Grid) -> None:
        """Be set up for clips of a size (T, H, W); no weight depends on it."""
        self.img_size = size
        self.grid_size = tuple(side // cut for side, cut in zip(size, self.patch_size, strict=True))
        self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return how many pixels of a frame go to a token, as timm's patch embeddings do."""
        return self.patch_size[1] if as_scalar else self.patch_size[1:]

    def forward(self, clips: Tensor) -> Tensor:
        """Return tokens (B, N, D) of clips (B, C, T, H, W), without positions.

        Raises:
            UsageError: No clips, or frames that tubes do not fill.
        """
        if clips.ndim != 5:
            raise UsageError(f"the encoder takes clips (B, C, T, H, W), and was given shape {tuple(clips.shape)}")
        tubelet, side, _ = self.patch_size
        if clips.shape[2] % tubelet:
            raise UsageError(f"{clips.shape[2]} frames are not divisible by the tubelet size {tubelet}")
        patch_grid((int(clips.shape[3]), int(clips.shape[4])), side)
        tokens: Tensor = self.proj(clips).flatten(2).transpose(1, 2)
        return tokens


class VideoTransformer(VisionTransformer):
    """A timm ViT that reads clips (B, C, T, H, W) in tubes.

    Args:
        num_frames: Frames of a clip it is set up for; others can be read.
        tubelet_size: Frames in a tube.
        **model_args: Those of timm's `VisionTransformer`; positions are computed, and none is learnt.
    """

    def __init__(self, num_frames: int = FRAMES, tubelet_size: int = TUBELET, **model_args: Any) -> None:
        embed_layer = partial(TubeletEmbed, num_frames=num_frames, tubelet_size=tubelet_size)
        super().__init__(**{**model_args, "embed_layer": embed_layer, "pos_embed": "none"})

    def _pos_embed(self, x: Tensor) -> Tensor:
        with_prefix: Tensor = super()._pos_embed(x + running_positions(x.shape[1], x.shape[2]).to(x))
        return with_prefix


@register(VideoTransformer)
class VideoTransformers(VisionTransformers):
    """Clips in tubes, with positions that are computed for the clip at hand."""

    kind = "clip"
    patch_embeds = (TubeletEmbed,)

    def patch_shape(self, encoder: Any) -> Grid:
        """Return (frames, rows, columns) of a tube."""
        shape: Grid = encoder.patch_embed.patch_size
        return shape

    def sides(self, own: Grid, size: int | Grid) -> Grid:
        """Return (T, H, W); a side, or (H, W), leaves the number of frames as it is."""
        height_and_width = (size, size) if isinstance(size, int) else size
        return super().sides(own, (*own[:1], *height_and_width) if len(height_and_width) == 2 else height_and_width)

    def size_arguments(self, size: Grid) -> dict[str, Any]:
        """Return the arguments that make an encoder for clips of a size."""
        return {"img_size": size[1:], "num_frames": size[0]}

    def resize(self, encoder: Any, size: Grid) -> None:
        """Set the encoder up for clips of another size, in place."""
        encoder.patch_embed.set_size(size)
        channels = encoder.pretrained_cfg["input_size"][0]
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (channels, *size[1:])}

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return what enters the first block: the positions are those of as many tokens as there are."""
        return self.add_positions(encoder, x)


def _cfg(side: int = 224) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),  # timm takes no more; the frames are an argument
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"videomae_{size}_patch16_224": _cfg() for size in ("tiny", "small", "base", "large")}
)


TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def _create(variant: str, pretrained: bool, shape: dict[str, int], **kwargs: Any) -> VideoTransformer:
    model_args = {"patch_size": 16, "class_token": False, "global_pool": "avg", "fc_norm": True, **shape, **kwargs}
    model: VideoTransformer = build_model_with_cfg(VideoTransformer, variant, pretrained, **model_args)
    return model


@register_model
def videomae_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """Width 192, 12 blocks, 3 heads."""
    return _create("videomae_tiny_patch16_224", pretrained, TINY, **kwargs)


@register_model
def videomae_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """Width 384, 12 blocks, 6 heads: the paper's small encoder."""
    return _create("videomae_small_patch16_224", pretrained, SMALL, **kwargs)


@register_model
def videomae_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """Width 768, 12 blocks, 12 heads: the paper's base encoder, and AdaptFormer's for video."""
    return _create("videomae_base_patch16_224", pretrained, BASE, **kwargs)


@register_model
def videomae_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """Width 1024, 24 blocks, 16 heads: the paper's large encoder."""
    return _create("videomae_large_patch16_224", pretrained, LARGE, **kwargs)
