"""What the rest of the library asks of an encoder, so that nothing asks for its class.

Width, depth, size of the input and channels are known of every image model of timm; patches and tokens of encoders,
whose families (`families`) answer for them.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> embed_dim(encoder), depth(encoder), patch_size(encoder), grid_size(encoder), num_prefix_tokens(encoder)
(192, 12, 16, (14, 14), 1)
>>> network = timm.create_model("resnet18", num_classes=0)
>>> embed_dim(network), depth(network), image_size(network), has_tokens(network)
(512, 8, (224, 224), False)
"""

from __future__ import annotations

import math
from typing import Any, cast, overload

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from patchloom.encoders.encoder import Encoder
from patchloom.encoders.families import family_of, find_family, has_tokens
from patchloom.encoders.patches import Grid, Sides, patch_grid, plane, shown
from patchloom.errors import UsageError


def kind_of(encoder: nn.Module) -> str:
    """Return what kind of input a model takes: `image`, `clip`, `volume` or `signal`."""
    family = find_family(encoder)
    return "image" if family is None else family.kind


def embed_dim(encoder: nn.Module) -> int:
    """Return the width D of the tokens, or of the pooled vector of a model without."""
    model: Any = encoder
    width = model.embed_dim if has_tokens(encoder) else getattr(model, "head_hidden_size", None)
    return int(model.num_features if width is None else width)


def depth(encoder: nn.Module) -> int:
    """Return the number of blocks; of a model that is no ViT, of the layers timm counts between stem and head."""
    if has_tokens(encoder):
        return len(encoder.blocks)
    head = _classifier_names(encoder)
    return max(number for name, number in _layers(encoder).items() if not name.startswith(head))


def layer_of_parameter(encoder: nn.Module, name: str) -> int:
    """Return the layer of a parameter for layer-wise learning rates, by its name; of no ViT as timm groups them.

    0 for the stem, up to `depth` for the last layer or block, depth + 1 for the head.

    Raises:
        UsageError: The model has no parameter of that name.
    """
    if (family := find_family(encoder)) is not None:
        return family.layer_of(name, depth(encoder))
    if name.startswith(_classifier_names(encoder)):
        return depth(encoder) + 1
    layers = _layers(encoder)
    if name not in layers:
        raise UsageError(f"a {type(encoder).__name__} has no parameter {name!r}, so its layer is not known")
    return layers[name]


def patch_shape(encoder: nn.Module) -> Grid:
    """Return the sides of a patch in pixels, one for each axis of the grid; of clips with frames in front."""
    return family_of(encoder).patch_shape(encoder)


def patch_size(encoder: nn.Module) -> int:
    """Return the side of a patch in pixels.

    Raises:
        UsageError: The sides differ: `patch_shape` gives them.
    """
    shape = patch_shape(encoder)
    if len(set(shape)) > 1:
        raise UsageError(
            f"a {type(encoder).__name__} has patches of {shown(shape)}, and one side is asked for; this is for "
            f"encoders whose patches have the same side along every axis"
        )
    return shape[0]


def num_patches(encoder: nn.Module) -> int:
    """Return the number N of patches of an input of the size the encoder is set up for."""
    return math.prod(grid_size(encoder))


def num_prefix_tokens(encoder: nn.Module) -> int:
    """Return the number of class and register tokens in front of the patch tokens; 0 for a model without tokens."""
    return int(getattr(encoder, "num_prefix_tokens", 0))


def input_size(encoder: nn.Module) -> Grid:
    """Return the sides of the inputs the model is set up for, without channels: (H, W), of clips (T, H, W)."""
    family = find_family(encoder)
    if family is not None:
        return family.input_size(encoder)
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    if size is None:  # a convolutional network takes any size; the one it is meant for stands where timm writes it
        size = cast(Encoder, encoder).pretrained_cfg["input_size"][-2:]
    return tuple(int(side) for side in size)


def image_size(encoder: nn.Module) -> tuple[int, int]:
    """Return the (H, W) in pixels the model is set up for.

    Raises:
        UsageError: It takes no images: `input_size` gives what it takes.
    """
    size = input_size(encoder)
    if len(size) != 2:
        raise UsageError(
            f"a {type(encoder).__name__} takes {kind_of(encoder)}s of {shown(size)}, and this is for images"
        )
    return size[0], size[1]


def size_arguments(encoder: nn.Module, size: Grid | None = None) -> dict[str, Any]:
    """Return the arguments that make an encoder for inputs of a size; default: its own."""
    return family_of(encoder).size_arguments(input_size(encoder) if size is None else size)


@overload
def grid_size(encoder: nn.Module, size: Sides) -> Sides: ...


@overload
def grid_size(encoder: nn.Module, size: None = None) -> Grid: ...


def grid_size(encoder: nn.Module, size: Grid | None = None) -> Grid:
    """Return the number of patches along each axis, for images (down, across), of an input.

    Args:
        encoder: The encoder.
        size: Sides of the input without its channels; default: those the encoder is set up for.

    Raises:
        UsageError: Patches do not fill the sides, or there are more or fewer sides than the encoder's.
    """
    family = family_of(encoder)
    if size is None or tuple(size) == family.input_size(encoder):
        # As built: an encoder made for a size that patches do not fill leaves out the rest.
        return family.grid_size(encoder)
    return patch_grid(size, family.patch_shape(encoder))


def plane_size(encoder: nn.Module, what: str, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the number of patches (down, across), for what is defined on images alone.

    Args:
        encoder: The encoder.
        what: What is defined so, plural.
        size: (H, W) of the images; default: the encoder's own.

    Raises:
        UsageError: The encoder takes inputs of other than 2 axes.
    """
    return plane(grid_size(encoder, size), what)


def sides_of(inputs: Tensor) -> Grid:
    """Return the sides of a batch of inputs (B, C, *sides), for `grid_size`."""
    return tuple(int(side) for side in inputs.shape[2:])


def in_chans(encoder: nn.Module) -> int:
    """Return the number of channels of the inputs the model takes."""
    if isinstance(channels := getattr(encoder, "in_chans", None), int):
        return channels
    if (family := find_family(encoder)) is not None:
        return family.in_chans(encoder)
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return int(first.in_channels)


def normalize(images: Tensor, encoder: nn.Module) -> Tensor:
    """Return inputs in [0, 1] normalised by the encoder's own mean and standard deviation.

    Args:
        images: (B, C, *sides) float in [0, 1]; clips and volumes likewise.
        encoder: Its `pretrained_cfg` gives mean and standard deviation per RGB channel; other numbers of channels
            take their average.
    """
    config = cast(Encoder, encoder).pretrained_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    if len(mean) != images.shape[1]:
        mean, std = mean.mean().expand(images.shape[1]), std.mean().expand(images.shape[1])
    shape = (1, -1) + (1,) * (images.ndim - 2)
    mean, std = (value.to(images).view(shape) for value in (mean, std))
    return (images - mean) / std


def _layers(encoder: nn.Module) -> dict[str, int]:
    """Return the layer of every parameter by name, 0 for the stem."""
    model: Any = encoder
    numbers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return numbers


def _classifier_names(encoder: nn.Module) -> tuple[str, ...]:
    """Return how the names of a classifier's parameters begin."""
    names = cast(Encoder, encoder).pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
