"""Published DVPT layouts of Swin and SegFormer (arXiv 2307.09787): key conversion."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from patchloom.encoders.insertion import insert
from patchloom.errors import UsageError
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Hidden, set_epsilon
from patchloom.systems.dvpt.published_settings import OF_SEGFORMER, OF_SWIN
from patchloom.systems.dvpt.pyramids import DVPTSegFormer, DVPTSwin

NAME = "adapter"
RANK = "prompt_proj.prompt_key_proj_d.weight"


def load_swin(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return a timm Swin Transformer of a published state dict with prompts, bottlenecks and head in it."""
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    masks = {name: value for name, value in state.items() if name.endswith("attn_mask")}
    state = {k: v for k, v in state.items() if not k.endswith(("attn_mask", "relative_position_index"))}
    for name in ("patch_embed.proj.weight", "layers.0.blocks.0.prompt", "fc_head.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no DVPT model of a Swin Transformer")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depths = _depths(state, r"layers\.(\d+)\.blocks\.(\d+)\.")
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    require(state, table.format(0), "layers.0.blocks.0.mlp.fc1.weight", f"layers.0.blocks.0.{RANK}")
    hidden = Hidden(width, len(state["layers.0.blocks.0.mlp.fc1.weight"]))
    heads = tuple(state[table.format(stage)].shape[1] for stage in range(len(depths)))
    config = OF_SWIN.settle(
        config,
        {
            "embed_dim": width,
            "patch_size": patch,
            "in_chans": channels,
            "depths": depths,
            "num_heads": heads,
            "window_size": (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2,
            "mlp_ratio": hidden,
            "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
            "num_prompts": state["layers.0.blocks.0.prompt"].shape[1],
            "rank": len(state[f"layers.0.blocks.0.{RANK}"]),
            "num_classes": len(state["fc_head.weight"]),
        },
    )
    window = (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2
    share = _share(config, 3)
    encoder: Any = timm.create_model(
        "swin_base_patch4_window7_224",
        num_classes=0,
        img_size=config.get("image_size") or _swin_side(masks, window, patch),
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=window,
        mlp_ratio=hidden.ratio,
    )
    prompts = DVPTSwin(
        encoder,
        num_prompts=state["layers.0.blocks.0.prompt"].shape[1],
        rank=state[f"layers.0.blocks.0.{RANK}"].shape[0],
        share_every=share,
        num_classes=state["fc_head.weight"].shape[0],
    )
    insert(encoder, prompts, NAME)
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "fc_head.weight":
            ours[f"adapters.{NAME}.head.weight"] = value
        elif match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(prompt.*)", name):
            _added(ours, f"adapters.{NAME}.", int(match[1]), int(match[2]), match[3], value, share, name)
        elif match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
            ours[f"layers.{int(match[1]) + 1}.downsample.{match[2]}"] = value  # timm merges patches a stage later
        else:
            ours[name] = value
    fill(encoder, ours)
    set_epsilon(encoder, config.get("layer_norm_eps"))
    return encoder.eval()


def load_segformer(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return a SegFormer of a published state dict with prompts and bottlenecks in encoder and decoder."""
    state = {re.sub(r"^(encoder|backbone|decoder|decode_head)\.", "", name): value for name, value in state.items()}
    for name in ("patch_embed1.proj.weight", "block1.0.prompt", "linear_pred.weight", "linear_c1.proj.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no DVPT model of a SegFormer")
    depths = _depths(state, r"block(\d+)\.(\d+)\.", start=1)
    stages = range(1, len(depths) + 1)
    widths = tuple(state[f"block{k}.0.norm1.weight"].shape[0] for k in stages)
    reductions = [state.get(f"block{k}.0.attn.sr.weight") for k in stages]
    ratios = tuple(1 if kernel is None else kernel.shape[-1] for kernel in reductions)
    hidden = [Hidden(width, len(state[f"block{k}.0.mlp.fc1.weight"])) for k, width in zip(stages, widths, strict=True)]
    config = OF_SEGFORMER.settle(
        config,
        {
            "embed_dims": widths,
            "depths": depths,
            "in_chans": state["patch_embed1.proj.weight"].shape[1],
            "sr_ratios": ratios,
            "mlp_ratios": tuple(each.hidden // each.width for each in hidden),
            "qkv_bias": "block1.0.attn.q.bias" in state,
            "num_prompts": state["block1.0.prompt"].shape[1],
            "rank": len(state[f"block1.0.{RANK}"]),
            "decoder_width": len(state["linear_c1.proj.weight"]),
            "num_classes": len(state["linear_pred.weight"]),
        },
    )
    heads = config.get("num_heads") or (1, 2, 5, 8)[: len(depths)]
    if wrong := [(width, count) for width, count in zip(widths, heads, strict=True) if width % count]:
        raise UsageError(f"num_heads={list(heads)}: {wrong[0][1]} does not divide the width of {wrong[0][0]}")
    share = _share(config, 2)
    encoder: Any = timm.create_model(
        "pvt_v2_b4",
        num_classes=0,
        in_chans=state["patch_embed1.proj.weight"].shape[1],
        depths=depths,
        embed_dims=widths,
        num_heads=tuple(heads),
        sr_ratios=ratios,
        mlp_ratios=tuple(each.ratio for each in hidden),
        qkv_bias="block1.0.attn.q.bias" in state,
    )
    model = DVPTSegFormer(
        encoder,
        num_classes=state["linear_pred.weight"].shape[0],
        decoder_width=state["linear_c1.proj.weight"].shape[0],
        num_prompts=state["block1.0.prompt"].shape[1],
        rank=state[f"block1.0.{RANK}"].shape[0],
        share_every=share,
    )
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"patch_embed(\d+)\.(.+)", name):
            place = "patch_embed" if match[1] == "1" else f"stages.{int(match[1]) - 1}.downsample"
            ours[f"encoder.{place}.{match[2]}"] = value
        elif match := re.fullmatch(r"block(\d+)\.(\d+)\.(prompt.*)", name):
            owner = f"encoder.adapters.{NAME}."
            _added(ours, owner, int(match[1]) - 1, int(match[2]), match[3], value, share, name)
        elif match := re.fullmatch(r"block(\d+)\.(\d+)\.(.+)", name):
            rest = match[3].replace("dwconv.dwconv", "dwconv")
            ours[f"encoder.stages.{int(match[1]) - 1}.blocks.{match[2]}.{rest}"] = value
        elif match := re.fullmatch(r"norm(\d+)\.(.+)", name):
            ours[f"encoder.stages.{int(match[1]) - 1}.norm.{match[2]}"] = value
        elif match := re.fullmatch(r"linear_c(\d+)\.(.+)", name):
            _added_projection(ours, f"projections.{int(match[1]) - 1}", match[2], value)
        elif name.startswith("linear_pred."):
            ours[name.replace("linear_pred", "classifier")] = value
        else:
            ours[name] = value
    return fill(model, ours).eval()


def _depths(state: Mapping[str, Tensor], pattern: str, start: int = 0) -> tuple[int, ...]:
    """Return the number of blocks of each stage, by the names of their tensors."""
    places = {(int(match[1]), int(match[2])) for name in state if (match := re.match(pattern, name))}
    stages = max(stage for stage, _ in places) + 1
    return tuple(sum(stage == one for one, _ in places) for stage in range(start, stages))


def _share(config: Mapping[str, Any], default: int) -> int:
    share = int(config.get("share_every", default))
    if share < 1:
        raise UsageError(f"share_every is {share}; it must be at least 1")
    return share


def _swin_side(masks: Mapping[str, Tensor], window: int, patch: int) -> int:
    """Return the side of the images: the mask of the first stage has a row for each window."""
    first = next((value for name, value in sorted(masks.items()) if name.startswith("layers.0.")), None)
    return 224 if first is None else math.isqrt(first.shape[0]) * window * patch


def _added(
    ours: dict[str, Tensor],
    owner: str,
    stage: int,
    number: int,
    part: str,
    value: Tensor,
    share: int,
    name: str,
) -> None:
    """Note a prompt, a gate or a shared bottleneck's tensor of a block."""
    if part == "prompt":
        ours[f"{owner}prompts.{stage}_{number}"] = value
    elif part == "prompt_gate2":
        ours[f"{owner}gates.{stage}_{number}"] = value
    else:
        take_shared(ours, f"{owner}bottlenecks.{stage}_{number // share}", part, value, name)


def take_shared(ours: dict[str, Tensor], owner: str, part: str, value: Tensor, name: str) -> None:
    """Note a tensor of a shared bottleneck, of which the file has a copy for every block of the group.

    Args:
        ours: Tensors under our names, added to.
        owner: Our name of the bottleneck.
        part: Its tensor, by the published name.
        value: One copy.
        name: Where the copy stands, for the error.

    Raises:
        UsageError: The copies differ.
    """
    renamed = part.removeprefix("prompt_proj.").replace("prompt_key_proj_d", "down").replace("prompt_key_proj_u", "up")
    target = f"{owner}.{renamed.replace('prompt_gate', 'gate')}"
    if target in ours and not torch.equal(ours[target], value):
        raise UsageError(
            f"{name} differs from the copy in an earlier block of its group, so they do not share a bottleneck; "
            f"give the share_every it was trained with"
        )
    ours[target] = value


def _added_projection(ours: dict[str, Tensor], owner: str, part: str, value: Tensor) -> None:
    for published, timm_name in (("prompt_key_proj_d", "down"), ("prompt_key_proj_u", "up"), ("prompt_gate", "gate")):
        if part.startswith(published):
            part = f"bottleneck.{timm_name}{part.removeprefix(published)}"
            break
    ours[f"{owner}.{part}"] = value
