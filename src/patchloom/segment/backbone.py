"""An encoder as the backbone of a segmentation model: images of any size to maps of the blocks asked for.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> backbone = Backbone(encoder, layers=(5, 11))
>>> [tuple(x.shape) for x in backbone(torch.randn(1, 3, 100, 150))]
[(1, 192, 7, 10), (1, 192, 7, 10)]
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from patchloom.encoders import (
    Encoder,
    depth,
    embed_dim,
    grid_size,
    image_size,
    intermediate_layers,
    patch_size,
    plane_size,
    set_image_size,
)
from patchloom.errors import UsageError, unknown_name
from patchloom.segment.inference import pad_to_multiple
from patchloom.segment.necks import pyramid_maps

# Encoders set up for other sizes that are kept; test images of one set often share a few.
KEPT = 3


class Backbone(nn.Module):
    """Maps of several blocks of an encoder.

    Images whose sides are no multiples of the patch are padded with zeros all round, as DINOv2 does. For an image of
    another size than the encoder's, positions are resampled from the trained ones.

    Args:
        encoder: The encoder.
        layers: Blocks, counted from 0; negative ones from the end.
        apply_norm: Apply the final norm to each map (DINOv2), or not (UPerNet on BEiT and MAE).
        frozen: No gradients, and eval mode always.

    Raises:
        UsageError: A block the encoder does not have, or an encoder that takes no images.
    """

    def __init__(
        self, encoder: Encoder, layers: Sequence[int] = (-1,), apply_norm: bool = True, frozen: bool = True
    ) -> None:
        super().__init__()
        plane_size(encoder, "the maps that decoders of segmentation read")
        count = depth(encoder)
        for layer in layers:
            if not -count <= layer < count:
                raise UsageError(f"there is no block {layer}; the encoder has blocks 0 to {count - 1}")
        self.encoder = encoder
        self.layers = tuple(layer % count for layer in layers)
        self.apply_norm = apply_norm
        self.frozen = frozen
        self.channels = [embed_dim(encoder)] * len(self.layers)
        self.stride = patch_size(encoder)
        self._resized: OrderedDict[tuple[int, int], Encoder] = OrderedDict()
        if frozen:
            encoder.requires_grad_(False)
            encoder.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; a frozen encoder stays in eval mode."""
        self._resized.clear()
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return (B, D, h, w) for each block, of normalised images (B, C, H, W); h = ceil(H / patch size)."""
        images, _ = pad_to_multiple(images, self.stride)
        size = (images.shape[-2], images.shape[-1])
        encoder = self._encoder_for(size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            layers = intermediate_layers(encoder, images, self.layers, norm=self.apply_norm)
        return pyramid_maps([tokens.patches for tokens in layers], grid_size(encoder, size))

    def _encoder_for(self, size: tuple[int, int]) -> Encoder:
        """Return the encoder set up for a size: itself, or a copy whose positions are resampled."""
        if size == image_size(self.encoder):
            return self.encoder
        if self.training and not self.frozen:
            raise UsageError(
                f"the encoder in training is set up for {image_size(self.encoder)} and the images are {size}; "
                f"set its image size to theirs first"
            )
        if size not in self._resized:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # grids that are not square are the rule here
                self._resized[size] = set_image_size(copy.deepcopy(self.encoder), size)
            while len(self._resized) > KEPT:
                self._resized.popitem(last=False)
        self._resized.move_to_end(size)
        return self._resized[size].to(next(self.encoder.parameters()).device)

    def __deepcopy__(self, memo: dict[int, object]) -> Backbone:
        """Copy without the encoders for other sizes."""
        return Backbone(copy.deepcopy(self.encoder, memo), self.layers, self.apply_norm, self.frozen)


def choose_layers(blocks: int, count: int, which: Literal["last", "spread"] = "last") -> tuple[int, ...]:
    """Return the numbers (from 0) of the last blocks, or of blocks at equal parts of the depth.

    >>> choose_layers(12, 4), choose_layers(12, 4, "spread")
    ((8, 9, 10, 11), (2, 5, 8, 11))

    Args:
        blocks: Depth of the encoder.
        count: How many.
        which: `last`, or `spread` for 1/count, 2/count, … of the depth.

    Raises:
        UsageError: Unknown choice, or more blocks than there are.
    """
    if which not in ("last", "spread"):
        raise unknown_name("choice of blocks", which, ("last", "spread"))
    if not 1 <= count <= blocks:
        raise UsageError(f"{count} blocks are asked for and the encoder has {blocks}")
    if which == "last":
        return tuple(range(blocks - count, blocks))
    return tuple(round(blocks * (number + 1) / count) - 1 for number in range(count))
