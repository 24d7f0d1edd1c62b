"""Register tokens put into a trained Vision Transformer of timm, which stays one of timm.

Registers are tokens without a place that travel along with the patches (Darcet et al. 2024, arXiv 2309.16588). timm's
models take them where positions are of patches alone (`no_embed_class`), so what the class token had as its position is
added to it for good: the same sum.

>>> import timm
>>> plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> with_registers = add_registers(plain, 4)
>>> with_registers.reg_token.shape, with_registers.pos_embed.shape
(torch.Size([1, 4, 192]), torch.Size([1, 196, 192]))
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor

from patchloom.encoders import Encoder, create_encoder, family_of
from patchloom.encoders.anysize import AnySizeVisionTransformer, take_any_size
from patchloom.errors import UsageError
from patchloom.models.bundle import made_from


def check_takes_registers(encoder: Encoder) -> None:
    """Refuse a model that no registers can be put into.

    Raises:
        UsageError: Says why.
    """
    family = family_of(encoder)
    if family.kind == "image" and family.takes_registers:
        return
    reason = ": its relative-position tables have no entry for them" if isinstance(encoder, Beit) else ""
    raise UsageError(
        f"a {type(encoder).__name__} takes no register tokens{reason}; take a model of timm's vit_* or eva* families"
    )


def add_registers(
    encoder: Encoder, num_registers: int = 16, init_std: float | None = None, generator: torch.Generator | None = None
) -> Encoder:
    """Return a copy of an encoder with more register tokens, behind those it has.

    Args:
        encoder: A ViT of timm; its weights are copied, it stays as it is.
        num_registers: R, how many are added; with 0 positions alone are rearranged.
        init_std: Standard deviation of their initial values; default: 1/√D, as in the published code.
        generator: Source of the initial values; default: torch's own.

    Returns:
        The copy, without classifier, that computes the same but for the registers.

    Raises:
        UsageError: A model that takes no registers, or one with an adapter in it.
    """
    check_takes_registers(encoder)
    if getattr(encoder, "active_adapter", None) is not None:
        raise UsageError("the encoder has an adapter in it; merge them first (patchloom merge)")
    if num_registers < 0:
        raise UsageError(f"the number of registers is {num_registers}; it cannot be negative")
    model: Any = encoder
    made = made_from(encoder)
    arguments = {name: value for name, value in made["model_args"].items() if name not in ("img_size", "in_chans")}
    had = 0 if model.reg_token is None else int(model.reg_token.shape[1])
    arguments |= {family_of(encoder).register_argument: had + num_registers, "no_embed_class": True}
    with torch.random.fork_rng(devices=[]):  # values that are replaced at once
        built: Any = create_encoder(
            made["architecture"],
            image_size=made["model_args"]["img_size"],
            in_chans=made["model_args"]["in_chans"],
            **arguments,
        )
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    state = _folded(model, state)
    width = int(model.embed_dim)
    std = width**-0.5 if init_std is None else init_std
    new = torch.randn(1, num_registers, width, generator=generator) * std
    if had or num_registers:
        state["reg_token"] = torch.cat([state["reg_token"], new.to(state["reg_token"])], 1) if had else new
    built.load_state_dict(state)
    built.pretrained_cfg = dict(model.pretrained_cfg)
    if isinstance(model, AnySizeVisionTransformer):
        take_any_size(built, model.position_rule)
    copy: Encoder = built.train(model.training)
    return copy


def folds_class_position(encoder: Encoder) -> bool:
    """Return whether a class token has a position of its own that `add_registers` adds to it."""
    model: Any = encoder
    return model.cls_token is not None and model.pos_embed is not None and not model.no_embed_class


def _folded(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an encoder's tensors with the positions of prefix tokens added to these."""
    prefix = int(model.num_prefix_tokens)
    if model.pos_embed is None or model.no_embed_class or not prefix:
        return state
    front, state["pos_embed"] = state["pos_embed"][:, :prefix], state["pos_embed"][:, prefix:]
    classes = 0 if model.cls_token is None else 1
    if classes:
        state["cls_token"] = state["cls_token"] + front[:, :1]
    if model.reg_token is not None:
        state["reg_token"] = state["reg_token"] + front[:, classes:]
    return state
