"""Published AdaptFormer checkpoints: image and video, adapters, prompts and linear probe (arXiv 2205.13535)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.insertion import Insertion, activate, insert
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, has, require
from patchloom.models.published_settings import Hidden, Settings, epsilon_of, name_of, set_epsilon
from patchloom.systems.adaptformer.model import AdaptFormer
from patchloom.systems.linear.model import LinearHead
from patchloom.systems.vpt.model import VisualPrompts

NAME = "adapter"
VIDEO_FRAMES = 8
"""Of a clip as the published code samples it; others can be read."""
SETTINGS = Settings(
    obeyed=(
        *("image_size", "num_heads", "scale", "placement", "pool", "norm", "input", "dropout", "drop_path"),
        *("layer_norm_eps", "drop_rate", "num_frames"),
    ),
    idle=(
        *("window_size", "attn_drop_rate", "init_values", "init_scale", "fc_drop_rate", "ffn_adapter_init_option"),
        *("all_frames", "sampling_rate", "num_segments", "fulltune", "inception", "embed_layer"),
        *("weight_init", "attn_drop", "num_sample", "model", "linprobe", "mask_ratio", "vpt"),
    ),
    fixed={
        "qk_scale": (None,),
        "representation_size": (None, False, 0),
        "distilled": (False,),
        "use_learnable_pos_emb": (False,),
        "act_layer": ("gelu",),
    },
    other_names={
        "adapter_scalar": "scale",
        "ffn_adapter_scalar": "scale",
        "ffn_option": "placement",
        "ffn_adapter_layernorm_option": "norm",
        "adapter_layernorm_option": "norm",
        "img_size": "image_size",
        "input_size": "image_size",
        "ffn_num": "bottleneck",
        "d_model": "embed_dim",
        "nb_classes": "num_classes",
        "num_channels": "in_chans",
        "drop_path_rate": "drop_path",
        "norm_layer": "layer_norm_eps",
        "vpt_num": "num_prompts",
        "drop": "drop_rate",
    },
    sections={"tuning_config": {}},
    read={"layer_norm_eps": epsilon_of, "act_layer": name_of},
)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return the encoder of a published state dict with its adapters, prompts or head in it.

    Args:
        state: Tensors under the published names.
        **config: `num_heads` (default: 64 wide each), `scale` (default 0.1; a learnt one is in the file), `placement`
            (`parallel` or `sequential`), `norm` (`in` or `out`, where adapters have a layer norm), `img_size` (a side
            or (H, W), where the positions are of no square grid), `pool` (`token` or `avg`; has to agree), `dropout`
            of the adapters in training (0.1; in video 0), `num_frames` of a clip (8; others can be read), `drop_path`
            (0), `layer_norm_eps` (1e-6). A published configuration may be given whole, with its `tuning_config`.

    Returns:
        A timm `VisionTransformer` that gives logits for (B, 3, H, W) images, or (B, 3, T, H, W) clips. What trains is
        what trained: adapters or prompts, the head, and the norm behind mean pooling.

    Raises:
        UsageError: Unknown setting, one that contradicts the tensors, or tensors missing or left over.
    """
    for name in ("patch_embed.proj.weight", "blocks.0.attn.q_proj.weight", "blocks.0.fc1.weight", "head.1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no AdaptFormer model")
    if has(state, "fc_norm."):
        require(state, "fc_norm.weight", "fc_norm.bias")
    config = SETTINGS.settle(_with_words(SETTINGS.renamed(config)), _inferred_from_shapes(state))
    encoder = _encoder(state, config)
    ours = _our_names(state)
    pooled = {name: ours[f"fc_norm.{name}"] for name in ("weight", "bias") if f"fc_norm.{name}" in ours}
    insertion = _insertion(state, config, encoder)
    insert(encoder, insertion, NAME, activate_it=False)
    # The norm behind mean pooling trains with the adapters; a copy stays in the encoder, which is frozen.
    ours |= {f"adapters.{NAME}.pool_norm.{name}": value for name, value in pooled.items()}
    fill(encoder, ours)
    set_epsilon(encoder, config.get("layer_norm_eps"))
    activate(encoder, NAME)
    return encoder.eval()


