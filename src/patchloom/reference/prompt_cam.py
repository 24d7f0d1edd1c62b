"""Published Prompt-CAM checkpoints: timm's `VisionTransformer` plus prompts and head (specification, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor

from patchloom.adapt.class_prompts import NAME, PromptCAM
from patchloom.encoders import Encoder, create_encoder
from patchloom.errors import UsageError
from patchloom.reference.state import agree, check_settings, fill

SETTINGS = ("num_heads", "patch_size", "img_size", "no_embed_class", "act", "norm_eps")
PROMPTS = "vpt.prompt_embeddings"
ENTRY_POINTS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def load(state: Mapping[str, Tensor], **config: Any) -> PromptCAM:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: What shapes do not tell: `num_heads` (default: 64 wide each), `act` (`gelu`, or `quick_gelu` for
            CLIP), `norm_eps` (default 1e-6; CLIP 1e-5), `img_size` (a side or (H, W); default: a square from the
            position embedding), `no_embed_class`; `patch_size` has to agree with the checkpoint's.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    check_settings(config, SETTINGS)
    for name in (PROMPTS, "head.weight", "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no Prompt-CAM model")
    encoder = _encoder(state, config)
    sets, classes, width = state[PROMPTS].shape
    blocks = len(encoder.blocks)
    if sets not in (1, blocks) or width != encoder.embed_dim:
        raise UsageError(
            f"{PROMPTS} is {tuple(state[PROMPTS].shape)}; expected ({blocks} or 1, classes, {encoder.embed_dim})"
        )
    model = PromptCAM(encoder, classes, depth="deep" if sets == blocks else "shallow", prompt_dropout=0.0, force=True)
    fill(model, {_our_name(name): value for name, value in state.items()})
    return model.eval()


def _our_name(name: str) -> str:
    if name == PROMPTS or name.startswith("head."):
        return f"encoder.adapters.{NAME}.{'prompts' if name == PROMPTS else name}"
    return f"encoder.{name}"


def _encoder(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Encoder:
    """Return a fresh `VisionTransformer` of the shapes in the state dict."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    agree(config, {"patch_size": patch})
    heads = int(config.get("num_heads") or max(1, width // 64))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = registers + ("cls_token" in state)
    size, no_embed_class = _size(state["pos_embed"].shape[1], prefix, patch, config)
    # timm's own entry points carry the epsilon, so that a bundle can name it.
    epsilon = float(config.get("norm_eps", 1e-6))
    name = ENTRY_POINTS.get(epsilon, "vit_base_patch16_224")
    other: dict[str, Any] = {} if epsilon in ENTRY_POINTS else {"norm_layer": partial(LayerNorm, eps=epsilon)}
    encoder = create_encoder(
        name,
        image_size=size,
        in_chans=channels,
        patch_size=patch,
        global_pool="token" if "cls_token" in state else "avg",
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        class_token="cls_token" in state,
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        pre_norm="norm_pre.weight" in state,
        fc_norm="fc_norm.weight" in state,
        final_norm="norm.weight" in state,
        act_layer=str(config.get("act", "gelu")),
        **other,
    )
    # All published models see images normalised by these, whatever their encoder was trained with.
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    if "patch_embed.proj.bias" in state and encoder.patch_embed.proj.bias is None:
        encoder.patch_embed.proj.bias = torch.nn.Parameter(torch.empty(width))
    return encoder


def _size(positions: int, prefix: int, patch: int, config: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """Return the image size (H, W), and whether prefix tokens are without position embedding."""
    told = config.get("img_size")
    size = None if told is None else (told, told) if isinstance(told, int) else (int(told[0]), int(told[1]))
    patches = None if size is None else (size[0] // patch) * (size[1] // patch)
    without = config.get("no_embed_class")
    if without is None:  # only one of the two gives a whole grid, as a rule
        counts = (positions - prefix, positions)
        fits = [
            count == patches if patches is not None else math.isqrt(max(count, 0)) ** 2 == count for count in counts
        ]
        without = fits[1] and not fits[0]
    count = positions if without else positions - prefix
    if patches is None:
        side = math.isqrt(max(count, 0))
        if side**2 != count or not count:
            raise UsageError(f"a position embedding of {positions} rows is of no square grid; give img_size=(H, W)")
        size = (side * patch, side * patch)
    elif patches != count:
        raise UsageError(
            f"img_size={told} has {patches} patches of {patch} pixels, but the position embedding has {count}"
        )
    assert size is not None
    return size, bool(without)
