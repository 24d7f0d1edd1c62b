"""ConViT as class-incremental learning takes it: gated positional attention in every block, no class token.

d'Ascoli et al. 2021, "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", arXiv
2103.10697; timm's blocks. Cotogni et al. 2022 (arXiv 2211.12292) train the small one on CIFAR-100, where the last of
the six blocks gives way to a class-attention of theirs.

>>> import timm, patchloom
>>> timm.create_model("gcab_convit_small_patch4_32", num_classes=0).embed_dim
384
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convit import ConVit
from torch import Tensor

from patchloom.encoders.families import Embedded, Family, register

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class ConViTEncoder(ConVit):
    """timm's ConViT whose blocks all have positional attention; there is no class token.

    Args:
        embed_dim: D; timm's own takes it per head.
        depth: Blocks.
        num_heads: Heads.
        global_pool: Patches are averaged; there is nothing else to take.
        **kwargs: As of timm's `ConVit`.
    """

    def __init__(
        self, embed_dim: int = 384, depth: int = 6, num_heads: int = 12, global_pool: str = "avg", **kwargs: Any
    ) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width of {embed_dim}")
        super().__init__(
            embed_dim=embed_dim // num_heads,
            depth=depth,
            num_heads=num_heads,
            local_up_to_layer=depth,
            global_pool=global_pool,
            norm_layer=_Norm,
            **kwargs,
        )
        del self.cls_token
        self.num_prefix_tokens = 0

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that do not decay."""
        return {"pos_embed"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the patches (B, N, D), normed, for images (B, C, H, W) of the size it was made for."""
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of patches, or their mean."""
        pooled = self.head_drop(x.mean(1))
        out: Tensor = pooled if pre_logits else self.head(pooled)
        return out


class _Norm(LayerNorm):
    """With the epsilon of the published blocks."""

    def __init__(self, channels: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(channels, eps=eps, **kwargs)


@register(ConViTEncoder)
class ConViTFamily(Family):
    """Patches keep their places in the row: attention reads from them where its neighbours are."""

    patch_embeds = ()
    drops_tokens = False

    def add_positions(self, encoder: Any, x: Tensor) -> Embedded:
        """Return what enters the first block."""
        return Embedded(encoder.pos_drop(x + encoder.pos_embed))


def _cfg(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 1.0 if side == 32 else 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": mean,
        "std": std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "gcab_convit_micro_patch4_32": _cfg(32, CIFAR100_MEAN, CIFAR100_STD),
        "gcab_convit_small_patch4_32": _cfg(32, CIFAR100_MEAN, CIFAR100_STD),
        "gcab_convit_small_patch8_64": _cfg(64, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "gcab_convit_small_patch16_224": _cfg(224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    }
)


def _create(variant: str, patch: int, side: int, pretrained: bool, **kwargs: Any) -> ConViTEncoder:
    model: ConViTEncoder = build_model_with_cfg(
        ConViTEncoder, variant, pretrained, **{"patch_size": patch, "img_size": side, **kwargs}
    )
    return model


@register_model
def gcab_convit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> ConViTEncoder:
    """Width 96, 4 blocks, 4 heads, patches of 4 pixels: what a laptop trains."""
    shape = {"embed_dim": 96, "depth": 4, "num_heads": 4}
    return _create("gcab_convit_micro_patch4_32", 4, 32, pretrained, **{**shape, **kwargs})


@register_model
def gcab_convit_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> ConViTEncoder:
    """Width 384, 6 blocks, 12 heads, patches of 4 pixels: CIFAR-100's."""
    return _create("gcab_convit_small_patch4_32", 4, 32, pretrained, **kwargs)


@register_model
def gcab_convit_small_patch8_64(pretrained: bool = False, **kwargs: Any) -> ConViTEncoder:
    """Width 384, 6 blocks, 12 heads, patches of 8 pixels: Tiny-ImageNet's."""
    return _create("gcab_convit_small_patch8_64", 8, 64, pretrained, **kwargs)


@register_model
def gcab_convit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ConViTEncoder:
    """Width 384, 6 blocks, 12 heads, patches of 16 pixels: ImageNet-100's."""
    return _create("gcab_convit_small_patch16_224", 16, 224, pretrained, **kwargs)
