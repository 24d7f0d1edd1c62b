"""Another image size for a trained encoder: positions are resampled, relative tables included."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from patchloom.encoders.families import find_family
from patchloom.encoders.patches import Grid, patch_grid
from patchloom.encoders.properties import image_size, input_size, size_arguments
from patchloom.errors import UsageError

Model = TypeVar("Model", bound=nn.Module)


def set_image_size(encoder: Model, size: int | Grid) -> Model:
    """Set the encoder, or another image model, up for inputs of another size, in place, and return it.

    Absolute positions are resampled as timm does; relative-position tables as in BEiT's published
    code (bicubic, with a warning, where a grid is not square). `patchloom_args` follow.

    Args:
        encoder: The encoder.
        size: Side in pixels, or each: (H, W), of clips (T, H, W). One side, or (H, W), leaves a clip's frames alone.

    Raises:
        UsageError: A side is not divisible by that of a patch, or the encoder's size is fixed.
    """
    own, family = input_size(encoder), find_family(encoder)
    if family is None:
        new = (size, size) if isinstance(size, int) else (size[0], size[1])
        return encoder if new == own else _set_backbone_size(encoder, new)
    sides = family.sides(own, size)
    if sides == own:
        return encoder
    patch_grid(sides, family.patch_shape(encoder))
    family.resize(encoder, sides)
    _note(encoder, size_arguments(encoder, sides))
    return encoder


def _set_backbone_size(network: Model, new: tuple[int, int]) -> Model:
    """Set an image model that is no ViT up for another size, in place, and return it."""
    model: Any = network
    if model.pretrained_cfg.get("fixed_input_size"):
        if not hasattr(model, "set_input_size"):
            raise UsageError(f"a {type(model).__name__} works at {image_size(model)} only; leave image_size as it is")
        model.set_input_size(img_size=new)
        _note(model, {"img_size": new})
    channels = model.pretrained_cfg["input_size"][0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, *new)}
    return network


def _note(model: Any, arguments: dict[str, Any]) -> None:
    """Write arguments into what the model says it was made from."""
    if (made := getattr(model, "patchloom_args", None)) is not None:
        model.patchloom_args = {**made, "model_args": {**made["model_args"], **arguments}}
