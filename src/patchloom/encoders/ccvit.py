"""The encoders CCViT was published with, as timm models: `Beit` with one relative-position table for all blocks.

>>> import timm, patchloom
>>> timm.create_model("ccvit_tiny_patch4_32", num_classes=0).embed_dim
192
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit, checkpoint_filter_fn


def _cfg(side: int) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "ccvit_tiny_patch16_224": _cfg(224),
        "ccvit_small_patch16_224": _cfg(224),
        "ccvit_base_patch16_224": _cfg(224),
        "ccvit_large_patch16_224": _cfg(224),
        "ccvit_tiny_patch8_64": _cfg(64),
        "ccvit_small_patch8_64": _cfg(64),
        "ccvit_tiny_patch4_32": _cfg(32),
        "ccvit_small_patch4_32": _cfg(32),
    }
)

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 0.1}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 0.1}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}


def _create(variant: str, patch: int, side: int, pretrained: bool, shape: dict[str, Any], **kwargs: Any) -> Beit:
    model_args = {
        "patch_size": patch,
        "img_size": side,
        "use_abs_pos_emb": False,
        "use_shared_rel_pos_bias": True,
        "global_pool": "avg",
        "use_fc_norm": False,  # pre-training needs the norm in front of its heads, per token
        **shape,
        **kwargs,
    }
    model: Beit = build_model_with_cfg(
        Beit, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **model_args
    )
    return model


@register_model
def ccvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 192, 12 blocks, 3 heads, patches of 16 pixels."""
    return _create("ccvit_tiny_patch16_224", 16, 224, pretrained, TINY, **kwargs)


@register_model
def ccvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 384, 12 blocks, 6 heads, patches of 16 pixels."""
    return _create("ccvit_small_patch16_224", 16, 224, pretrained, SMALL, **kwargs)


@register_model
def ccvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 768, 12 blocks, 12 heads, patches of 16 pixels: the paper's base encoder."""
    return _create("ccvit_base_patch16_224", 16, 224, pretrained, BASE, **kwargs)


@register_model
def ccvit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 1024, 24 blocks, 16 heads, patches of 16 pixels: the paper's large encoder."""
    return _create("ccvit_large_patch16_224", 16, 224, pretrained, LARGE, **kwargs)


@register_model
def ccvit_tiny_patch8_64(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 192, 12 blocks, 3 heads, patches of 8 pixels, for images of 64."""
    return _create("ccvit_tiny_patch8_64", 8, 64, pretrained, TINY, **kwargs)


@register_model
def ccvit_small_patch8_64(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 384, 12 blocks, 6 heads, patches of 8 pixels, for images of 64."""
    return _create("ccvit_small_patch8_64", 8, 64, pretrained, SMALL, **kwargs)


@register_model
def ccvit_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 192, 12 blocks, 3 heads, patches of 4 pixels, for images of 32."""
    return _create("ccvit_tiny_patch4_32", 4, 32, pretrained, TINY, **kwargs)


@register_model
def ccvit_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Width 384, 12 blocks, 6 heads, patches of 4 pixels, for images of 32."""
    return _create("ccvit_small_patch4_32", 4, 32, pretrained, SMALL, **kwargs)
