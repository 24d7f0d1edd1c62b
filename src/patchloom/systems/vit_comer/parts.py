"""ViT-CoMer as a segmentation model: its backbone for images of any size, UPerNet, and the auxiliary head."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders import Encoder, depth, embed_dim, grid_size, image_size, in_chans, patch_size
from patchloom.encoders.anysize import embed_any_size
from patchloom.errors import UsageError
from patchloom.segment.backbone import Backbone
from patchloom.segment.build import Parts
from patchloom.segment.heads import FCNHead
from patchloom.segment.layers import resize
from patchloom.segment.upernet import UPerHead
from patchloom.systems.vit_comer.model import COARSEST, STRIDE, ViTCoMer

DROPOUT = 0.1


class CoMerBackbone(ViTCoMer):
    """A `ViTCoMer` for images of any size, which are resized to the next multiples of 32, as published.

    An encoder whose positions are tied to one size is shown every image at that size.

    Args:
        encoder: A ViT.
        layers: The last block of each of four stages, from 0; negative ones from the end.
        frozen: The encoder's weights stay as they are; the exchanges change its tokens all the same.
        **settings: Of `ViTCoMer`.

    Raises:
        UsageError: As `ViTCoMer`.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int], frozen: bool = True, **settings: Any) -> None:
        ends = [layer % depth(encoder) for layer in layers]
        super().__init__(encoder, list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True)), **settings)
        self.layers, self.apply_norm, self.frozen = tuple(ends), False, frozen
        self.only_size = None if takes_any_size(encoder) else crop_size(encoder)
        if frozen:
            encoder.requires_grad_(False)
            encoder.eval()

    def train(self, mode: bool = True) -> CoMerBackbone:
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps of strides 4 to 32 of normalised images (B, C, H, W), of sides rounded up to multiples of 32."""
        sides = self.only_size or tuple(-(-side // COARSEST) * COARSEST for side in images.shape[-2:])
        return super().forward(resize(images, sides))


def build(
    encoder: Encoder, num_classes: int, *, layers: Sequence[int], width: int = 512, frozen: bool = True, **settings: Any
) -> Parts:
    """Return an encoder with fresh exchanges, UPerNet and its auxiliary head.

    Args:
        encoder: A ViT.
        num_classes: K.
        layers: The last block of each of four stages.
        width: Width of UPerNet and, halved, of its auxiliary head.
        frozen: Whether the encoder's weights stay as they are.
        **settings: Of `ViTCoMer`; `deform_heads` None for as many as the encoder has, `window_size` for all blocks but
            the last of each stage.

    Raises:
        UsageError: As `ViTCoMer`.
    """
    backbone = CoMerBackbone(encoder, layers, frozen, **comer_settings(encoder, layers, settings))
    dim = embed_dim(encoder)
    head = UPerHead([dim] * 4, num_classes, width, dropout=DROPOUT)
    return Parts(cast(Backbone, backbone), None, head, FCNHead(dim, num_classes, channels=max(8, width // 2)))


def comer_settings(encoder: Encoder, layers: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `ViTCoMer`: as many heads as the encoder has, windows in all blocks but each stage's last."""
    found = dict(settings)
    if found.get("deform_heads") is None:
        found["deform_heads"] = int(encoder.blocks[0].attn.num_heads)
    if (window := found.pop("window_size", None)) is not None:
        ends = {layer % depth(encoder) for layer in layers}
        found["window_size"] = [None if number in ends else window for number in range(depth(encoder))]
    return found


def takes_any_size(encoder: Encoder) -> bool:
    """Return whether an encoder can be shown images of several sizes, its positions resampled in passing."""
    patch, grid = patch_size(encoder), grid_size(encoder)
    other = torch.zeros(1, in_chans(encoder), patch * (grid[0] + 1), patch * grid[1])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how positions are resampled: nobody sees this image
            embed_any_size(encoder, other.to(next(encoder.parameters())))
    except UsageError:
        return False
    return True


def crop_size(encoder: Encoder) -> tuple[int, int]:
    """Return the sides of an image whose ViT's grid is the encoder's own, rounded up to multiples of 32."""
    patch = patch_size(encoder)
    height, width = (-(-side * STRIDE // patch // COARSEST) * COARSEST for side in image_size(encoder))
    return height, width


def add_layer_scale(encoder: Encoder) -> None:
    """Give the blocks of a plain ViT the factors that ViT-CoMer trains, at 1; other encoders stay as they are."""
    blocks: list[Any] = list(encoder.blocks) if isinstance(encoder, VisionTransformer) else []
    if not blocks or not all(isinstance(getattr(block, "ls1", None), nn.Identity) for block in blocks):
        return
    for block in blocks:
        like: dict[str, Any] = {"init_values": 1.0}
        block.ls1, block.ls2 = (LayerScale(embed_dim(encoder), **like) for _ in range(2))
    made = encoder.patchloom_args
    encoder.patchloom_args = {**made, "model_args": {**made["model_args"], "init_values": 1.0}}
