"""Settings of DINOv3's published code: what a checkpoint's tensors tell of them, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import has, require
from patchloom.models.published_settings import OneOf, Settings, epsilon_of

PERIODS = "rope_embed.periods"
NORMALISATIONS = ("separate", "min", "max")
ALWAYS = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight")
# What they have to be told, and what has no effect on a loaded encoder's output.
FREE = (
    "arch",
    "image_size",
    "global_pool",
    "pos_embed_rope_normalize_coords",
    "pos_embed_rope_base",
    "pos_embed_rope_dtype",
    "norm_layer",
    "layerscale_init",
    "ffn_layer",
    "ffn_ratio",
    "num_heads",
    "layer_norm_eps",
)
WITHOUT_EFFECT = (
    "drop_path_rate",
    "drop_path_uniform",
    "untie_global_and_local_cls_norm",
    "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords",
    "pos_embed_rope_rescale_coords",
    "device",
    *("pretrained_weights", "resume_from_teacher_chkpt", "fp8_enabled", "fp8_filter", "teacher"),
    *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "apply_layernorm", "reshape_hidden_states"),
    *("out_features", "out_indices", "stage_names", "return_class_token", "weights", "check_hash"),
)
OTHER_NAMES = {
    "img_size": "image_size",
    "heads": "num_heads",
    "mlp_ratio": "ffn_ratio",
    "layerscale": "layerscale_init",
    # Those of transformers.
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_channels": "in_chans",
    "num_register_tokens": "n_storage_tokens",
    "rope_theta": "pos_embed_rope_base",
    "layerscale_value": "layerscale_init",
    "mlp_bias": "ffn_bias",
}
SETTINGS = Settings(
    obeyed=FREE,
    idle=WITHOUT_EFFECT,
    fixed={
        "pos_embed_type": ("rope",),
        "pos_embed_rope_min_period": (None,),
        "pos_embed_rope_max_period": (None,),
    },
    other_names=OTHER_NAMES,
    sections={
        "student": {},
        **dict.fromkeys(
            ("MODEL", "compute_precision", "dino", "ibot", "gram", "train", "optim", "crops", "evaluation")
        ),
        **dict.fromkeys(("distillation", "multidistillation", "hrft", "checkpointing", "schedules", "teacher")),
    },
    read={"layer_norm_eps": epsilon_of},
)
CALLS_FOR = {
    "qkv_bias": "blocks.0.attn.qkv.bias",
    "mask_k_bias": "blocks.0.attn.qkv.bias_mask",
    "untie_cls_and_patch_norms": "cls_norm.weight",
}
CHOICES = {
    "pos_embed_rope_normalize_coords": NORMALISATIONS,
    "pos_embed_rope_dtype": ("fp32", "bf16", "fp16"),
    "norm_layer": ("layernormbf16", "layernorm"),
    "global_pool": ("token", "avg"),
    "ffn_layer": ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"),
}


class Architecture(NamedTuple):
    """A published size; all released ones have four storage tokens."""

    embed_dim: int
    depth: int
    num_heads: int
    gated: bool
    timm: str


ARCHITECTURES = {
    "vits16": Architecture(384, 12, 6, False, "vit_small_patch16_dinov3"),
    "vits16plus": Architecture(384, 12, 6, True, "vit_small_plus_patch16_dinov3"),
    "vitb16": Architecture(768, 12, 12, False, "vit_base_patch16_dinov3"),
    "vitl16": Architecture(1024, 24, 16, False, "vit_large_patch16_dinov3"),
    "vitl16plus": Architecture(1024, 24, 16, True, "vit_large_patch16_dinov3"),
    "vith16plus": Architecture(1280, 32, 20, True, "vit_huge_plus_patch16_dinov3"),
    "vit7b16": Architecture(4096, 40, 32, True, "vit_7b_patch16_dinov3"),
}
# The training code's names, which leave the feed-forward layer to settings of its own.
SIZES = {
    "vit_small": "vits16",
    "vit_base": "vitb16",
    "vit_large": "vitl16",
    "vit_huge2": "vith16plus",
    "vit_7b": "vit7b16",
}


def inferred_from(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that the tensors of a backbone tell.

    Raises:
        UsageError: A tensor that the others call for is missing, or does not fit them.
    """
    if missing := [name for name in ALWAYS if name not in state]:
        raise UsageError(f"this is no DINOv3 backbone; missing: {', '.join(missing)}")
    require(state, "mask_token")
    if state["patch_embed.proj.weight"].ndim != 4:
        raise UsageError("patch_embed.proj.weight is no convolution of images; this is no DINOv3 backbone")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    numbers = [name.split(".")[1] for name in state if name.startswith("blocks.")]
    depth = 1 + max(int(number) for number in numbers if number.isdigit())
    gated = is_gated(state)
    require(state, f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight")
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, width)}
    if "storage_tokens" in state:
        shapes["storage_tokens"] = (1, *state["storage_tokens"].shape[1:2], width)
    for part, callers in (("bias", (".attn.qkv.bias", ".attn.qkv.bias_mask")), ("bias_mask", (".attn.qkv.bias_mask",))):
        names = [f"blocks.{number}.attn.qkv.{part}" for number in range(depth)]
        if any(name.endswith(callers) for name in state):
            require(state, *names)
            shapes |= dict.fromkeys(names, (3 * width,))
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise UsageError(f"of another shape: {name} {tuple(state[name].shape)} instead of {shape}")
    for norm in ("cls_norm.", "local_cls_norm."):
        if has(state, norm):
            require(state, f"{norm}weight", f"{norm}bias")
    inferred: dict[str, Any] = {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": depth,
        "n_storage_tokens": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_bias": f"blocks.0.mlp.{'w1' if gated else 'fc1'}.bias" in state,
        "untie_cls_and_patch_norms": has(state, "cls_norm."),
    }
    # Words of transformers' configuration.
    hidden = f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"
    keys = inferred["qkv_bias"] and not inferred["mask_k_bias"]
    inferred |= {
        "intermediate_size": len(state[hidden]),
        "use_gated_mlp": gated,
        "hidden_act": OneOf(("silu",) if gated else ("gelu",)),
        "query_bias": inferred["qkv_bias"],
        "value_bias": inferred["qkv_bias"],
        "key_bias": None if keys else False,
    }
    if has(state, "local_cls_norm."):  # of training only: an encoder computes the same without
        inferred["untie_global_and_local_cls_norm"] = True
    if PERIODS in state:
        periods = state[PERIODS]
        if periods.ndim != 1 or width % (4 * len(periods)):
            raise UsageError(
                f"of another shape: {PERIODS} {tuple(periods.shape)}; a width of {width} has heads of 4 channels for "
                "each period"
            )
        inferred["num_heads"] = width // (4 * len(periods))
    return inferred


