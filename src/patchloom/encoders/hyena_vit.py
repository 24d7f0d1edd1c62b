"""Vision Transformers with the Hyena operator in the place of attention, in all blocks or in some, as timm models.

Zimerman and Wolf 2024, "Multi-Dimensional Hyena for Spatial Inductive Bias", AISTATS (arXiv 2309.13600): for training
from scratch on few images, and for many patches. There is no class token, which has no place in a grid.

>>> import torch
>>> from patchloom.encoders import create_encoder, feature_map, pooled
>>> encoder = create_encoder("hyena_vit_micro_patch4_32", mixer="hyena_then_attention")
>>> images = torch.randn(1, 3, 32, 32)
>>> feature_map(encoder, images).shape, pooled(encoder, images).shape
(torch.Size([1, 96, 8, 8]), torch.Size([1, 96]))
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from patchloom.encoders.families import Embedded, family_of, register
from patchloom.encoders.hyena import DIRECTIONS, HyenaND
from patchloom.encoders.implicit_filters import Kind
from patchloom.encoders.micro import _cfg as _small_cfg
from patchloom.encoders.patches import Grid
from patchloom.encoders.positions import PositionRule
from patchloom.encoders.timm_families import VisionTransformers
from patchloom.errors import UsageError, unknown_name

Mixer = Literal["hyena", "hyena_then_attention", "attention_then_hyena", "alternate", "sequence", "attention"]
MIXERS = {
    "hyena2d": "hyena",
    "hyena2dattn": "hyena_then_attention",
    "attnhyena2d": "attention_then_hyena",
    "onebyone": "alternate",
}
"""Our names by those of the published code; its `hyena`, over the row of all tokens, is `sequence` here."""
KINDS_OF_MIXER = (*MIXERS.values(), "sequence", "attention")


def is_hyena(mixer: str, number: int, depth: int) -> bool:
    """Return whether a block (0-based) has the operator in the place of attention.

    >>> ["".join("ah"[is_hyena(m, n, 4)] for n in range(4)) for m in ("hyena_then_attention", "alternate")]
    ['hhha', 'haha']
    """
    if mixer == "hyena_then_attention":
        return number <= depth // 2
    if mixer == "attention_then_hyena":
        return number > depth // 2
    return number % 2 == 0 if mixer == "alternate" else mixer != "attention"


class HyenaBlock(Block):
    """timm's block, told of the grid of its tokens where that is not the encoder's own."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, grid: Grid | None = None
    ) -> Tensor:
        """Return tokens (B, N, D) of tokens (B, N, D).

        Raises:
            UsageError: An attention mask where there is no attention.
        """
        if isinstance(self.attn, HyenaND):
            if attn_mask is not None or is_causal:
                raise UsageError("a block with the Hyena operator has no attention to mask; leave the mask out")
            mixed = self.attn(self.norm1(x), grid)
        else:
            mixed = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(mixed))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


class HyenaTransformer(VisionTransformer):
    """A timm ViT without class token, with the Hyena operator as `attn` of some or all blocks.

    Args:
        mixer: Which blocks have the operator. `hyena`: all. `hyena_then_attention`: those up to number depth // 2.
            `attention_then_hyena`: those behind. `alternate`: every other block, from the first. `sequence`: all, over
            the row of tokens instead of their grid. `attention`: none. Published names are accepted.
        direction: See `HyenaND`; `reverse_first` is for even blocks, odd ones have `forward`.
        order: See `HyenaND`, as the next six.
        filter_width: Width of the networks that make filters.
        filter_kind: joint, product or explicit.
        window: exp, learned, symmetric or none.
        sqrt_decay: Take the root of the window.
        emb_dim: Features of a place along an axis.
        conv_scale: official, or a number.
        global_pool: `avg`: the classifier reads the mean over patches. `first`: the first patch, top left, as
            published.
        paper_optim: Weight decay applies to learnt places, frequencies and rates, as in the published training.
        **model_args: Those of timm's `VisionTransformer`; `proj_drop_rate` is the operator's dropout, too.

    Raises:
        UsageError: A class token, registers, patches dropped at random, or what `HyenaND` refuses.
    """

    def __init__(
        self,
        mixer: str = "hyena",
        direction: str = "reverse_first",
        order: int = 2,
        filter_width: int = 64,
        filter_kind: Kind = "joint",
        window: str = "exp",
        sqrt_decay: bool = False,
        emb_dim: int = 3,
        conv_scale: Literal["official"] | float = "official",
        global_pool: str = "avg",
        paper_optim: bool = False,
        **model_args: Any,
    ) -> None:
        mixer = MIXERS.get(mixer, mixer)
        if mixer not in KINDS_OF_MIXER:
            raise unknown_name("mixer", mixer, (*KINDS_OF_MIXER, *MIXERS))
        hyena = mixer != "attention"
        if model_args.get("class_token") or model_args.get("reg_tokens"):
            raise UsageError(
                "class and register tokens have no place in the grid of the Hyena operator; leave them out"
            )
        if hyena and model_args.get("patch_drop_rate"):
            raise UsageError("the Hyena operator needs the whole grid of patches; leave patch_drop_rate out")
        if model_args.get("dynamic_img_size"):
            raise UsageError("dynamic_img_size is not for the Hyena operator; image_size sets it up for another size")
        first = global_pool in ("first", "token")
        super().__init__(
            **{
                "block_fn": HyenaBlock,
                "fc_norm": False,
                **model_args,
                "class_token": False,
                "global_pool": "avg" if first else global_pool,
            }
        )
        if first:
            self.global_pool = "token"  # timm's word for the first of the row
        self.mixer, self.paper_optim = mixer, paper_optim
        direction = DIRECTIONS.get(direction, direction)
        grid = tuple(self.patch_embed.grid_size)
        for number, block in enumerate(self.blocks):
            if not is_hyena(mixer, number, len(self.blocks)):
                continue
            once = mixer == "sequence" or (direction == "reverse_first" and number % 2)
            block.attn = HyenaND(
                self.embed_dim,
                (math.prod(grid),) if mixer == "sequence" else grid,
                order,
                filter_width,
                "forward" if once else direction,
                conv_scale,
                filter_kind=filter_kind,
                window=window,
                sqrt_decay=sqrt_decay,
                emb_dim=emb_dim,
                dropout=float(model_args.get("proj_drop_rate", 0.0)),
                causal=mixer == "sequence",
            )
            for module in block.attn.modules():
                if isinstance(module, nn.Linear):  # those of the filters as well, as published
                    trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that do not decay."""
        return {"pos_embed", *family_of(self).undecayed(self)}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Set it up for images of another size: positions and filters are resampled."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.resize_filters()

    def resize_filters(self) -> None:
        """Resample the filters of all blocks for the grid of the patch embedding."""
        grid = tuple(self.patch_embed.grid_size)
        for block in self.blocks:
            if isinstance(block.attn, HyenaND):
                block.attn.resize((math.prod(grid),) if len(block.attn.grid) == 1 else grid)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier in place, of the mean over patches (`avg`) or of the first (`first`)."""
        first = global_pool in ("first", "token")
        super().reset_classifier(num_classes, "avg" if first else global_pool)
        if first:
            self.global_pool = "token"


