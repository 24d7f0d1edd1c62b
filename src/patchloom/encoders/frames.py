"""Encoders for stacks of game frames, as timm models: patches of 8 pixels, frames of 84 (`vit_tiny_patch8_84`).

84 is no multiple of 8: the patch embedding leaves out the last four rows and columns, as the published
code of TOV-VICReg (arXiv 2209.10901) does, and the grid is 10 x 10.

>>> import timm, patchloom
>>> timm.create_model("vit_tiny_patch8_84", num_classes=0).patch_embed.grid_size
(10, 10)
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 84, 84),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        # Frames enter as they are, in [0, 1].
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {"vit_tiny_patch8_84": _cfg(), "vit_small_patch8_84": _cfg(), "vit_base_patch8_84": _cfg()}
)


def _create(variant: str, pretrained: bool, shape: dict[str, int], **kwargs: Any) -> VisionTransformer:
    model_args = {"patch_size": 8, "img_size": 84, "depth": 12, **shape, **kwargs}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **model_args
    )
    return model


@register_model
def vit_tiny_patch8_84(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 192, 12 blocks, 3 heads: the encoder of the TOV-VICReg paper."""
    return _create("vit_tiny_patch8_84", pretrained, {"embed_dim": 192, "num_heads": 3}, **kwargs)


@register_model
def vit_small_patch8_84(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 384, 12 blocks, 6 heads."""
    return _create("vit_small_patch8_84", pretrained, {"embed_dim": 384, "num_heads": 6}, **kwargs)


@register_model
def vit_base_patch8_84(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 768, 12 blocks, 12 heads."""
    return _create("vit_base_patch8_84", pretrained, {"embed_dim": 768, "num_heads": 12}, **kwargs)
