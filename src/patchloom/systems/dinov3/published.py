"""Published DINOv3 backbones (Siméoni et al. 2025, arXiv 2508.10104) as timm's `Eva`.

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
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.models.published import fill, has
from patchloom.systems.dinov3.published_settings import ARCHITECTURES, PERIODS, is_gated, settled

ANY = "vit_base_patch16_dinov3"
# What stands beside the backbone in a checkpoint of the training.
BESIDE = (
    *("student.", "teacher.", "gram_teacher.", "model_ema."),
    *("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss."),
)
TRAINING_ONLY = "local_cls_norm."
# Our parts of names and the published ones.
RENAMED = (
    ("reg_token", "storage_tokens"),
    (".gamma_1", ".ls1.gamma"),
    (".gamma_2", ".ls2.gamma"),
    (".mlp.fc1_g.", ".mlp.w1."),
    (".mlp.fc1_x.", ".mlp.w2."),
    ("norm.prefix_norm.", "cls_norm."),
)


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
        **config: `image_size` it is set up for (224), `num_heads` or `arch` where the checkpoint has no periods,
            `pos_embed_rope_normalize_coords` (separate, min or max), `norm_layer` (layernormbf16: eps 1e-5, as
            released; layernorm: 1e-6; or `layer_norm_eps`), `global_pool` (token or avg). Other settings of the
            published code may be given and have to agree with the tensors (`embed_dim`, `patch_size`,
            `n_storage_tokens`, `ffn_layer`, …), the training's configuration whole with its groups, or transformers'.

    Raises:
        UsageError: Unknown settings, a mask of biases that was never set, or tensors missing or left over.
    """
    state = _bare(state)
    settings = settled(state, config)
    model = _built(state, settings)
    renamed, key_biases = _renamed(state)
    fill(model, renamed, published=lambda name: _published(name, is_gated(state)))
    for number, bias in key_biases.items():
        model.blocks[number].attn.k_bias.copy_(bias)
    lost = _set_norms(model, settings) | _set_positions(model, state, settings) | bool(key_biases)
    if lost:
        warnings.warn(
            "this checkpoint has positions, norms or biases of keys that timm's architecture has no place for: the "
            "encoder computes with them, but a bundle of it would lose them",
            stacklevel=4,
        )
    if not settings["n_storage_tokens"] and "n_storage_tokens" not in config:
        warnings.warn(
            "the checkpoint has no storage_tokens, so the encoder has none; if that is meant, give n_storage_tokens=0",
            stacklevel=4,
        )
    if settings.get("pos_embed_rope_dtype", "fp32") != "fp32":
        warnings.warn("rotary positions are computed in float32, as the released models do, not in half", stacklevel=4)
    model.register_buffer("mask_token", state["mask_token"].reshape(1, 1, -1).clone(), persistent=False)
    return model


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors, in float32 at least, without what stands in front of their names or beside."""
    for prefix in ("teacher.backbone.", "student.backbone.", "backbone."):
        if has(state, prefix):
            if unexpected := [name for name in state if not name.startswith((prefix, *BESIDE))]:
                raise UsageError(
                    f"unexpected: {', '.join(unexpected[:6])}; beside {prefix} stand parts of the training"
                )
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            break
    return {name: at_least_float32(value) for name, value in state.items()}


def _built(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Encoder:
    """Return the encoder the tensors fit, untrained."""
    width, blocks, gated = settings["embed_dim"], settings["depth"], is_gated(state)
    hidden = len(state["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"])
    biased = _has_biases(state)
    sizes = {(known.embed_dim, known.depth, known.gated): known.timm for known in ARCHITECTURES.values()}
    name = sizes.get((width, blocks, gated), ANY)
    if biased and name != ARCHITECTURES["vit7b16"].timm:
        name += "_qkvb"
    gating: dict[str, Any] = {"swiglu_align_to": 1} if gated else {}
    model = create_encoder(
        name,
        image_size=settings.get("image_size", 224),
        in_chans=settings["in_chans"],
        patch_size=settings["patch_size"],
        embed_dim=width,
        depth=blocks,
        num_heads=settings["num_heads"],
        mlp_ratio=hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width,
        swiglu_mlp=gated,
        qkv_bias=biased,
        init_values=1e-5 if any(".ls1." in name or ".ls2." in name for name in state) else None,
        num_reg_tokens=settings["n_storage_tokens"],
        rope_temperature=float(settings.get("pos_embed_rope_base", 100.0)),
        global_pool=settings.get("global_pool", "token"),
        **gating,
    )
    if settings["untie_cls_and_patch_norms"]:
        norm = nn.LayerNorm(width, eps=1e-5)
        model.norm = PrefixNorm(model.norm, norm, model.num_prefix_tokens)
    return model


def _has_biases(state: Mapping[str, Tensor]) -> bool:
    """Return whether queries, keys or values have a bias that is not zero: distilled models store zeros."""
    return any(bool(bias.any()) for name, bias in state.items() if name.endswith("attn.qkv.bias"))


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Return tensors under timm's names, and the biases of keys, by block, that are not zero."""
    gated, biased = is_gated(state), _has_biases(state)
    renamed: dict[str, Tensor] = {}
    keys: dict[int, Tensor] = {}
    for name, value in state.items():
        if name in (PERIODS, "mask_token") or name.startswith(TRAINING_ONLY) or name.endswith("attn.qkv.bias_mask"):
            continue
        if not name.endswith("attn.qkv.bias"):
            renamed[_ours(name, gated, has(state, "cls_norm."))] = value
        elif biased:
            query, key, bias = _masked(state, name, value).chunk(3)
            stem = name.removesuffix("qkv.bias")
            renamed |= {f"{stem}q_bias": query, f"{stem}v_bias": bias}
            if bool(key.any()):
                keys[int(name.split(".")[1])] = key
    return renamed, keys


