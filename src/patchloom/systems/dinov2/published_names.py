"""The names DINOv2's tensors have been published under, turned into one set of names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from patchloom.models.published import OF_PARTS

# Layers of the training checkpoint are named as in the official backbone, heads as torch's newer weight norm has it.
CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
WEIGHT_NORM = {
    "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
# What transformers writes to disk, and what version 5 calls it in memory.
INSIDE = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "mlp.down_proj": "mlp.w3",
}
JOINED = {
    "attn.qkv": (
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ),
    "mlp.w12": (("mlp.gate_proj", "mlp.up_proj"),),
}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint of the official code without traces of how it was trained.

    Wrappers of parallel training and the grouping of blocks into chunks are taken out of the names; weight norm gets
    its newer names.
    """
    tensors = {}
    for name, value in state.items():
        plain = OF_PARTS.sub("", name).replace("module.", "")
        if CHUNK.search(plain):
            # blocks.CHUNK.INDEX, the index counted through all chunks.
            plain = CHUNK.sub(r"\1blocks.\2.", plain)
        for old, new in WEIGHT_NORM.items():
            plain = plain.replace(old, new)
        tensors[plain] = value
    return tensors


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of transformers' Dinov2Model, alone or inside a classifier."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint of transformers' Dinov2Model under the official names.

    Query, key and value become one tensor, and so do gate and value of a gated MLP.
    """
    whole = next(name for name in state if name.endswith("embeddings.patch_embeddings.projection.weight"))
    prefix = whole.removesuffix("embeddings.patch_embeddings.projection.weight")
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    left = {name: value for name, value in state.items() if not name.startswith((prefix, "classifier."))}
    tensors = left if prefix else {}
    tensors |= {OUTSIDE[name]: inner.pop(name) for name in list(inner) if name in OUTSIDE}
    for name in list(inner):
        if name not in inner:
            continue  # taken with another
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if layer is None:
            tensors[name] = inner.pop(name)  # left over; refused by name where it is filled in
            continue
        block, rest = f"blocks.{layer[1]}.", layer[2]
        for ours, kinds in JOINED.items():
            for parts in kinds:
                stem, _, leaf = rest.rpartition(".")
                names = [f"encoder.layer.{layer[1]}.{part}.{leaf}" for part in parts]
                if stem in parts and all(each in inner for each in names):
                    tensors[f"{block}{ours}.{leaf}"] = torch.cat([inner.pop(each) for each in names])
        if name in inner:
            for old, new in INSIDE.items():
                rest = rest.replace(old, new)
            tensors[block + rest] = inner.pop(name)
    return tensors
