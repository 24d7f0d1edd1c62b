"""Encoders of volumes: a plain ViT whose patches are boxes of voxels, as timm models.

Tokens come with the last axis fastest. Positions are sines and cosines of the place along each axis, computed for the
grid at hand, or learnt. The sizes are those of Hi-End-MAE (Tan et al. 2025, arXiv 2502.08347), and small ones.

>>> import torch
>>> from patchloom.encoders import create_encoder, feature_map, grid_size, patch_shape
>>> encoder = create_encoder("volume_vit_micro_patch4_32", image_size=(8, 16, 16), patch_size=(2, 4, 4), in_chans=1)
>>> grid_size(encoder), patch_shape(encoder)
((4, 4, 4), (2, 4, 4))
>>> feature_map(encoder, torch.randn(1, 1, 8, 16, 16)).shape
torch.Size([1, 96, 4, 4, 4])
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders.families import Embedded, register
from patchloom.encoders.patches import Grid, patch_grid, shown
from patchloom.encoders.positions import TIMM_RULE, PositionRule, resample_positions, sincos_positions
from patchloom.encoders.timm_families import VisionTransformers
from patchloom.errors import UsageError, unknown_name

AXES = (0, 1, 2)
"""Order in which columns of the positions encode the axes: the first axis first."""


def volume_positions(dim: int, grid: Grid) -> Tensor:
    """Return sine-cosine positions (1, N, dim) of a grid of three axes: sines, then cosines of each axis in turn.

    Args:
        dim: Width, divisible by 6.
        grid: Patches along each axis.

    Raises:
        UsageError: The width is not divisible by 6.
    """
    return sincos_positions(dim, grid, prefix=0, axes=AXES).unsqueeze(0)


class VolumeEmbed(nn.Module):
    """Patch embedding of volumes by one convolution over boxes: a stand-in for timm's `PatchEmbed`.

    Args:
        img_size: Side of the volumes, or (H, W), voxels.
        num_slices: Depth D of the volumes; default: the first of the other sides.
        patch_size: Side of a patch, or its three sides.
        in_chans: Channels of a volume.
        embed_dim: Width D of the tokens.
        bias: The convolution has a bias.
        **unused: What timm passes to `PatchEmbed` and has no meaning here.

    Raises:
        UsageError: Patches of other than one or three sides.
    """

    def __init__(
        self,
        img_size: int | Grid = 96,
        patch_size: int | Grid = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        bias: bool = True,
        num_slices: int | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.patch_size = _three(patch_size)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.set_size((num_slices or height, height, width))
        self.proj = nn.Conv3d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)
        self.norm = nn.Identity()
        self.strict_img_size = True

    def set_size(self, size: Grid) -> None:
        """Be set up for volumes of a size (D, H, W); no weight depends on it."""
        self.img_size = size
        self.grid_size = tuple(side // cut for side, cut in zip(size, self.patch_size, strict=True))
        self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | Grid:
        """Return how many voxels go to a token along an axis, as timm's patch embeddings do."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def forward(self, volumes: Tensor) -> Tensor:
        """Return tokens (B, N, D) of volumes (B, C, D, H, W), without positions.

        Raises:
            UsageError: No volumes, sides that patches do not fill, or others than it is set up for.
        """
        if volumes.ndim != 5:
            raise UsageError(f"the encoder takes volumes (B, C, D, H, W), and was given shape {tuple(volumes.shape)}")
        sides = tuple(volumes.shape[2:])
        if self.strict_img_size and sides != self.img_size:
            raise UsageError(
                f"volumes of {shown(sides)} voxels; the encoder is set up for {shown(self.img_size)}, and its "
                f"positions are resampled by set_image_size"
            )
        patch_grid(sides, self.patch_size)
        tokens: Tensor = self.proj(volumes).flatten(2).transpose(1, 2)
        return tokens


