"""The ViT: creation through timm, token bookkeeping, masked forward, and the encoders registered here."""

from __future__ import annotations

from patchloom.encoders import ccvit, cifar_resnet, frames, micro
from patchloom.encoders.blocks import run_block
from patchloom.encoders.create import create_backbone, create_encoder
from patchloom.encoders.properties import (
    Encoder,
    depth,
    embed_dim,
    grid_size,
    has_tokens,
    image_size,
    in_chans,
    layer_of_parameter,
    normalize,
    num_prefix_tokens,
    patch_size,
    require_tokens,
)
from patchloom.encoders.resize import resize_relative_table, set_image_size
from patchloom.encoders.stages import (
    Embedded,
    Tokens,
    class_attention,
    embed,
    feature_map,
    final_norm,
    intermediate_layers,
    new_blocks,
    pooled,
    run_blocks,
    tokens,
)

__all__ = [
    "Embedded",
    "Encoder",
    "Tokens",
    "ccvit",
    "cifar_resnet",
    "class_attention",
    "create_backbone",
    "create_encoder",
    "depth",
    "embed",
    "embed_dim",
    "feature_map",
    "final_norm",
    "frames",
    "grid_size",
    "has_tokens",
    "image_size",
    "in_chans",
    "intermediate_layers",
    "layer_of_parameter",
    "micro",
    "new_blocks",
    "normalize",
    "num_prefix_tokens",
    "patch_size",
    "pooled",
    "require_tokens",
    "resize_relative_table",
    "run_block",
    "run_blocks",
    "set_image_size",
    "tokens",
]
