"""Published AdaptFormer checkpoints: image and video, adapters, prompts and linear probe (specification, section 4)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.adapt.adaptformer import AdaptFormer
from patchloom.adapt.insertion import Insertion, insert
from patchloom.adapt.linear import LinearHead
from patchloom.adapt.vpt import VisualPrompts
from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.video import TubeletEmbed
from patchloom.errors import UsageError, unknown_name
from patchloom.reference.state import check_settings, fill

NAME = "adapter"
# What shapes do not tell, under our names and those of the published scripts.
ALIASES = {
    "adapter_scalar": "scale",
    "ffn_adapter_scalar": "scale",
    "ffn_option": "placement",
    "ffn_adapter_layernorm_option": "norm",
    "adapter_layernorm_option": "norm",
    "image_size": "img_size",
    "input_size": "img_size",
}
SETTINGS = ("img_size", "num_heads", "scale", "placement", "pool", "norm", "input")
# Change training, or are told by the tensors: they may be given and have no effect.
WITHOUT_EFFECT = ("dropout", "drop_path", "drop_path_rate", "bottleneck", "ffn_num", "num_classes", "num_frames")


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return the encoder of a published state dict with its adapters, prompts or head in it.

    Args:
        state: Tensors under the published names.
        **config: `num_heads` (default: 64 wide each), `scale` (default 0.1; a learnt one is in the file), `placement`
            (`parallel` or `sequential`), `norm` (`in` or `out`, where adapters have a layer norm), `img_size` (a side
            or (H, W), where the positions are of no square grid), `pool` (`token` or `avg`; has to agree).

    Returns:
        A timm `VisionTransformer` that gives logits for (B, 3, H, W) images, or (B, 3, T, H, W) clips.

    Raises:
        UsageError: Unknown setting, one that contradicts the tensors, or tensors missing or left over.
    """
    check_settings(config, (*SETTINGS, *WITHOUT_EFFECT, *ALIASES))
    config = {ALIASES.get(name, name): value for name, value in config.items()}
    for name in ("patch_embed.proj.weight", "blocks.0.attn.q_proj.weight", "blocks.0.fc1.weight", "head.1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no AdaptFormer model")
    encoder = _encoder(state, config)
    insertion = _insertion(state, config, encoder)
    insert(encoder, insertion, NAME)
    fill(encoder, _our_names(state))
    return encoder.eval()


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
    arguments: dict[str, Any] = {"embed_layer": TubeletEmbed} if video else {}
    return create_encoder(
        "vit_base_patch16_224",
        image_size=_image_size(state, config, patch),
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads,
        mlp_ratio=state["blocks.0.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.q_proj.bias" in state or "blocks.0.attn.q_bias" in state,
        class_token="cls_token" in state,
        pos_embed="learn" if "pos_embed" in state else "none",
        global_pool="avg" if pooled else "token",
        fc_norm=pooled,
        **arguments,
    )


def _image_size(state: Mapping[str, Tensor], config: Mapping[str, Any], patch: int) -> tuple[int, int]:
    told = config.get("img_size")
    if told is not None:
        return (told, told) if isinstance(told, int) else (int(told[0]), int(told[1]))
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
    down = "adaptmlp.down_proj.weight"
    with_adapter = sorted({int(name.split(".")[1]) for name in state if name.endswith(down)})
    if not with_adapter:
        if "embeddings.0" in state:
            return VisualPrompts(encoder, state["embeddings.0"].shape[1], "deep", num_classes=classes)
        return LinearHead(encoder, classes)
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
