"""The backbone of BEiT's, MAE's and CCViT's segmentation models: a plain ViT and the neck inside it.

Four blocks' tokens, un-normed and without the class token, become maps of strides 4, 8, 16 and 32, as in
the segmentation code of BEiT (arXiv 2106.08254), which CCViT and G2SD use.

>>> import timm, torch
>>> encoder = timm.create_model("beit_base_patch16_224", num_classes=0, embed_dim=24, depth=4, num_heads=3, img_size=64)
>>> [tuple(x.shape) for x in PyramidBackbone(encoder, (0, 1, 2, 3))(torch.randn(1, 3, 64, 64))]
[(1, 24, 16, 16), (1, 24, 8, 8), (1, 24, 4, 4), (1, 24, 2, 2)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from patchloom.encoders import Encoder, embed_dim, patch_size
from patchloom.errors import UsageError
from patchloom.segment.backbone import Backbone
from patchloom.segment.necks import ViTNeck


class PyramidBackbone(nn.Module):
    """Images to maps of four strides; all of it trains.

    Args:
        encoder: A plain ViT with patches of 16 or 8 pixels.
        out_indices: Four blocks, counted from 0; paper: 3, 5, 7, 11 of 12, and 7, 11, 15, 23 of 24.

    Attributes:
        backbone: Images to the blocks' maps.
        neck: Those to the pyramid.

    Raises:
        UsageError: Not four blocks, blocks the encoder does not have, or patches of another size.
    """

    def __init__(self, encoder: Encoder, out_indices: Sequence[int] = (3, 5, 7, 11)) -> None:
        super().__init__()
        if len(out_indices) != 4:
            raise UsageError(f"out_indices names {len(out_indices)} blocks; the pyramid is made of four")
        self.backbone = Backbone(encoder, out_indices, apply_norm=False, frozen=False)
        self.neck = ViTNeck("beit", embed_dim(encoder), patch_size(encoder))
        self.channels = [embed_dim(encoder)] * 4

    @property
    def encoder(self) -> Encoder:
        """The plain ViT."""
        return self.backbone.encoder

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return (B, D, H / 4, W / 4), (B, D, H / 8, W / 8) and so on of normalised images (B, C, H, W)."""
        levels: list[Tensor] = self.neck(self.backbone(images))
        return levels


class SegmentationModel(nn.Module):
    """A backbone and what decodes its maps.

    Args:
        backbone: Images to maps; a `PyramidBackbone`, or another that has an `encoder`.
        decoder: Maps to logits; its `auxiliary_logits`, where it has them, are those of the head for training.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    @property
    def encoder(self) -> Encoder:
        """The plain ViT."""
        return cast(Encoder, self.backbone.encoder)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, H / 4, W / 4) of normalised images (B, C, H, W)."""
        logits: Tensor = self.decoder(self.backbone(images))
        return logits
