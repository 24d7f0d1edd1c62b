"""The ViT: creation through timm, token bookkeeping, masked forward, and the encoders registered here."""

from __future__ import annotations

from patchloom.encoders import ccvit, cifar_resnet, convit, frames, hyena_vit, micro, timm_families, video, vitamin
from patchloom.encoders.blocks import run_block
from patchloom.encoders.create import create_backbone, create_encoder
from patchloom.encoders.encoder import Encoder
from patchloom.encoders.families import Embedded, Family, family_of, has_tokens, register, require_tokens
from patchloom.encoders.patches import Grid
from patchloom.encoders.properties import (
    depth,
    embed_dim,
    grid_size,
    image_size,
    in_chans,
    input_size,
    kind_of,
    layer_of_parameter,
    normalize,
    num_patches,
    num_prefix_tokens,
    patch_shape,
    patch_size,
    plane_size,
    sides_of,
    size_arguments,
)
from patchloom.encoders.relative_positions import resize_relative_table
from patchloom.encoders.resize import set_image_size
from patchloom.encoders.stages import (
    Tokens,
    attends,
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
    "Family",
    "Grid",
    "Tokens",
    "attends",
    "ccvit",
    "cifar_resnet",
    "class_attention",
    "convit",
    "create_backbone",
    "create_encoder",
    "depth",
    "embed",
    "embed_dim",
    "family_of",
    "feature_map",
    "final_norm",
    "frames",
    "grid_size",
    "has_tokens",
    "hyena_vit",
    "image_size",
    "in_chans",
    "input_size",
    "intermediate_layers",
    "kind_of",
    "layer_of_parameter",
    "micro",
    "new_blocks",
    "normalize",
    "num_patches",
    "num_prefix_tokens",
    "patch_shape",
    "patch_size",
    "plane_size",
    "pooled",
    "register",
    "require_tokens",
    "resize_relative_table",
    "run_block",
    "run_blocks",
    "set_image_size",
    "sides_of",
    "size_arguments",
    "timm_families",
    "tokens",
    "video",
    "vitamin",
]