class VolumeTransformer(VisionTransformer):
    """A timm ViT that reads volumes (B, C, D, H, W) in boxes; class and register tokens have no position.

    Args:
        num_slices: Depth D of the volumes it is set up for; default: the first side of `img_size`, which is (H, W).
        positions: `sincos`: computed and not trained; `learned`: they begin as sines and cosines where the width is
            divisible by 6, and train.
        norm_eps: Epsilon of all layer norms.
        **model_args: Those of timm's `VisionTransformer`.

    Raises:
        UsageError: Patches that do not fill the volume, or a width that heads or computed positions do not divide.
    """

    pos_embed: Any

    def __init__(
        self,
        num_slices: int | None = None,
        positions: Literal["sincos", "learned"] = "sincos",
        norm_eps: float = 1e-6,
        **model_args: Any,
    ) -> None:
        if positions not in ("sincos", "learned"):
            raise unknown_name("positions", positions, ("sincos", "learned"))
        width, heads = int(model_args.get("embed_dim", 768)), int(model_args.get("num_heads", 12))
        if heads < 1 or width % heads:
            raise UsageError(f"embed_dim {width} is not divisible by num_heads {heads}; change one of them")
        fixed: dict[str, Any] = {
            "embed_layer": partial(VolumeEmbed, num_slices=num_slices),
            "norm_layer": partial(nn.LayerNorm, eps=norm_eps),
            "pos_embed": "learn",
            "no_embed_class": True,
        }
        super().__init__(**{**model_args, **fixed})
        if not self.pos_embed.is_meta:  # there, a model is looked at before its size is settled
            patch_grid(self.patch_embed.img_size, self.patch_embed.patch_size)
        self.positions = positions
        self.place()

    def place(self) -> None:
        """Let positions be the sines and cosines of the grid; learnt ones of another width stay as they were drawn."""
        if self.positions == "learned" and self.embed_dim % (2 * len(AXES)):
            return
        table = volume_positions(self.embed_dim, self.patch_embed.grid_size)
        like = self.pos_embed
        self.pos_embed = nn.Parameter(table.to(like), requires_grad=self.positions == "learned")


@register(VolumeTransformer)
class VolumeTransformers(VisionTransformers):
    """Volumes in boxes."""

    kind = "volume"
    patch_embeds = (VolumeEmbed,)
    square_patches = False
    module = VolumeTransformer

    def patch_shape(self, encoder: Any) -> Grid:
        """Return (depth, rows, columns) of a patch."""
        shape: Grid = encoder.patch_embed.patch_size
        return shape

    def size_arguments(self, size: Grid) -> dict[str, Any]:
        """Return the arguments that make an encoder for volumes of a size."""
        return {"img_size": size[1:], "num_slices": size[0]}

    def shape_arguments(self, encoder: Any) -> dict[str, Any]:
        """Return all arguments that make a module of its shape."""
        return super().shape_arguments(encoder) | {"patch_size": self.patch_shape(encoder)}

    def resize(self, encoder: Any, size: Grid) -> None:
        """Set the encoder up for volumes of another size, in place: its positions are computed anew or resampled."""
        old = self.grid_size(encoder)
        encoder.patch_embed.set_size(size)
        with torch.no_grad():
            table = self._positions_at(encoder, old, self.grid_size(encoder), TIMM_RULE)
        encoder.pos_embed = nn.Parameter(table.clone(), requires_grad=encoder.pos_embed.requires_grad)
        channels = encoder.pretrained_cfg["input_size"][0]
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (channels, *size[-2:])}

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return what enters the first block, with positions for another grid."""
        x = x + self._positions_at(encoder, self.grid_size(encoder), grid, rule)
        tokens = [
            token.expand(x.shape[0], -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None
        ]
        return Embedded(encoder.pos_drop(torch.cat([*tokens, x], dim=1)))

    def _positions_at(self, encoder: Any, old: Grid, new: Grid, rule: PositionRule) -> Tensor:
        """Return positions (1, N, D) for a grid; `old` is that of the encoder's own."""
        if old == new:
            own: Tensor = encoder.pos_embed
            return own
        if encoder.positions == "sincos":
            return volume_positions(int(encoder.embed_dim), new).to(encoder.pos_embed)
        return resample_positions(encoder.pos_embed, old, new, 0, rule)


