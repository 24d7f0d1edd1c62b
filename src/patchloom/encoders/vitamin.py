"""Small ViTamins for images of 32 and 64 pixels, as timm models beside timm's own (`vitamin_small_224` …).

Two stages of inverted bottlenecks (MBConv with one LayerNorm), then a Transformer with gated feed-forwards, no class
token (Chen et al. 2024, arXiv 2404.02132). These have channels 16, 32, 96 and depths 1, 1, 3: 0.3 M parameters.

>>> import timm, torch, patchloom
>>> timm.create_model("vitamin_tiny_64", num_classes=0)(torch.zeros(1, 3, 64, 64)).shape
torch.Size([1, 96])
"""

from __future__ import annotations

from typing import Any

from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import register_model, vitamin
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer


def _cfg(side: int) -> dict[str, Any]:
    return {
        "num_classes": 0,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": OPENAI_CLIP_MEAN,
        "std": OPENAI_CLIP_STD,
        "first_conv": "patch_embed.backbone.stem.conv1",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({f"vitamin_tiny_{side}": _cfg(side) for side in (32, 64)})


def build_vitamin(
    variant: str,
    *,
    channels: tuple[int, int, int] = (16, 32, 96),
    depths: tuple[int, int] = (1, 1),
    stem_width: int | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> VisionTransformer:
    """Return a ViTamin of any shape, of timm's parts.

    Args:
        variant: A registered name; it says how images are normalised and, where nothing else does, their size.
        channels: Of the two convolutional stages and of the Transformer.
        depths: Blocks of the two convolutional stages.
        stem_width: Channels of the stem; default: those of the first stage.
        pretrained: Not to be had for shapes of one's own.
        **kwargs: Arguments of timm's `VisionTransformer`, such as `depth`, `num_heads`, `img_size`.
    """
    shape = vitamin.VitCfg(
        embed_dim=channels,
        depths=(*depths, 1),
        stem_width=channels[0] if stem_width is None else stem_width,
        conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
    transformer = {
        "embed_dim": channels[2],
        "mlp_layer": vitamin.GeGluMlp,
        "mlp_ratio": 2.0,
        "class_token": False,
        "global_pool": "avg",
    }
    model: VisionTransformer = vitamin._create_vitamin(
        variant, pretrained=pretrained, embed_cfg=shape, **{**transformer, **kwargs}
    )
    return model


@register_model
def vitamin_tiny_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 96, 3 blocks, for images of 32."""
    return build_vitamin("vitamin_tiny_32", pretrained=pretrained, **{"depth": 3, "num_heads": 3, **kwargs})


@register_model
def vitamin_tiny_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Width 96, 3 blocks, for images of 64."""
    return build_vitamin("vitamin_tiny_64", pretrained=pretrained, **{"depth": 3, "num_heads": 3, **kwargs})
