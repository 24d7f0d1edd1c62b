"""Small ViTs for images of 32 pixels, as timm models: what a laptop trains from scratch in minutes.

Width 128, 6 blocks, 4 heads, patches of 4 pixels: with a class token alone, and as a distilled DeiT, whose second token
learns from a teacher. The claims of the published systems are tried at this size (`benchmarks/claims`).

>>> import timm, torch, patchloom
>>> timm.create_model("deit_micro_distilled_patch4_32", num_classes=10)(torch.zeros(1, 3, 32, 32)).shape
torch.Size([1, 10])
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}


def _cfg(classifier: str | tuple[str, ...]) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        # Of CIFAR-10's training images.
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {"vit_micro_patch4_32": _cfg("head"), "deit_micro_distilled_patch4_32": _cfg(("head", "head_dist"))}
)


def _create(kind: type[VisionTransformer], variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    model: VisionTransformer = build_model_with_cfg(
        kind, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**SHAPE, **kwargs}
    )
    return model


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """With a class token."""
    return _create(VisionTransformer, "vit_micro_patch4_32", pretrained, **kwargs)


@register_model
def deit_micro_distilled_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """With a class token and a distillation token."""
    return _create(VisionTransformerDistilled, "deit_micro_distilled_patch4_32", pretrained, **kwargs)
