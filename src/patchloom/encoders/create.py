"""Encoders and other image models by their timm names; those on disk are opened by `patchloom.models`.

>>> create_encoder("vit_tiny_patch16_224").embed_dim
192
>>> create_backbone("resnet18", image_size=64).pretrained_cfg["input_size"]
(3, 64, 64)
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
import torch

from patchloom.encoders.patches import patch_grid
from patchloom.encoders.properties import FAMILIES, KINDS, Encoder, has_tokens, patch_size
from patchloom.errors import UsageError

# Where timm and this package keep them, for hints that lead to an encoder.
MODULES = ("ccvit", "vision_transformer", "deit", "beit", "eva")


def create_encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
    pretrained: bool = False,
    **model_args: Any,
) -> Encoder:
    """Return an encoder without head.

    Args:
        name: A timm model of the `VisionTransformer`, `Beit` or `Eva` family.
        image_size: Side in pixels, or (H, W); default: the model's own.
        in_chans: Channels of the images.
        drop_path: Stochastic depth rate of the last block.
        pretrained: Load timm's weights (downloads them).
        **model_args: Arguments of the timm model.

    Returns:
        The module; its attribute `patchloom_args` holds what it was made from.

    Raises:
        UsageError: Unknown name (with the nearest), a model of another kind, or a size, width or rate that does not
            fit.
    """
    if not timm.is_model(name):
        raise _unknown(name, [model for module in MODULES for model in timm.list_models(module=module)])
    if not 0 <= drop_path < 1:
        raise UsageError(f"drop_path is {drop_path}; it must be in [0, 1)")
    arguments = {"num_classes": 0, **model_args, "in_chans": in_chans}
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if image_size is not None:
        arguments["img_size"] = image_size
    if (size := arguments.get("img_size")) is not None:
        arguments["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
        _check_size(name, arguments)
    try:
        built = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError) as error:  # an argument this kind of model does not take, or not with others
        raise UsageError(f"{name} cannot be made as an encoder ({error}); encoders are {KINDS}") from error
    if not isinstance(built, FAMILIES):
        raise UsageError(f"{name} is a {type(built).__name__}; encoders here are {KINDS}")
    model: Encoder = built
    heads = getattr(model.blocks[0], "attn", model.blocks[0]).num_heads
    if model.embed_dim % heads:  # `Beit` builds it all the same, and fails in its first forward pass
        raise UsageError(f"embed_dim {model.embed_dim} is not divisible by num_heads {heads}; change one of them")
    arguments.pop("num_classes")
    arguments.pop("drop_path_rate", None)  # how it was trained, not what it is
    size = model.patch_embed.img_size
    model.patchloom_args = {"architecture": name, "model_args": {**arguments, "img_size": tuple(size)}}
    return model


def create_backbone(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
    pretrained: bool = False,
    **model_args: Any,
) -> Encoder:
    """Return any image model of timm without its classifier: a ViT as `create_encoder` makes it, or another network.

    Args:
        name: A timm model (ResNet, MobileNet, ConvNeXt, Mixer, Swin, ViT …).
        image_size: Side in pixels, or (H, W); default: the model's own.
        in_chans: Channels of the images.
        drop_path: Stochastic depth rate of the last block.
        pretrained: Load timm's weights (downloads them).
        **model_args: Arguments of the timm model.

    Returns:
        The module; its attribute `patchloom_args` holds what it was made from.

    Raises:
        UsageError: Unknown name (with the nearest), or a size, rate or argument the model does not take.
    """
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    if _is_encoder(name):
        return create_encoder(
            name, image_size=image_size, in_chans=in_chans, drop_path=drop_path, pretrained=pretrained, **model_args
        )
    if not 0 <= drop_path < 1:
        raise UsageError(f"drop_path is {drop_path}; it must be in [0, 1)")
    size = model_args.pop("img_size", None) if image_size is None else image_size
    arguments = {**model_args, "in_chans": in_chans}
    if size is not None and _has_fixed_size(name):
        arguments["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    regularised: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        model: Encoder = timm.create_model(name, pretrained=pretrained, num_classes=0, **regularised, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        if drop_path and "drop_path_rate" in str(error):
            raise UsageError(f"{name} has no stochastic depth; set drop_path=0") from error
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} cannot be made so ({reason}); change image_size, drop_path or in_chans") from error
    known = dict(model.pretrained_cfg)
    height, width = known["input_size"][-2:] if size is None else (size, size) if isinstance(size, int) else size
    model.pretrained_cfg = {**known, "input_size": (in_chans, int(height), int(width))}
    model.patchloom_args = {"architecture": name, "model_args": arguments}
    return model


def recompute_blocks(encoder: Encoder) -> None:
    """Let blocks be computed once more in the backward pass, which takes less memory.

    Raises:
        UsageError: The model cannot do that.
    """
    try:
        encoder.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UsageError(f"a {type(encoder).__name__} cannot do grad_checkpointing; leave it out") from error


def _is_encoder(name: str) -> bool:
    with torch.device("meta"):  # shapes only
        return has_tokens(timm.create_model(name, pretrained=False, num_classes=0))


def _has_fixed_size(name: str) -> bool:
    """Return whether a timm model is made for one size; the others take any, and no argument says which."""
    return bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))


def _check_size(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a size that patches do not fill, before timm fails in its own words."""
    # The model's own size and patches: building it at its own size on no device costs nothing.
    with torch.device("meta"):
        rest = {k: v for k, v in arguments.items() if k != "img_size"}
        built: Encoder = timm.create_model(name, pretrained=False, **rest)
    if not isinstance(built, FAMILIES):
        return  # refused by its kind, not by its size
    patch = arguments.get("patch_size") or patch_size(built)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    if height != width:
        raise UsageError(f"patch_size is {(height, width)}; patches here are square")
    if any(side % height for side in built.patch_embed.img_size) and min(arguments["img_size"]) >= height:
        return  # patches of some models do not fill their own size: they leave out what is over, at any size
    patch_grid(arguments["img_size"], int(height))


def _unknown(name: str, known: list[str]) -> UsageError:
    begun = [model for model in known if model.startswith(name.lower())]
    near = get_close_matches(name.lower(), begun or known, n=3, cutoff=0.0 if begun else 0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"unknown encoder {name!r}{hint} (a timm model, or the path of a bundle or run)")
