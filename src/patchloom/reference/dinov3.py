"""Published DINOv3 backbones as timm's `Eva` (specification `dinov3_medical`, section 4).

What timm's own loader leaves out is kept: the mask token, the stored periods of the rotary positions, biases of keys,
and a norm of its own for the prefix tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.errors import UsageError
from patchloom.reference.state import agree, check_settings, fill

# (width, depth, gated MLP): the timm model.
NAMES = {
    (384, 12, False): "vit_small_patch16_dinov3",
    (384, 12, True): "vit_small_plus_patch16_dinov3",
    (768, 12, False): "vit_base_patch16_dinov3",
    (1024, 24, False): "vit_large_patch16_dinov3",
    (1280, 32, True): "vit_huge_plus_patch16_dinov3",
    (4096, 40, True): "vit_7b_patch16_dinov3",
}
ANY = "vit_base_patch16_dinov3"
# Parts that take part in training only.
TRAINING_ONLY = ("local_cls_norm.", "dino_head.", "ibot_head.", "head.")
NORMALISATIONS = ("separate", "min", "max")
PERIODS = "rope_embed.periods"


class PrefixNorm(nn.Module):
    """The final norm where class and register tokens have one of their own.

    Args:
        patch_norm: Norm of the patch tokens.
        prefix_norm: Norm of the class and register tokens.
        num_prefix_tokens: How many stand in front.
    """

    def __init__(self, patch_norm: nn.Module, prefix_norm: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__()
        self.patch_norm = patch_norm
        self.prefix_norm = prefix_norm
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, P + N, D), each part normed by its own."""
        first = self.num_prefix_tokens
        return torch.cat([self.prefix_norm(x[:, :first]), self.patch_norm(x[:, first:])], dim=1)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a DINOv3 encoder.

    Args:
        state: Bare tensors, or under `backbone.` or `teacher.backbone.`.
        **config: `image_size` it is set up for (224), `num_heads` where the checkpoint has no periods, and
            `pos_embed_rope_normalize_coords` (separate, min or max), `pos_embed_rope_base` (100). `embed_dim`,
            `depth`, `patch_size` and `n_storage_tokens` may be given and have to agree.

    Returns:
        timm's `Eva`, pooled by its class token; its buffer `mask_token` (1, 1, D) goes with `encoders.embed`.

    Raises:
        UsageError: Unknown settings, a mask of biases that was never set, or tensors missing or left over.
    """
    state = _bare(state)
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"):
        if name not in state:
            raise UsageError(f"this is no DINOv3 backbone; missing: {name}")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    told = {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "n_storage_tokens": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
    }
    if PERIODS in state:
        told["num_heads"] = width // (4 * len(state[PERIODS]))
    free = ("image_size", "img_size", "num_heads", "pos_embed_rope_normalize_coords", "pos_embed_rope_base")
    check_settings(config, (*free, *told))
    agree(config, told)
    heads = told.get("num_heads", config.get("num_heads"))
    if heads is None:
        raise UsageError("the checkpoint has no rope_embed.periods; give num_heads")
    if width % (4 * heads):
        raise UsageError(f"the width {width} is not divisible by 4 x {heads} heads, as rotary positions need")
    model = _built(state, told, heads, config)
    renamed, key_biases = _renamed(state)
    fill(model, renamed)
    for number, bias in key_biases.items():
        model.blocks[number].attn.k_bias.copy_(bias)
    _set_positions(model, state, str(config.get("pos_embed_rope_normalize_coords", "separate")))
    if "mask_token" in state:
        model.register_buffer("mask_token", state["mask_token"].reshape(1, 1, -1).clone(), persistent=False)
    return model


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors without what stands in front of their names or takes part in training only."""
    for prefix in ("teacher.backbone.", "student.backbone.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            break
    return {name: value for name, value in state.items() if not name.startswith(TRAINING_ONLY)}


def _built(state: Mapping[str, Tensor], told: Mapping[str, Any], heads: int, config: Mapping[str, Any]) -> Encoder:
    """Return the encoder the tensors fit, untrained."""
    width, blocks = told["embed_dim"], told["depth"]
    gated = "blocks.0.mlp.w1.weight" in state
    hidden = state["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"].shape[0]
    biased = any(bool(bias.any()) for name, bias in state.items() if name.endswith("attn.qkv.bias"))
    name = NAMES.get((width, blocks, gated), ANY)
    if biased and name != NAMES[4096, 40, True]:
        name += "_qkvb"
    gating: dict[str, Any] = {"swiglu_align_to": 1} if gated else {}
    model = create_encoder(
        name,
        image_size=config.get("image_size", config.get("img_size", 224)),
        in_chans=told["in_chans"],
        patch_size=told["patch_size"],
        embed_dim=width,
        depth=blocks,
        num_heads=heads,
        mlp_ratio=hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width,
        swiglu_mlp=gated,
        qkv_bias=biased,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        num_reg_tokens=told["n_storage_tokens"],
        rope_temperature=float(config.get("pos_embed_rope_base", 100.0)),
        global_pool="token",
        **gating,
    )
    if "cls_norm.weight" in state:
        own = nn.LayerNorm(width, eps=1e-5)
        model.norm = PrefixNorm(model.norm, own, model.num_prefix_tokens)
    return model


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Return tensors under timm's names, and the biases of keys, by block, that are not zero."""
    untied = "cls_norm.weight" in state
    biased = any(bool(bias.any()) for name, bias in state.items() if name.endswith("attn.qkv.bias"))
    renamed: dict[str, Tensor] = {}
    keys: dict[int, Tensor] = {}
    for name, value in state.items():
        if name in (PERIODS, "mask_token") or name.endswith("attn.qkv.bias_mask"):
            continue
        if name.endswith("attn.qkv.bias"):
            if not biased:
                continue
            query, key, bias = _masked(state, name, value).chunk(3)
            stem = name.removesuffix("qkv.bias")
            renamed |= {f"{stem}q_bias": query, f"{stem}v_bias": bias}
            if bool(key.any()):
                keys[int(name.split(".")[1])] = key
            continue
        for theirs, ours in (
            ("storage_tokens", "reg_token"),
            (".ls1.gamma", ".gamma_1"),
            (".ls2.gamma", ".gamma_2"),
            (".mlp.w1.", ".mlp.fc1_g."),
            (".mlp.w2.", ".mlp.fc1_x."),
            (".mlp.w3.", ".mlp.fc2."),
        ):
            name = name.replace(theirs, ours)
        if untied and name.startswith("norm."):
            name = f"norm.patch_{name}"
        elif name.startswith("cls_norm."):
            name = name.replace("cls_norm", "norm.prefix_norm")
        renamed[name] = value
    return renamed, keys


def _masked(state: Mapping[str, Tensor], name: str, bias: Tensor) -> Tensor:
    """Return a bias of queries, keys and values after its mask, which is 0 for keys."""
    mask = state.get(f"{name}_mask")
    if mask is None:
        return bias
    if not bool(torch.isfinite(mask).all()):
        raise UsageError(f"{name}_mask holds values that are not finite: it was never initialised")
    return bias * mask.to(bias)


def _biased(block: Any) -> bool:
    return getattr(block.attn, "k_bias", None) is not None


def _set_positions(model: Encoder, state: Mapping[str, Tensor], normalisation: str) -> None:
    """Give the rotary positions the checkpoint's periods, in float32 always, and its normalisation of coordinates."""
    if normalisation not in NORMALISATIONS:
        raise UsageError(f"pos_embed_rope_normalize_coords is {normalisation!r}; it is separate, min or max")
    rope = model.rope
    own = normalisation != "separate" or any(bool(block.attn.k_bias.any()) for block in model.blocks if _biased(block))
    rope.normalize_coords = normalisation
    if PERIODS in state:
        stored = state[PERIODS].float()
        own = own or not torch.allclose(rope.periods, stored, rtol=1e-5)
        rope.periods.copy_(stored)
    if own:
        warnings.warn(
            "this checkpoint has positions or biases of keys that timm's architecture has no place for: the encoder "
            "computes with them, but a bundle of it would lose them",
            stacklevel=4,
        )
    if rope.pos_embed_cached is not None:
        rope.pos_embed_cached.copy_(rope._create_embed(rope.feat_shape, no_aug=True))