def is_gated(state: Mapping[str, Tensor]) -> bool:
    """Return whether the feed-forward layers are gated (SwiGLU)."""
    return any(name.endswith((".mlp.w1.weight", ".mlp.w2.weight", ".mlp.w3.weight")) for name in state)


def settled(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of an encoder: what was given, checked against what the tensors tell, and that.

    Raises:
        UsageError: Unknown or impossible settings, ones that contradict the tensors, or tensors that are missing.
    """
    inferred = inferred_from(state)
    renamed = SETTINGS.renamed(config)
    given = {name: value for name, value in renamed.items() if value is not None}
    for name, choices in CHOICES.items():
        if name in given and given[name] not in choices:
            raise UsageError(f"{name} is {given[name]!r}; it is {', '.join(choices[:-1])} or {choices[-1]}")
    _check_storage_tokens(given, inferred, is_gated(state))
    for name, tensor in CALLS_FOR.items():
        if given.get(name):
            require(state, tensor)
    given = SETTINGS.settle(config, inferred)
    if "layerscale_init" in renamed:  # None is what has no layer scale
        given["layerscale_init"] = renamed["layerscale_init"]
    inferred |= _inferred_from_architecture(given, inferred, is_gated(state))
    _check_layers(state, given, inferred["embed_dim"])
    heads = inferred.get("num_heads", given.get("num_heads"))
    if heads is None:
        raise UsageError(f"missing: {PERIODS}; give num_heads if the checkpoint has none")
    if inferred["embed_dim"] % (4 * heads):
        raise UsageError(
            f"the width {inferred['embed_dim']} is not divisible by 4 x {heads} heads, as rotary positions need"
        )
    return {**given, **inferred, "num_heads": heads}


def _check_storage_tokens(given: Mapping[str, Any], inferred: Mapping[str, Any], gated: bool) -> None:
    """Refuse a checkpoint without storage tokens where it ought to have some.

    No shape tells how many there are, and the published code's default is none; but a released size that has none is a
    checkpoint that lost them, unless it is said that it has none.
    """
    released = any(
        (inferred["embed_dim"], inferred["depth"], gated) == (a[0], a[1], a[3]) for a in ARCHITECTURES.values()
    )
    if not inferred["n_storage_tokens"] and given.get("n_storage_tokens", 4 if released else 0):
        raise UsageError("missing: storage_tokens; give n_storage_tokens=0 if the encoder has none")


def _inferred_from_architecture(given: Mapping[str, Any], inferred: Mapping[str, Any], gated: bool) -> dict[str, Any]:
    """Return the heads of the published size named, if one is."""
    if given.get("arch") is None:
        return {}
    name = str(given["arch"]).removeprefix("dinov3_")
    known = ARCHITECTURES.get(SIZES.get(name, name))
    if known is None:
        raise unknown_name("arch", name, (*ARCHITECTURES, *SIZES))
    settings = {**known._asdict(), **given, **inferred}
    for what in ("embed_dim", "depth", "num_heads"):
        if settings[what] != getattr(known, what):
            raise UsageError(
                f"arch={given['arch']} has {what} {getattr(known, what)}, and the checkpoint {settings[what]}"
            )
    if name not in SIZES and known.gated != gated:
        raise UsageError(f"arch={name} has feed-forward layers of another kind than the checkpoint")
    return {"num_heads": known.num_heads}


def _check_layers(state: Mapping[str, Tensor], given: Mapping[str, Any], width: int) -> None:
    """Refuse a feed-forward layer or layer scale that contradicts the tensors."""
    gated, layer = is_gated(state), given.get("ffn_layer")
    if layer is not None and (layer != "mlp") != gated:
        raise UsageError(f"ffn_layer={layer}, but the checkpoint's tensors say {'swiglu' if gated else 'mlp'}")
    name = f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"
    hidden = len(state[name])
    if (ratio := given.get("ffn_ratio")) is not None:
        steps = (1,) if not gated else (8, 32, 64, 128) if layer in (None, "swiglu") else (int(layer[6:]),)
        inner = int(width * ratio * 2 / 3) if gated else int(width * ratio)
        if hidden not in [-(-inner // step) * step for step in steps]:
            raise UsageError(f"ffn_ratio={ratio:g}, but {name} has {hidden} rows for a width of {width}; leave it out")
    if "layerscale_init" in given:
        scaled = any(name.endswith((".ls1.gamma", ".ls2.gamma")) for name in state)
        if given["layerscale_init"] and not scaled:
            require(state, "blocks.0.ls1.gamma")
        if scaled and not given["layerscale_init"]:
            raise UsageError(
                f"layerscale_init={given['layerscale_init']}, but the checkpoint has ls1.gamma; leave it out"
            )
