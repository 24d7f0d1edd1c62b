"""Tiny encoders of each family and position kind, with every parameter drawn at random."""

from __future__ import annotations

from typing import Any

import torch

from patchloom.encoders import create_encoder

ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}),
    "vit_no_class": ("vit_base_patch16_siglip_224", {"class_token": False, "global_pool": "avg"}),
    "beit_shared": ("ccvit_tiny_patch4_32", {}),
    "beit_tables": ("beit_base_patch16_224", {"init_values": 0.1}),
    "eva_rotary": ("eva02_tiny_patch14_224", {}),
    "eva_mixed": ("vit_small_patch16_rope_mixed_224", {"init_values": 0.1}),
    "eva_registers": ("vit_small_patch16_dinov3", {}),
}
FAMILIES = list(ARGUMENTS)


def tiny(kind: str, *, seed: int = 0, double: bool = False, **extra: Any) -> Any:
    """Return an encoder of width 32, depth 3, 4 heads for images of 16 pixels in patches of 4."""
    name, arguments = ARGUMENTS[kind]
    size = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
    encoder = create_encoder(name, image_size=16, **size, **arguments, **extra)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return (encoder.double() if double else encoder).eval()


def pictures(count: int = 2, *, double: bool = False, seed: int = 1) -> torch.Tensor:
    """Return images for `tiny` encoders."""
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return images.double() if double else images
