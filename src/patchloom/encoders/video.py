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
from typing import Any, Literal, get_args

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders.cosine_attention import CosineAttention
from patchloom.encoders.families import Embedded, register
from patchloom.encoders.patches import Grid, patch_grid, shown
from patchloom.encoders.positions import PositionRule, running_positions
from patchloom.encoders.timm_families import VisionTransformers
from patchloom.errors import UsageError, unknown_name

FRAMES, TUBELET = 16, 2
Positions = Literal["running", "interpolated"]


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
        self.strict_img_size = False  # positions are computed for the clip at hand

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
            UsageError: No clips, frames that tubes do not fill, or, where it is strict, another size than its own.
        """
        if clips.ndim != 5:
            raise UsageError(f"the encoder takes clips (B, C, T, H, W), and was given shape {tuple(clips.shape)}")
        if self.strict_img_size and tuple(clips.shape[2:]) != tuple(self.img_size):
            raise UsageError(
                f"clips of {shown(tuple(clips.shape[2:]))} pixels; the encoder is set up for "
                f"{shown(self.img_size)}, and is set up for others by set_image_size"
            )
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
        cos_attn: Attention by cosines, see `cosine_attention`.
        positions: `running`: computed for the clip at hand. `interpolated`: those of 16 frames of 224 pixels, resampled
            to the clip at hand.
        **model_args: Those of timm's `VisionTransformer`; positions are computed, and none is learnt. `global_pool`
            may be `token` without a class token: the first token after the norm.

    Raises:
        UsageError: Unknown `positions`.
    """

    position_table: Tensor

    def __init__(
        self,
        num_frames: int = FRAMES,
        tubelet_size: int = TUBELET,
        cos_attn: bool = False,
        positions: Positions = "running",
        **model_args: Any,
    ) -> None:
        if positions not in get_args(Positions):
            raise unknown_name("positions", positions, get_args(Positions))
        embed_layer = partial(TubeletEmbed, num_frames=num_frames, tubelet_size=tubelet_size)
        arguments = {**model_args, "embed_layer": embed_layer, "pos_embed": "none"}
        if cos_attn:
            arguments["attn_layer"] = CosineAttention
        first = arguments.get("global_pool") == "token" and not arguments.get("class_token", True)
        if first:
            arguments |= {"global_pool": "", "fc_norm": False}
        super().__init__(**arguments)
        if first:
            self.global_pool = "token"
        self.positions = positions
        self.set_positions()

    def set_positions(self) -> None:
        """Compute the positions of clips of the size it is set up for; they are in no checkpoint."""
        device = self.patch_embed.proj.weight.device
        table = self.positions_of(self.patch_embed.grid_size)
        self.register_buffer("position_table", table.to(device), persistent=False)

    def positions_of(self, grid: Grid) -> Tensor:
        """Return the positions (N, D) float32 of a grid of patches (time, down, across)."""
        if self.positions == "interpolated":
            tubelet, side, _ = self.patch_embed.patch_size
            made_for = (FRAMES // tubelet, 224 // side, 224 // side)
            if grid != made_for:
                table = running_positions(math.prod(made_for), self.embed_dim)
                return interpolated_positions(table, made_for, grid)
        return running_positions(math.prod(grid), self.embed_dim)

    def _pos_embed(self, x: Tensor) -> Tensor:
        table = self.position_table
        if x.shape[1] != len(table):
            if self.positions == "interpolated":
                raise UsageError(
                    "positions are resampled to the clips the encoder is set up for; call set_image_size first"
                )
            table = running_positions(x.shape[1], x.shape[2])
        with_prefix: Tensor = super()._pos_embed(x + table.to(x))
        return with_prefix


def interpolated_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Return positions of another grid: bicubic down and across at each time, then linear in time.

    So fine-tuning in VideoMAE V2's published code changes positions for other sizes and lengths of clips.

    Args:
        table: (N, D), of a grid (time, down, across).
        old: That grid.
        new: The other.

    Returns:
        (N', D).
    """
    maps = table.unflatten(0, old).permute(0, 3, 1, 2)  # (t, D, h, w)
    if old[1:] != new[1:]:
        maps = F.interpolate(maps, size=new[1:], mode="bicubic", align_corners=False)
    lines = maps.permute(2, 3, 1, 0).flatten(0, 1)  # (h w, D, t)
    if old[0] != new[0]:
        lines = F.interpolate(lines, size=new[0], mode="linear", align_corners=False)
    return lines.unflatten(0, new[1:]).permute(3, 0, 1, 2).reshape(-1, table.shape[1])


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
        encoder.set_positions()
        channels = encoder.pretrained_cfg["input_size"][0]
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (channels, *size[1:])}

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return what enters the first block: the positions are those of as many tokens as there are."""
        if grid == self.grid_size(encoder):
            return self.add_positions(encoder, x)
        return Embedded(encoder.pos_drop(x + encoder.positions_of(grid).to(x)))

    def undecayed(self, encoder: Any) -> set[str]:
        """Return the factors that heads of cosine attention learn."""
        return {name for name, _ in encoder.named_parameters() if name.endswith(".attn.scale")}

    def classifier_arguments(self, encoder: Any, mean: bool) -> dict[str, Any]:
        """Return the arguments of a module with a norm behind its mean pooling, or one that reads its first token."""
        return {"global_pool": "avg", "fc_norm": True} if mean else {"global_pool": "token", "fc_norm": False}


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


_cfgs: dict[str, Any] = {f"videomae_{size}_patch16_224": _cfg() for size in ("tiny", "small", "base", "large", "huge")}
default_cfgs = generate_default_cfgs({**_cfgs, "videomae_giant_patch14_224": _cfg()})


TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
GIANT = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "patch_size": 14, "mlp_ratio": 48 / 11}


def _create(variant: str, pretrained: bool, shape: dict[str, Any], **kwargs: Any) -> VideoTransformer:
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


@register_model
def videomae_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """Width 1280, 32 blocks, 16 heads: the paper's huge encoder."""
    return _create("videomae_huge_patch16_224", pretrained, HUGE, **kwargs)


@register_model
def videomae_giant_patch14_224(pretrained: bool = False, **kwargs: Any) -> VideoTransformer:
    """Width 1408, 40 blocks, 16 heads, patches of 14 pixels: VideoMAE V2's giant encoder of a billion parameters."""
    return _create("videomae_giant_patch14_224", pretrained, GIANT, **kwargs)