def _inferred_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    kernel, (hidden, width) = state["patch_embed.proj.weight"], state["blocks.0.fc1.weight"].shape
    video = kernel.ndim == 5
    down = next((value for name, value in state.items() if name.endswith("adaptmlp.down_proj.weight")), None)
    prompts = state.get("embeddings.0")
    return {
        "embed_dim": width,
        "patch_size": kernel.shape[-1],
        "tubelet_size": kernel.shape[2] if video else None,
        "in_chans": kernel.shape[1],
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": Hidden(width, hidden),
        "qkv_bias": "blocks.0.attn.q_proj.bias" in state or "blocks.0.attn.q_bias" in state,
        "num_classes": len(state["head.1.weight"]),
        # Of what is not there a configuration has the size all the same.
        "bottleneck": None if down is None else len(down),
        "num_prompts": None if prompts is None else prompts.shape[1],
        "ffn_adapt": down is not None,
        "vpt_on": prompts is not None,
        "use_mean_pooling": None if not video else "fc_norm.weight" in state,
        "global_pool": None if video else "fc_norm.weight" in state,
    }


def _with_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which the published scripts' switches and timm's words say the same."""
    settings = dict(given)
    if settings.get("global_pool") in ("avg", "token"):
        settings["global_pool"] = settings["global_pool"] == "avg"
    if settings.get("cls_token") is not None:  # the switch that turns mean pooling off
        settings.setdefault("global_pool", not settings["cls_token"])
    settings.pop("cls_token", None)
    return settings


def _encoder(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Encoder:
    """Return a fresh encoder of the shapes in the state dict."""
    kernel = state["patch_embed.proj.weight"]
    width, channels, patch = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
    video = kernel.ndim == 5
    pooled = "fc_norm.weight" in state
    pool = config.get("pool", "avg" if pooled else "token")
    if pool not in ("token", "cls", "avg"):
        raise unknown_name("pool", str(pool), ("token", "avg"))
    if (pool == "avg") != pooled:
        has = "fc_norm, so it pools by the mean" if pooled else "norm and no fc_norm, so it reads the class token"
        raise UsageError(f"pool={pool}, but the checkpoint has {has}; leave pool out")
    heads = int(config.get("num_heads") or max(1, width // 64))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    arguments: dict[str, Any] = {"pos_embed": "learn" if "pos_embed" in state else "none"}
    if video:
        arguments = {"num_frames": int(config.get("num_frames") or VIDEO_FRAMES), "tubelet_size": kernel.shape[2]}
    return create_encoder(
        "videomae_base_patch16_224" if video else "vit_base_patch16_224",
        image_size=_image_size(state, config, patch),
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads,
        mlp_ratio=Hidden(width, len(state["blocks.0.fc1.weight"])).ratio,
        drop_path=float(config.get("drop_path", 0.0)),
        qkv_bias="blocks.0.attn.q_proj.bias" in state or "blocks.0.attn.q_bias" in state,
        class_token="cls_token" in state,
        global_pool="avg" if pooled else "token",
        fc_norm=pooled,
        **arguments,
    )


def _image_size(state: Mapping[str, Tensor], config: Mapping[str, Any], patch: int) -> tuple[int, int]:
    size = config.get("image_size")
    if size is not None:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if "pos_embed" not in state:
        return 224, 224  # positions of video are computed for the clip at hand
    patches = state["pos_embed"].shape[1] - ("cls_token" in state)
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UsageError(f"a position embedding of {patches} patches is of no square grid; give img_size=(H, W)")
    return side * patch, side * patch


def _insertion(state: Mapping[str, Tensor], config: Mapping[str, Any], encoder: Encoder) -> Insertion:
    """Return fresh adapters, prompts or a bare head, as the tensors tell."""
    classes = state["head.1.weight"].shape[0]
    own_norm, video = "fc_norm.weight" in state, state["patch_embed.proj.weight"].ndim == 5
    down = "adaptmlp.down_proj.weight"
    with_adapter = sorted({int(name.split(".")[1]) for name in state if name.endswith(down)})
    if not with_adapter:
        if "embeddings.0" in state:
            prompts = state["embeddings.0"].shape[1]
            return VisualPrompts(encoder, prompts, "deep", num_classes=classes, own_pool_norm=own_norm)
        return LinearHead(encoder, classes, own_pool_norm=own_norm)
    widths = {state[f"blocks.{number}.{down}"].shape[0] for number in with_adapter}
    if len(widths) > 1:
        raise UsageError(f"the adapters differ in bottleneck ({', '.join(map(str, sorted(widths)))}); expected one")
    first = f"blocks.{with_adapter[0]}.adaptmlp"
    has_norm = f"{first}.adapter_layer_norm_before.weight" in state
    norm = config.get("norm", "none")
    if has_norm and norm not in ("in", "out"):
        raise UsageError("the adapters have a layer norm; say where it stands: norm=in (before) or norm=out (after)")
    if not has_norm and norm != "none":
        raise UsageError(f"norm={norm}, but the adapters in the checkpoint have no layer norm; leave it out")
    scale = config.get("scale", 0.1)
    learnt = f"{first}.scale" in state
    if not learnt and isinstance(scale, str):
        try:
            scale = float(scale)
        except ValueError as error:
            raise UsageError(f"scale={scale}, but the checkpoint holds no learnt scale; give a number") from error
    return AdaptFormer(
        encoder,
        bottleneck=widths.pop(),
        scale="learnable" if learnt else float(scale),
        placement=config.get("placement", "parallel"),
        input=config.get("input", "residual"),
        norm=norm,
        blocks=with_adapter,
        num_classes=classes,
        dropout=float(config.get("dropout", config.get("drop_rate", 0.0) if video else 0.1)),
        own_pool_norm=own_norm,
    )


def _our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under our names: projections fused in the order q, k, v, prompts in one tensor."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    prompts: dict[int, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn)\.(?:(q|k|v)_proj\.(weight|bias)|(q|v)_(bias))", name):
            owner, letter, kind = match[1], match[2] or match[4], match[3] or match[5]
            parts.setdefault(f"{owner}.qkv.{kind}", {})[letter] = value
        elif match := re.fullmatch(r"embeddings\.(\d+)", name):
            prompts[int(match[1])] = value
        elif match := re.fullmatch(r"blocks\.(\d+)\.adaptmlp\.(.+)", name):
            rest = match[2].replace("adapter_layer_norm_before", "norm")
            ours[f"adapters.{NAME}.adapters.{match[1]}.{rest}"] = value
        elif match := re.fullmatch(r"(blocks\.\d+)\.(fc[12]\..+)", name):
            ours[f"{match[1]}.mlp.{match[2]}"] = value
        elif name.startswith("head."):
            ours[f"adapters.{NAME}.{name}"] = value
        else:
            ours[name] = value
    for name, letters in parts.items():
        if name.endswith("bias") and set(letters) == {"q", "v"}:  # video: keys have none
            letters["k"] = torch.zeros_like(letters["q"])
        if set(letters) != {"q", "k", "v"}:
            raise UsageError(f"{name} is incomplete: the checkpoint has its parts {', '.join(sorted(letters))} only")
        ours[name] = torch.cat([letters[letter] for letter in "qkv"])
    if prompts:
        ours[f"adapters.{NAME}.prompts"] = torch.cat([prompts[number] for number in sorted(prompts)])
    return ours
