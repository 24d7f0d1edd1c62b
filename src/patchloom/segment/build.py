"""Segmentation models by the name of their decoder: backbone, neck, head and auxiliary head.

>>> import timm, torch
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> parts = build_parts(encoder, 5, "upernet", width=32)
>>> [x.shape[-1] for x in parts.levels(parts.backbone(torch.rand(1, 3, 224, 224)))]
[56, 28, 14, 7]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from patchloom.base.choices import DECODER_BLOCKS
from patchloom.encoders import Encoder, depth, embed_dim, patch_size
from patchloom.errors import UsageError
from patchloom.registry import DECODERS, load
from patchloom.segment.backbone import Backbone, choose_layers
from patchloom.segment.heads import BNHead, FCNHead, LinearHead, SETRUPHead
from patchloom.segment.necks import ViTNeck
from patchloom.segment.radiology import UNetSegHead
from patchloom.segment.upernet import UPerHead

DROPOUT = {"dinov3": 0.1, "upernet": 0.1}


class Parts(NamedTuple):
    """The parts of a segmentation model."""

    backbone: Backbone
    """Images to maps; of a system of its own, a module with a backbone's attributes, and with what it has besides the
    encoder as `adapter`."""
    neck: nn.Module | None
    """Maps to a pyramid; None where the head takes the maps themselves."""
    head: nn.Module
    """Maps to logits."""
    auxiliary: nn.Module | None
    """A second head in training."""

    def levels(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what heads take, of the backbone's maps."""
        return maps if self.neck is None else self.neck(maps)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, K, h, w), at the head's resolution, of normalised images (B, C, H, W)."""
        logits: Tensor = self.head(self.levels(self.backbone(images)))
        return logits


def build_parts(
    encoder: Encoder,
    num_classes: int,
    name: str,
    *,
    layers: tuple[int, ...] | None = None,
    blocks: Literal["last", "spread"] = "last",
    apply_norm: bool | None = None,
    width: int = 512,
    frozen: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Parts:
    """Return an encoder with a fresh decoder.

    Args:
        encoder: The encoder.
        num_classes: K.
        name: The decoder.
        layers: Blocks whose maps it takes; default: as many as it needs, which ones by `blocks`.
        blocks: The last blocks, or blocks at equal parts of the depth.
        apply_norm: Apply the encoder's final norm to each map; default: yes, but for upernet.
        width: Width of upernet and, halved, of its auxiliary head and of setr.
        frozen: Whether the encoder stays as it is.
        settings: Further settings of a decoder that is a system of its own (`registry.DECODERS`).

    Raises:
        UsageError: The encoder has too few blocks, or not those named.
    """
    if name in DECODERS:
        if apply_norm:
            raise UsageError(f"apply_norm is about maps of single blocks, which {name} takes as they are; leave it out")
        build = load(DECODERS[name])
        chosen = layers or choose_layers(depth(encoder), DECODER_BLOCKS[name], blocks)
        made = build(encoder, num_classes, layers=chosen, width=width, frozen=frozen, **(settings or {}))
        return cast(Parts, made)
    dim, count, needed = embed_dim(encoder), depth(encoder), DECODER_BLOCKS[name]
    if layers is None and needed > count:
        raise UsageError(f"head {name} takes the maps of {needed} blocks and the encoder has {count}; name layers")
    chosen = layers or choose_layers(count, needed, blocks)
    norm = apply_norm if apply_norm is not None else name != "upernet"
    backbone = Backbone(encoder, chosen, apply_norm=norm, frozen=frozen)
    total, dropout = dim * len(chosen), DROPOUT.get(name, 0.0)
    neck: nn.Module | None = None
    auxiliary: nn.Module | None = None
    head: nn.Module
    if name == "linear":
        head = LinearHead(total, num_classes)
    elif name in ("bn", "multilayer"):
        head = BNHead(total, num_classes)
    elif name == "dinov3":
        head = LinearHead(total, num_classes, dropout, norm="bn", dropout_first=True)
    elif name == "setr":
        head = SETRUPHead(dim, num_classes, channels=max(8, width // 2))
    elif name == "unet":
        head = OnMaps(UNetSegHead(dim, num_classes, patch_size(encoder), final_relu=False))
    else:
        neck = ViTNeck("beit", dim)
        head = UPerHead([dim] * 4, num_classes, width, dropout=dropout)
        auxiliary = FCNHead(dim, num_classes, channels=max(8, width // 2))
    return Parts(backbone, neck, head, auxiliary)


class OnMaps(nn.Module):
    """A decoder of tokens, taking maps."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return the logits of maps (B, D, h, w)."""
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        logits: Tensor = self.head([x.flatten(2).transpose(1, 2) for x in maps], grid)
        return logits
