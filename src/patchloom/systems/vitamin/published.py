"""Checkpoints of ViTamin (github.com/Beckschen/ViTamin; arXiv 2404.02132): CLIP models in open_clip's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp, MbConvLNBlock, Stem, StridedConv
from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.encoders.vitamin import build_vitamin
from patchloom.errors import UsageError
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Settings
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.text import TextTower
from patchloom.systems.vitamin.model import CELL, SlidingWindowFeatures, ViTaminTower

SETTINGS = Settings(
    obeyed=("num_heads", "text_heads", "img_size", "stride", "window", "add_pos_embed"),
    idle=(
        *("custom_text", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop", "timm_drop_path"),
        *("timm_model_name", "drop_path", "drop", "drop_rate", "drop_path_rate", "quick_gelu", "cast_dtype", "cfg"),
        *("norm_layer", "act_layer", "kernel_size", "mlp_ratio", "expand_ratio", "class_token", "global_pool"),
    ),
    other_names={
        "heads": "num_heads",
        "image_size": "img_size",
        "input_size": "img_size",
        "window_size": "window",
        "slide_window": "window",
        "slide_stride": "stride",
        "in_features": "embed_dim",
        "in_chs": "in_channels",
        "out_chs": "out_channels",
    },
    sections={
        "vision_cfg": {"image_size": "img_size", "heads": "num_heads"},
        "text_cfg": {"heads": "text_heads", "width": "text_width", "layers": "text_layers"},
        "preprocess_cfg": None,
    },
)
HEADS = {96: 3, 384: 6, 768: 12, 1024: 16, 1152: 16}
"""Of the published sizes and of the tiny one here, by their widths."""
TEXT_HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16}
SIZES = {
    "tiny": ((16, 32, 96), (1, 1), 3),
    "small": ((64, 128, 384), (2, 4), 14),
    "base": ((128, 256, 768), (2, 4), 14),
    "large": ((160, 320, 1024), (2, 4), 31),
    "xlarge": ((192, 384, 1152), (2, 4), 32),
}
"""Channels and depths of the sizes that have names."""
TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
STEM = "patch_embed.backbone.stem.conv1.weight"


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return the model of a published checkpoint, or the layer whose state it is.

    Args:
        state: Tensors of a CLIP model (`visual.trunk.…`, `visual.head.proj.weight`, the text tower's under `text.` or
            at the top, `logit_scale`), of its image tower alone, of the trunk alone in timm's layout, or of one layer:
            MBConv block, gated feed-forward, Transformer block, stem, or the convolution between stages.
        **config: `num_heads` of the trunk and `text_heads`, where the widths are none of the published ones;
            `img_size`, where positions are no square or there are none; `stride` of an MBConv block (2 where its
            shortcut is pooled and widened, else 1). With `window` (and `stride`, `add_pos_embed`) the trunk comes as
            `SlidingWindowFeatures`. The configuration of open_clip may be given whole.

    Returns:
        `CLIP`, `ViTaminTower`, the trunk, `SlidingWindowFeatures`, or the layer.

    Raises:
        UsageError: A setting that is unknown, missing or contradicts the tensors; tensors missing or left over.
    """
    state = {name: value for name, value in state.items() if name.rsplit(".", 1)[-1] != "attn_mask"}
    if "conv2_kxk.weight" in state:
        return _mbconv(state, config)
    if "w0.weight" in state:
        width = int(state["w0.weight"].shape[1])
        settled = {"embed_dim": width, "hidden_features": len(state["w0.weight"])}
        SETTINGS.settle(config, settled)
        return fill(GeGluMlp(width, len(state["w0.weight"])), state)
    if "attn.qkv.weight" in state:
        return _block(state, config)
    if "conv1.weight" in state and "norm1.weight" in state:
        SETTINGS.settle(config, {})
        return fill(Stem(state["conv1.weight"].shape[1], len(state["conv1.weight"])), state)
    if set(state) == {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}:
        SETTINGS.settle(config, {})
        return fill(StridedConv(in_chans=state["proj.weight"].shape[1], embed_dim=len(state["proj.weight"])), state)
    return _model(state, config)


