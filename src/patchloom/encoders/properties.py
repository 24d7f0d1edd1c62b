"""What the rest of the library asks of an encoder, so that nothing asks for its class.

Width, depth, image size and channels are known of every image model of timm; patches and tokens of ViTs.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> embed_dim(encoder), depth(encoder), patch_size(encoder), grid_size(encoder), num_prefix_tokens(encoder)
(192, 12, 16, (14, 14), 1)
>>> network = timm.create_model("resnet18", num_classes=0)
>>> embed_dim(network), depth(network), image_size(network), has_tokens(network)
(512, 8, (224, 224), False)
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from timm.models import group_parameters
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders.patches import patch_grid
from patchloom.errors import UsageError

Encoder: TypeAlias = Any
"""A timm `VisionTransformer`, `Beit` or `Eva`; where a function says so, any image model of timm. Their attributes are
not declared on `nn.Module`, hence `Any`."""
FAMILIES = (VisionTransformer, Beit, Eva)
KINDS = "timm's ViT, BEiT and EVA models"


def has_tokens(encoder: Encoder) -> bool:
    """Return whether a model is a ViT, whose patches go through it as tokens from end to end."""
    return isinstance(encoder, FAMILIES)


def require_tokens(encoder: Encoder) -> None:
    """Refuse an image model that is no ViT.

    Raises:
        UsageError: It has no patch tokens to work with.
    """
    if not has_tokens(encoder):
        raise UsageError(f"a {type(encoder).__name__} has no patch tokens from end to end; take one of {KINDS}")


def embed_dim(encoder: Encoder) -> int:
    """Return the width D of the tokens, or of the pooled vector of a model without."""
    width = encoder.embed_dim if has_tokens(encoder) else getattr(encoder, "head_hidden_size", None)
    return int(encoder.num_features if width is None else width)


def depth(encoder: Encoder) -> int:
    """Return the number of blocks; of a model that is no ViT, of the layers timm counts between stem and head."""
    if has_tokens(encoder):
        return len(encoder.blocks)
    head = _classifier_names(encoder)
    return max(number for name, number in _layers(encoder).items() if not name.startswith(head))


def layer_of_parameter(encoder: Encoder, name: str) -> int:
    """Return the layer of a parameter of a model that is no ViT, as timm groups them.

    0 for the stem, up to `depth` for the last layer, depth + 1 for the head.

    Raises:
        UsageError: The model has no parameter of that name.
    """
    if name.startswith(_classifier_names(encoder)):
        return depth(encoder) + 1
    layers = _layers(encoder)
    if name not in layers:
        raise UsageError(f"a {type(encoder).__name__} has no parameter {name!r}, so its layer is not known")
    return layers[name]


def patch_size(encoder: Encoder) -> int:
    """Return the side of a patch in pixels."""
    require_tokens(encoder)
    return int(encoder.patch_embed.feat_ratio())  # behind a convolutional stem, its strides count too


def num_prefix_tokens(encoder: Encoder) -> int:
    """Return the number of class and register tokens in front of the patch tokens; 0 for a model without tokens."""
    return int(getattr(encoder, "num_prefix_tokens", 0))


def image_size(encoder: Encoder) -> tuple[int, int]:
    """Return the (H, W) in pixels the model is set up for."""
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    # A convolutional network takes any size; the one it is meant for stands where timm writes it.
    height, width = encoder.pretrained_cfg["input_size"][-2:] if size is None else size
    return int(height), int(width)


def grid_size(encoder: Encoder, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the number of patches (down, across) of an image of `size` (default: the encoder's own)."""
    require_tokens(encoder)
    if size is None or tuple(size) == image_size(encoder):
        # As built: an encoder made for a size that patches do not fill leaves out the rest.
        height, width = encoder.patch_embed.grid_size
        return int(height), int(width)
    return patch_grid(size, patch_size(encoder))


def in_chans(encoder: Encoder) -> int:
    """Return the number of channels of the images the model takes."""
    if (channels := getattr(encoder, "in_chans", None)) is not None:
        return int(channels)
    if has_tokens(encoder):
        return int(encoder.patch_embed.proj.weight.shape[1])
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return int(first.in_channels)


def normalize(images: Tensor, encoder: Encoder) -> Tensor:
    """Return images in [0, 1] normalised by the encoder's own mean and standard deviation.

    Args:
        images: (B, C, H, W) float in [0, 1].
        encoder: Its `pretrained_cfg` gives mean and standard deviation per RGB channel; other numbers of channels
            take their average.
    """
    config = encoder.pretrained_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    if len(mean) != images.shape[1]:
        mean, std = mean.mean().expand(images.shape[1]), std.mean().expand(images.shape[1])
    mean, std = (value.to(images).view(1, -1, 1, 1) for value in (mean, std))
    return (images - mean) / std


def _layers(encoder: Encoder) -> dict[str, int]:
    """Return the layer of every parameter by name, 0 for the stem."""
    numbers: dict[str, int] = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    return numbers


def _classifier_names(encoder: Encoder) -> tuple[str, ...]:
    """Return how the names of a classifier's parameters begin."""
    names = encoder.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