@torch.no_grad()
def turn_kernels(module: nn.Module) -> None:
    """Let convolutions that were trained on (right, front, up) take (up, back, right), in place; kernels are cubes."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d):
            part.weight.copy_(_turned(part.weight))


def in_slices(encoder: VolumeTransformer) -> VolumeTransformer:
    """Return an encoder trained on volumes (right, front, up) as one of volumes (up, back, right).

    That is how volumes lie here: slices from feet to head, rows from front to back, columns from left to right. It says
    of them what the other says of theirs, token by token; its positions are a table that can be trained.
    """
    made: Any = encoder.patchloom_args
    stem: Any = encoder.patch_embed
    arguments = {name: value for name, value in made["model_args"].items() if name not in ("num_slices", "num_classes")}
    arguments |= {"img_size": stem.img_size[1::-1], "num_slices": stem.img_size[2]}
    arguments |= {"patch_size": stem.patch_size[::-1], "positions": "learned"}
    turned: Any = timm.create_model(made["architecture"], pretrained=False, num_classes=0, **arguments)
    state = dict(encoder.state_dict())
    state["patch_embed.proj.weight"] = _turned(state["patch_embed.proj.weight"])
    table = state["pos_embed"].unflatten(1, stem.grid_size)
    state["pos_embed"] = table.permute(0, 3, 2, 1, 4).flip(2).flatten(1, 3)
    turned.load_state_dict(state)
    known: Any = encoder.pretrained_cfg
    turned.pretrained_cfg = {**known}
    turned.patchloom_args = {"architecture": made["architecture"], "model_args": arguments}
    found: VolumeTransformer = turned.eval()
    return found


def _turned(kernel: Tensor) -> Tensor:
    """Return (out, in, up, back, right) of a kernel (out, in, right, front, up)."""
    return kernel.permute(0, 1, 4, 3, 2).flip(3).contiguous()


def _three(patch_size: int | Grid) -> tuple[int, int, int]:
    found = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(int(side) for side in patch_size)
    if len(found) != 3:
        raise UsageError(f"patch_size is {shown(found)}; give one side of the patches of volumes, or all three")
    return found[0], found[1], found[2]


def _cfg(side: int) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (1, side, side),  # timm takes no more; all three sides are an argument
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


MODELS: dict[str, dict[str, int]] = {
    "volume_vit_micro_patch4_32": {"embed_dim": 96, "depth": 12, "num_heads": 6, "patch_size": 4, "img_size": 32},
    "volume_vit_tiny_patch16_96": {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "img_size": 96},
    "volume_vit_small_patch16_96": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16, "img_size": 96},
    "volume_vit_base_patch16_96": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "img_size": 96},
    "volume_vit_large_patch16_96": {"embed_dim": 1536, "depth": 12, "num_heads": 16, "patch_size": 16, "img_size": 96},
    "volume_vit_large_patch12_96": {"embed_dim": 1536, "depth": 12, "num_heads": 16, "patch_size": 12, "img_size": 96},
}
"""Base and large are the paper's, large in patches of 12 the one it published; 96³ voxels."""

default_cfgs = generate_default_cfgs({name: _cfg(shape["img_size"]) for name, shape in MODELS.items()})


def _register(name: str, shape: dict[str, int]) -> None:
    def make(pretrained: bool = False, **kwargs: Any) -> VolumeTransformer:
        model: VolumeTransformer = build_model_with_cfg(VolumeTransformer, name, pretrained, **{**shape, **kwargs})
        return model

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Width {shape['embed_dim']}, {shape['depth']} blocks, patches of {shape['patch_size']} voxels."
    register_model(make)


for _name, _shape in MODELS.items():
    _register(_name, _shape)
