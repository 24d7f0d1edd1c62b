"""Published DVPT layouts: the CLIP visual tower, Swin and SegFormer (arXiv 2307.09787)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.encoders.insertion import insert
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Hidden, set_epsilon
from patchloom.systems.dvpt.model import DVPT
from patchloom.systems.dvpt.published_pyramids import load_segformer, load_swin, take_shared
from patchloom.systems.dvpt.published_settings import OF_CLIP

NAME = "adapter"
BACKBONES = ("clip_vit", "swin", "segformer")
BLOCK = re.compile(r"encoder\.transformer\.resblocks\.(\d+)\.(.+)")
# timm's name for each part of a CLIP block.
PARTS = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.": "attn.proj.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
OUTSIDE = {
    "encoder.conv1.weight": "patch_embed.proj.weight",
    "encoder.class_embedding": "cls_token",
    "encoder.positional_embedding": "pos_embed",
    "encoder.ln_pre.weight": "norm_pre.weight",
    "encoder.ln_pre.bias": "norm_pre.bias",
    "encoder.ln_post.weight": "norm.weight",
    "encoder.ln_post.bias": "norm.bias",
    "encoder.prompt_token": f"adapters.{NAME}.prompts",
    "encoder.prompt_positional_embedding": f"adapters.{NAME}.positions",
    "encoder.proj": f"adapters.{NAME}.projection.weight",
    "fc_head.weight": f"adapters.{NAME}.head.weight",
}


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return the encoder of a published state dict with prompts, bottlenecks and head in it.

    Args:
        state: Tensors under the published names.
        **config: `backbone` (`clip_vit`, `swin` or `segformer`; default: as the names tell), `num_heads` (default: 64
            wide each in a ViT; a list for the others), `share_every` (checked against the copies in the file;
            default 3, for SegFormer 2), `dynamic` (default False: what the published code computes), `img_size`
            (a side or (H, W), where positions are of no square grid), `window_size` (Swin). What shapes tell may be
            given under the names of the three backbones' code, and has to agree.

    Returns:
        A module that gives logits for (B, 3, H, W) images.

    Raises:
        UsageError: Unknown setting, copies of a shared bottleneck that differ, or tensors missing or left over.
    """
    config = dict(config)
    backbone = config.pop("backbone", None) or _kind_from_names(state)
    if backbone not in BACKBONES:
        raise unknown_name("backbone", str(backbone), BACKBONES)
    if backbone == "clip_vit":
        return _clip(dict(state), config)
    return (load_swin if backbone == "swin" else load_segformer)(dict(state), config)


def _kind_from_names(state: Mapping[str, Tensor]) -> str:
    if "encoder.conv1.weight" in state:
        return "clip_vit"
    if any(re.match(r"(encoder\.)?layers\.0\.blocks\.", name) for name in state):
        return "swin"
    if any(re.search(r"block1\.0\.", name) for name in state):
        return "segformer"
    raise UsageError("the checkpoint has neither encoder.conv1.weight nor blocks of Swin or SegFormer: no DVPT model")


def _clip(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    for name in ("encoder.conv1.weight", "encoder.prompt_token", "encoder.positional_embedding", "fc_head.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no DVPT model of a CLIP tower")
    first = "encoder.transformer.resblocks.0."
    require(state, f"{first}mlp.c_fc.weight", f"{first}prompt_proj.prompt_key_proj_d.weight")
    width, channels, patch, _ = state["encoder.conv1.weight"].shape
    blocks = len({match[1] for name in state if (match := BLOCK.match(name))})
    hidden = Hidden(width, len(state[f"{first}mlp.c_fc.weight"]))
    config = OF_CLIP.settle(
        config,
        {
            "embed_dim": width,
            "patch_size": patch,
            "in_chans": channels,
            "depth": blocks,
            "mlp_ratio": hidden,
            "num_prompts": state["encoder.prompt_token"].shape[1],
            "rank": len(state[f"{first}prompt_proj.prompt_key_proj_d.weight"]),
            "projection": state["encoder.proj"].shape[1] if "encoder.proj" in state else None,
            "num_classes": len(state["fc_head.weight"]),
        },
    )
    heads = int(config.get("num_heads") or max(1, width // 64))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    share = int(config.get("share_every", 3))
    if share < 1:
        raise UsageError(f"share_every is {share}; it must be at least 1")
    encoder = create_encoder(
        "vit_base_patch16_clip_quickgelu_224",
        image_size=_image_size(state["encoder.positional_embedding"].shape[0] - 1, patch, config),
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=blocks,
        num_heads=heads,
        mlp_ratio=hidden.ratio,
    )
    rank = state["encoder.transformer.resblocks.0.prompt_proj.prompt_key_proj_d.weight"].shape[0]
    insertion = DVPT(
        encoder,
        num_prompts=state["encoder.prompt_token"].shape[1],
        rank=rank,
        share_every=share,
        dynamic=bool(config.get("dynamic", False)),
        num_classes=state["fc_head.weight"].shape[0],
        projection=state["encoder.proj"].shape[1] if "encoder.proj" in state else None,
    )
    insert(encoder, insertion, NAME)
    fill(encoder, _our_names(state, share))
    set_epsilon(encoder, config.get("layer_norm_eps"))
    return encoder.eval()


def _image_size(patches: int, patch: int, config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("image_size")
    if size is not None:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UsageError(f"a position embedding of {patches} patches is of no square grid; give img_size=(H, W)")
    return side * patch, side * patch


def _our_names(state: Mapping[str, Tensor], share: int) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in OUTSIDE:
            ours[OUTSIDE[name]] = value
        elif match := BLOCK.match(name):
            number, part = int(match[1]), match[2]
            if part.startswith("prompt_proj."):
                take_shared(ours, f"adapters.{NAME}.bottlenecks.{number // share}", part, value, name)
                continue
            for published, timm_name in PARTS.items():
                if part.startswith(published):
                    part = timm_name + part.removeprefix(published)
                    break
            ours[f"blocks.{number}.{part}"] = value
        else:
            ours[name] = value
    if "cls_token" in ours:
        ours["cls_token"] = ours["cls_token"].reshape(1, 1, -1)
    ours["pos_embed"] = ours["pos_embed"].unsqueeze(0)
    if (projection := f"adapters.{NAME}.projection.weight") in ours:
        ours[projection] = ours[projection].T.contiguous()
    return ours