def _ours(name: str, gated: bool, untied: bool) -> str:
    """Return timm's name of a published tensor."""
    if name.startswith("norm."):
        return f"norm.patch_{name}" if untied else name
    if gated and ".mlp.w3." in name:
        return name.replace(".mlp.w3.", ".mlp.fc2.")
    for ours, theirs in RENAMED:
        if theirs in name:
            return name.replace(theirs, ours)
    return name


def _published(name: str, gated: bool) -> str:
    """Return the name a tensor of ours has in a checkpoint."""
    if gated and ".mlp.fc2." in name:
        return name.replace(".mlp.fc2.", ".mlp.w3.")
    name = name.replace("norm.patch_norm.", "norm.")
    for ours, theirs in RENAMED:
        if ours in name:
            return name.replace(ours, theirs)
    return name


def _masked(state: Mapping[str, Tensor], name: str, bias: Tensor) -> Tensor:
    """Return a bias of queries, keys and values after its mask, which is 0 for keys."""
    mask = state.get(f"{name}_mask")
    if mask is None:
        return bias
    if not bool(torch.isfinite(mask).all()):
        raise UsageError(f"{name}_mask holds values that are not finite: it was never initialised")
    return bias * mask.to(bias)


def _set_norms(model: Encoder, settings: Mapping[str, Any]) -> bool:
    """Give the norms the eps of the published norm layer; return whether it is another than timm's."""
    of_layer = 1e-5 if settings.get("norm_layer", "layernormbf16") == "layernormbf16" else 1e-6
    epsilon = settings.get("layer_norm_eps", of_layer)
    if "norm_layer" in settings and epsilon != of_layer:
        raise UsageError(f"norm_layer={settings['norm_layer']} has the epsilon {of_layer:g}, not {epsilon:g}; give one")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon
    return bool(epsilon != 1e-5)


def _set_positions(model: Encoder, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Give the rotary positions the checkpoint's periods, in float32 always, and its normalisation of coordinates.

    Returns:
        Whether they are others than timm's.
    """
    rope: Any = model.rope
    rope.normalize_coords = settings.get("pos_embed_rope_normalize_coords", "separate")
    differs = rope.normalize_coords != "separate"
    if PERIODS in state:
        stored = state[PERIODS].float()
        differs = differs or not torch.allclose(rope.periods, stored, rtol=1e-5)
        rope.periods.copy_(stored)
    if rope.pos_embed_cached is not None:
        rope.pos_embed_cached.copy_(rope._create_embed(rope.feat_shape, no_aug=True))
    return differs
