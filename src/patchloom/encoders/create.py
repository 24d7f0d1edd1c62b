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

from patchloom.encoders.encoder import Encoder
from patchloom.encoders.families import KINDS, family_of, has_tokens
from patchloom.encoders.patches import Grid, patch_grid
from patchloom.encoders.properties import input_size, size_arguments
from patchloom.errors import UsageError

# Where timm and this package keep them, for hints that lead to an encoder.
MODULES = ("ccvit", "vision_transformer", "deit", "beit", "eva", "hyena_vit", "hyena_nd", "vitamin", "video", "volume")


def create_encoder(
    name: str,
    *,
    image_size: int | Grid | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
    pretrained: bool = False,
    **model_args: Any,
) -> Encoder:
    """Return an encoder without head.

    Args:
        name: A timm model that is an encoder: of the `VisionTransformer`, `Beit` or `Eva` family, or of one registered
            here.
        image_size: Side in pixels, or each: (H, W), of clips (T, H, W); default: the model's own.
        in_chans: Channels of the inputs.
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
    if arguments.get("img_size") is not None:
        arguments |= _sized(name, arguments)
    try:
        built = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError) as error:  # an argument this kind of model does not take, or not with others
        raise UsageError(f"{name} cannot be made as an encoder ({error}); encoders are {KINDS}") from error
    if not has_tokens(built):
        raise UsageError(f"{name} is a {type(built).__name__}; encoders here are {KINDS}")
    heads = getattr(getattr(built.blocks[0], "attn", built.blocks[0]), "num_heads", 1)
    if built.embed_dim % heads:  # `Beit` builds it all the same, and fails in its first forward pass
        raise UsageError(f"embed_dim {built.embed_dim} is not divisible by num_heads {heads}; change one of them")
    arguments.pop("num_classes")
    arguments.pop("drop_path_rate", None)  # how it was trained, not what it is
    built.patchloom_args = {"architecture": name, "model_args": arguments | size_arguments(built)}
    return built


def create_backbone(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
    pretrained: bool = False,
    **model_args: Any,
) -> Any:
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
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **regularised, **arguments)
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


def _sized(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a model of the size asked for; refuse one that patches do not fill.

    Raises:
        UsageError: In our words, before timm fails in its own.
    """
    # The model's own size and patches: building it at its own size on no device costs nothing.
    asked = arguments["img_size"]
    with torch.device("meta"):
        rest = {k: v for k, v in arguments.items() if k != "img_size"}
        built = timm.create_model(name, pretrained=False, **rest)
    if not has_tokens(built):
        return {}  # refused by its kind, not by its size
    family, own = family_of(built), input_size(built)
    shape = family.patch_shape(built)
    patch: Any = arguments.get("patch_size")
    if family.square_patches and not isinstance(patch, int | None) and len(set(patch)) > 1:
        raise UsageError(f"patch_size is {tuple(patch)}; patches here are square")
    sides = family.sides(own, asked)
    # Patches of some models do not fill their own size: they leave out what is over, at any size.
    leaves_out = any(side % cut for side, cut in zip(own, shape, strict=True))
    if not (leaves_out and all(side >= cut for side, cut in zip(sides, shape, strict=True))):
        patch_grid(sides, shape)
    return family.size_arguments(sides)


def _unknown(name: str, known: list[str]) -> UsageError:
    begun = [model for model in known if model.startswith(name.lower())]
    near = get_close_matches(name.lower(), begun or known, n=3, cutoff=0.0 if begun else 0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"unknown encoder {name!r}{hint} (a timm model, or the path of a bundle or run)")
