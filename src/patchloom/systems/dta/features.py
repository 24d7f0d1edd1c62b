"""What attacks and victims see of a timm model: pixels in, features of blocks or logits out, normalisation inside.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=64).eval()
>>> features = BlockFeatures(encoder)
>>> (first,) = features(torch.rand(2, 3, 80, 80), [0])  # stops after the first of 12 blocks
>>> first.shape
torch.Size([2, 17, 192])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import (
    Encoder,
    depth,
    embed,
    has_tokens,
    image_size,
    in_chans,
    normalize,
    num_prefix_tokens,
    run_blocks,
)
from patchloom.errors import UsageError

Layer = int | Literal["final"]
"""A block, counted from 0 or negative from the end; or `final`: what `forward_features` gives, after the last norm."""
FINAL: Layer = "final"


class BlockFeatures:
    """Features of an image model of timm for images in [0, 1].

    Attributes:
        encoder: The model.
        depth: Its number of blocks; 0 for a model without tokens, which has its final features alone.
        num_prefix: Class token and registers in front of its patches.
    """

    def __init__(self, encoder: Encoder) -> None:
        check_normalises(encoder)
        self.encoder = encoder
        self.depth = depth(encoder) if has_tokens(encoder) else 0
        self.num_prefix = num_prefix_tokens(encoder)

    def layer(self, layer: Layer) -> Layer:
        """Return a layer by its number from 0; of a model without tokens there is the final one alone.

        Raises:
            UsageError: A block the encoder does not have.
        """
        if layer == FINAL or not self.depth:
            return FINAL
        number = int(layer)
        if not -self.depth <= number < self.depth:
            raise UsageError(
                f"there is no block {layer}; the encoder has blocks 0 to {self.depth - 1} (negative from the end)"
            )
        return number % self.depth

    def __call__(self, images: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
        """Return the features of layers, (B, T, D) of blocks before any norm; no block after the last asked for runs.

        Args:
            images: (B, C, H, W) in [0, 1]; of another size than the encoder's they are resized, differentiably.
            layers: Blocks, or `final`.

        Raises:
            UsageError: A block the encoder does not have, or another number of channels.
        """
        numbers = [self.layer(layer) for layer in layers]
        inputs = inputs_of(images, self.encoder)
        if not self.depth:
            found: Tensor = self.encoder.forward_features(inputs)
            return [found.to(images.device)] * len(numbers)
        taps = sorted({int(layer) + 1 for layer in numbers if layer != FINAL})
        last = self.depth if FINAL in numbers else max(taps)
        x, kept = run_blocks(self.encoder, embed(self.encoder, inputs), stop=last, taps=taps)
        after = {number - 1: tokens for number, tokens in kept.items()}
        read = [self.encoder.norm(x) if layer == FINAL else after[int(layer)] for layer in numbers]
        return [tokens.to(images.device) for tokens in read]


class PixelClassifier(nn.Module):
    """A classifier of timm, with an adapter or without, that takes images in [0, 1] of any size.

    Args:
        model: Takes images of its own size, normalised by its own mean and standard deviation, and gives logits.

    Raises:
        UsageError: It has no mean and standard deviation, or no classes.
    """

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        check_normalises(model)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.model(inputs_of(images, self.model))
        return logits.to(images.device)


def inputs_of(images: Tensor, encoder: Encoder) -> Tensor:
    """Return what a model takes: images resized to its size where they have another, on its device, normalised.

    Args:
        images: (B, C, H, W) in [0, 1].
        encoder: An image model of timm.

    Raises:
        UsageError: It takes another number of channels.
    """
    if images.shape[1] != in_chans(encoder):
        raise UsageError(f"the images have {images.shape[1]} channels and the model takes {in_chans(encoder)}")
    size = image_size(encoder)
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    parameter = next(encoder.parameters())
    images = images.to(parameter.device)
    return normalize(images, encoder).to(parameter.dtype)


def check_normalises(encoder: Encoder) -> None:
    """Refuse a model that does not say what its images are normalised by.

    Raises:
        UsageError: It has no mean and standard deviation.
    """
    known = getattr(encoder, "pretrained_cfg", None) or {}
    if "mean" not in known or "std" not in known:
        raise UsageError(
            f"this {type(encoder).__name__} does not say what its images are normalised by; give it a pretrained_cfg "
            f"with mean and std, as models of timm have"
        )