class AttentionTransformer(HyenaTransformer):
    """The same with attention in all blocks, which the published code compares with."""


@register(HyenaTransformer)
class HyenaTransformers(VisionTransformers):
    """Patches stay in their grid, whose every place a convolution reads from."""

    takes_registers = False
    drops_tokens = False
    has_class_token = False

    def undecayed(self, encoder: Any) -> set[str]:
        """Return the names of learnt places, frequencies and rates, unless they decay as published."""
        own = (".filters.z.", ".filters.freq", ".filters.deltas")
        names = (name for name, _ in encoder.named_parameters())
        found = set() if encoder.paper_optim else {name for name in names if any(part in name for part in own)}
        return super().undecayed(encoder) | found

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return what enters the first block; filters are resampled for the grid in each."""
        return replace(super().add_positions_at(encoder, x, grid, rule), block_kwargs={"grid": grid})


@register(AttentionTransformer)
class AttentionTransformers(HyenaTransformers):
    """Attention reads whatever patches there are."""

    drops_tokens = True


def hyena_vit(
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    mixer: str = "hyena",
    pool: str = "avg",
    num_classes: int = 0,
    **model_args: Any,
) -> HyenaTransformer:
    """Return a ViT with the Hyena operator.

    Args:
        img_size: Side of the images in pixels, or (H, W).
        patch_size: Side of a patch.
        dim: Width D.
        depth: Blocks.
        heads: Heads of those blocks that have attention.
        mixer: Which blocks have the operator, see `HyenaTransformer`.
        pool: `avg`, or `first` as published.
        num_classes: Classes of the classifier; 0: none.
        **model_args: Other arguments of `HyenaTransformer`.
    """
    shape = {"img_size": img_size, "patch_size": patch_size, "embed_dim": dim, "depth": depth, "num_heads": heads}
    settings = {**shape, "mixer": mixer, "global_pool": pool, "num_classes": num_classes, **model_args}
    made = timm.create_model("hyena_vit_tiny_patch16", pretrained=False, **settings)
    return cast(HyenaTransformer, made)


def _create(variant: str, pretrained: bool, **model_args: Any) -> HyenaTransformer:
    kind = AttentionTransformer if model_args.get("mixer") == "attention" else HyenaTransformer
    model: HyenaTransformer = build_model_with_cfg(kind, variant, pretrained, **model_args)
    return model


def _cfg(side: int) -> dict[str, Any]:
    statistics = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "num_classes": 1000}
    return {**_small_cfg("head"), "input_size": (3, side, side), "crop_pct": 0.9 if side > 64 else 1.0, **statistics}


SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
"""DeiT's."""
SIDES = {4: 32, 8: 64, 16: 224}
"""Sides of the images by those of the patches: CIFAR's, Tiny-ImageNet's, ImageNet's."""
MICRO = {"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 4, "img_size": 32}

SUFFIXES: dict[str, Mixer] = {
    "": "hyena",
    "_hyena_then_attention": "hyena_then_attention",
    "_attention_then_hyena": "attention_then_hyena",
    "_alternate": "alternate",
    "_attention": "attention",
}
"""Ends of the names of models that have the operator in some blocks, or in none."""
MODELS = {
    "hyena_vit_micro_patch4_32": (MICRO, _small_cfg("head")),
    **{
        f"hyena_vit_{size}_patch{patch}": ({**shape, "patch_size": patch, "img_size": side}, _cfg(side))
        for size, shape in SIZES.items()
        for patch, side in SIDES.items()
    },
}

default_cfgs = generate_default_cfgs({name + suffix: cfg for name, (_, cfg) in MODELS.items() for suffix in SUFFIXES})


def _register(name: str, shape: dict[str, int], mixer: Mixer) -> None:
    def make(pretrained: bool = False, **kwargs: Any) -> HyenaTransformer:
        return _create(name, pretrained, **{**shape, "mixer": mixer, **kwargs})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Width {shape['embed_dim']}, {shape['depth']} blocks; mixer: {mixer}."
    register_model(make)


for _name, (_shape, _) in MODELS.items():
    for _suffix, _mixer in SUFFIXES.items():
        _register(_name + _suffix, _shape, _mixer)
