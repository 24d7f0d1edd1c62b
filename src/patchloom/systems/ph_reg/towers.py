"""CLIP's image towers, from the names of OpenAI's code and of open_clip to a ViT of timm and a projection."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from patchloom.base.hub import fetching, reason
from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import MissingExtraError, UsageError
from patchloom.models.published import fill, read_state, require

PREFIX = "open_clip:"
"""What the names of towers begin with: open_clip:MODEL/WEIGHTS."""
OUTSIDE = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
}
INSIDE = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


class Tower(NamedTuple):
    """A CLIP image tower."""

    encoder: Encoder
    """Its ViT of timm, without projection."""
    projection: Tensor
    """(C, E), to the space of texts."""


def is_tower(name: str) -> bool:
    """Return whether a name is that of a CLIP tower: open_clip:MODEL/WEIGHTS."""
    return name.startswith(PREFIX)


def open_tower(name: str) -> Tower:
    """Return the tower of a name, `open_clip:MODEL/WEIGHTS`.

    Args:
        name: MODEL as open_clip calls it; WEIGHTS its tag of them, which are fetched, or a file of a whole CLIP or of a
            tower under OpenAI's names.

    Raises:
        UsageError: No such model or weights, they cannot be fetched, or a tower that is no plain ViT.
        MissingExtraError: open_clip is not installed.
    """
    model_name, _, weights = name.removeprefix(PREFIX).partition("/")
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "clip", "a CLIP tower") from error
    if model_name not in open_clip.list_models():
        raise UsageError(f"open_clip knows no model {model_name!r}; open_clip.list_models() has all")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not weights or (weights not in tags and not Path(weights).is_file()):
        known = ", ".join(tags[:8]) or "none that can be fetched"
        raise UsageError(f"{name}: give the weights behind a slash, open_clip:{model_name}/WEIGHTS: {known}, or a file")
    try:
        with fetching(), torch.random.fork_rng(devices=[]), _quiet():
            fetched = None if Path(weights).is_file() else weights
            visual: Any = open_clip.create_model(model_name, pretrained=fetched).visual
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"the weights of {name} could not be fetched ({reason(error)})") from error
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(visual, "ln_pre"):
        raise UsageError(f"the image tower of {model_name} is a {type(visual).__name__}; this is for its plain ViTs")
    state = visual.state_dict()
    if Path(weights).is_file():
        state = _image_part(read_state(weights))
    quick = type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
    tower = tower_of(state, num_heads=int(blocks[0].attn.num_heads), quick_gelu=quick)
    statistics = {
        kind: tuple(getattr(visual, f"image_{kind}", None) or default)
        for kind, default in (("mean", OPENAI_CLIP_MEAN), ("std", OPENAI_CLIP_STD))
    }
    tower.encoder.pretrained_cfg = {**tower.encoder.pretrained_cfg, **statistics}
    return tower


def _image_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower's tensors of a whole CLIP, whose text tower has the same names; or of a tower, all."""
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    return visual or dict(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let open_clip not warn that a model has no weights, which are read from a file later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def tower_of(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, quick_gelu: bool = True, registers: str | None = None
) -> Tower:
    """Return the tower of tensors under OpenAI's names.

    Args:
        state: `class_embedding`, `positional_embedding`, `conv1.weight`, `ln_pre`, `transformer.resblocks.i`,
            `ln_post`, `proj`.
        num_heads: Heads; default: 64 wide each.
        quick_gelu: The activation is x · sigmoid(1.702 x), as in OpenAI's.
        registers: Name of a tensor (R, C) of register tokens.

    Raises:
        UsageError: Tensors missing or left over, or positions of no square grid.
    """
    state = {name: at_least_float32(value) for name, value in state.items()}
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    require(state, "class_embedding", "positional_embedding", "conv1.weight", "proj", first)
    projection = state.pop("proj")
    new = None if registers is None else state.pop(registers)
    width, channels, patch, _ = state["conv1.weight"].shape
    side = round((len(state["positional_embedding"]) - 1) ** 0.5)
    if side * side + 1 != len(state["positional_embedding"]):
        raise UsageError(f"the {len(state['positional_embedding'])} positions are of no class token and square grid")
    heads = num_heads or max(1, width // 64)
    if width % heads:
        raise UsageError(f"the width {width} is not divisible by num_heads {heads}; give the number the model has")
    blocks = {int(found[1]) for name in state if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    with_registers: dict[str, Any] = {} if new is None else {"reg_tokens": len(new), "no_embed_class": True}
    hidden = len(state[first])
    encoder: Any = create_encoder(
        f"vit_base_patch16_clip_{'quickgelu_' if quick_gelu else ''}224",
        image_size=side * patch,
        in_chans=int(channels),
        patch_size=int(patch),
        embed_dim=int(width),
        depth=len(blocks),
        num_heads=heads,
        mlp_ratio=hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        **with_registers,
    )
    ours = {_named(name): value for name, value in state.items()}
    ours["cls_token"] = ours["cls_token"].reshape(1, 1, -1)
    ours["pos_embed"] = ours["pos_embed"].unsqueeze(0)
    if new is not None:
        # timm's class token has no position of its own where there are registers; the sum is the same.
        ours["cls_token"] = ours["cls_token"] + ours["pos_embed"][:, :1]
        ours["pos_embed"], ours["reg_token"] = ours["pos_embed"][:, 1:], new.unsqueeze(0)
    fill(encoder, ours, published=lambda name: registers if registers and name == "reg_token" else _theirs(name))
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
    return Tower(encoder.eval(), projection)


def _named(name: str) -> str:
    """Return timm's name of a tensor by OpenAI's; an unknown one is as it is, and refused where it is filled in."""
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if layer is None:
        return _renamed(name, OUTSIDE)
    return f"blocks.{layer[1]}.{_renamed(layer[2], INSIDE)}"


def _theirs(name: str) -> str:
    """Return OpenAI's name of a tensor by timm's."""
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if layer is None:
        return _renamed(name, {ours: theirs for theirs, ours in OUTSIDE.items()})
    inside = _renamed(layer[2], {ours: theirs for theirs, ours in INSIDE.items()})
    return f"transformer.resblocks.{layer[1]}.{inside}"


def _renamed(name: str, names: Mapping[str, str]) -> str:
    begin = next((old for old in names if name.startswith(old)), None)
    return name if begin is None else names[begin] + name.removeprefix(begin)