def _mbconv(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    entering, leaving = int(state["conv1_1x1.weight"].shape[1]), len(state["conv3_1x1.weight"])
    settled = SETTINGS.settle(config, {"in_channels": entering, "out_channels": leaving})
    pooled = "shortcut.expand.weight" in state
    stride = int(settled.get("stride") or (2 if pooled else 1))
    ratio = len(state["conv1_1x1.weight"]) / leaving
    block = MbConvLNBlock(entering, leaving, stride=stride, expand_ratio=ratio)
    return fill(block, state)


def _block(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    require(state, "mlp.w0.weight")
    width = int(state["attn.qkv.weight"].shape[1])
    settled = SETTINGS.settle(config, {"embed_dim": width})
    ratio = len(state["mlp.w0.weight"]) / width
    heads = _heads(settled.get("num_heads"), width, "num_heads")
    block = Block(width, heads, mlp_ratio=ratio, qkv_bias=True, mlp_layer=GeGluMlp, norm_layer=_Norm)
    return fill(block, state)


class _Norm(nn.LayerNorm):
    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(width, eps=1e-6, **kwargs)


def _model(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return trunk, image tower or both towers."""
    prefix = next((p for p in ("visual.trunk.", "trunk.", "") if f"{p}{STEM}" in state), None)
    if prefix is None:
        raise UsageError(f"missing: visual.trunk.{STEM}; this is no checkpoint of ViTamin")
    trunk_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    rest = {name: value for name, value in state.items() if not prefix or not name.startswith(prefix)}
    text, names = _text_state({} if not prefix else rest)
    head = rest.pop("visual.head.proj.weight", rest.pop("head.proj.weight", None)) if prefix else None
    found = _structure(trunk_state)
    told: dict[str, Any] = {"depth": found["depth"], "embed_dim": None, "patch_size": None}
    if text:
        require(text, "token_embedding.weight", "positional_embedding")
        vocabulary, width = text["token_embedding.weight"].shape
        told |= {"text_width": int(width), "vocab_size": int(vocabulary)}
        told |= {"context_length": len(text["positional_embedding"])}
        told |= {"text_layers": _count(text, "transformer.resblocks")}
    settled = SETTINGS.settle(config, told)
    trunk = _trunk(trunk_state, found, settled)
    if settled.get("window") is not None:
        fill(trunk, trunk_state, published=lambda name: prefix + name)
        trunk.eval()
        return SlidingWindowFeatures(
            trunk, settled["window"], settled.get("stride"), bool(settled.get("add_pos_embed", True))
        )
    if not prefix or head is None:
        return fill(trunk, {**trunk_state, **rest} if prefix else trunk_state, published=lambda name: prefix + name)
    if not text:
        rest.pop("logit_scale", None)
        tower = ViTaminTower(trunk, trunk.num_features, len(head))
        ours = {f"trunk.{name}": value for name, value in trunk_state.items()}
        leading = prefix.removesuffix("trunk.")
        return fill(tower, {**ours, "head.proj.weight": head, **rest}, published=lambda name: leading + name)
    require(state, "logit_scale")
    width = told["text_width"]
    text_tower = TextTower(
        context_length=told["context_length"],
        vocab_size=told["vocab_size"],
        width=width,
        heads=_heads(settled.get("text_heads") or TEXT_HEADS.get(width), width, "text_heads"),
        layers=told["text_layers"],
        output_dim=len(head),
    )
    model = CLIP(trunk, text_tower, tower=ViTaminTower)
    ours = {f"visual.trunk.{name}": value for name, value in trunk_state.items()}
    ours |= {f"text.{name}": value for name, value in text.items()}
    left = {name: value for name, value in rest.items() if name not in names}
    left["logit_scale"] = left["logit_scale"].reshape(())
    return fill(model, {**ours, "visual.head.proj.weight": head, **left})


def _text_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors of the text tower, which stand under `text.` or at the top, and their names."""
    names = {name for name in state if name.startswith(("text.", *TEXT))}
    return {name.removeprefix("text."): state[name] for name in names}, names


def _structure(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the tensors of a trunk tell of its shape."""
    stages = "patch_embed.backbone.stages"
    require(state, f"{stages}.0.0.conv3_1x1.weight", f"{stages}.1.0.conv3_1x1.weight", "blocks.0.mlp.w0.weight")
    require(state, "patch_embed.backbone.pool.proj.weight")
    width = len(state["patch_embed.backbone.pool.proj.weight"])
    return {
        "in_chans": int(state[STEM].shape[1]),
        "stem_width": len(state[STEM]),
        "channels": (*(len(state[f"{stages}.{number}.0.conv3_1x1.weight"]) for number in (0, 1)), width),
        "depths": tuple(_count(state, f"{stages}.{number}") for number in (0, 1)),
        "depth": _count(state, "blocks"),
        "mlp_ratio": len(state["blocks.0.mlp.w0.weight"]) / width,
    }


def _trunk(state: dict[str, Tensor], found: Mapping[str, Any], settled: Mapping[str, Any]) -> Any:
    width = found["channels"][2]
    positions, size = state.get("pos_embed"), settled.get("img_size")
    size = (size, size) if isinstance(size, int) else None if size is None else tuple(int(side) for side in size)[-2:]
    if positions is None:
        size = size or (256, 256)
    else:
        side = round(positions.shape[1] ** 0.5)
        if size is None and side**2 != positions.shape[1]:
            raise UsageError(f"pos_embed has {positions.shape[1]} positions, which are no square; give img_size")
        # A configuration may name the size before fine-tuning at another one: the table tells.
        if size is None or (size[0] // CELL) * (size[1] // CELL) != positions.shape[1]:
            size = (side * CELL, side * CELL)
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    shape = found["channels"], found["depths"], found["depth"]
    heads = _heads(settled.get("num_heads"), width, "num_heads")
    named = next((name for name, own in SIZES.items() if own == shape), None)
    usual = heads == HEADS.get(width) and found["mlp_ratio"] == 2 and found["stem_width"] == found["channels"][0]
    if named is not None and usual and not classes and (named == "xlarge") == (positions is None):
        names = timm.list_models(f"vitamin_{named}_*")
        name = f"vitamin_{named}_{size[0]}"
        return create_encoder(name if name in names else names[0], image_size=size, in_chans=found["in_chans"])
    without: dict[str, Any] = {"pos_embed": "none"} if positions is None else {}
    model: Any = build_vitamin(
        "vitamin_tiny_64",
        channels=found["channels"],
        depths=found["depths"],
        stem_width=found["stem_width"],
        in_chans=found["in_chans"],
        img_size=size,
        depth=found["depth"],
        num_heads=heads,
        mlp_ratio=found["mlp_ratio"],
        num_classes=classes,
        **without,
    )
    return model


def _heads(given: Any, width: int, name: str) -> int:
    heads = given or HEADS.get(width)
    if heads is None:
        raise UsageError(f"tensors do not tell the number of heads of a width of {width}; give {name}")
    if width % int(heads):
        raise UsageError(f"{name} is {heads}, which does not divide the width {width}")
    return int(heads)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [int(m[1]) for name in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)
