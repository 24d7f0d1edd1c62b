"""The names transformers gives MAE's tensors, on disk and (since version 5) in memory, turned into official ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PATCHES = "embeddings.patch_embeddings.projection."
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    f"{PATCHES}weight": "patch_embed.proj.weight",
    f"{PATCHES}bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    **{
        f"decoder.{part}.{kind}": f"{part}.{kind}"
        for part in ("decoder_embed", "decoder_norm", "decoder_pred")
        for kind in ("weight", "bias")
    },
}
BLOCK = re.compile(r"(decoder\.decoder_layers|encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
INSIDE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ATTENTION = {
    f"attention.{name}": number
    for names in (("attention.query", "attention.key", "attention.value"), ("q_proj", "k_proj", "v_proj"))
    for number, name in enumerate(names)
}


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of transformers' ViTMAE, with or without its decoder."""
    return any(name.endswith(f"{PATCHES}weight") for name in state)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint of transformers' ViTMAE under the official names; queries, keys and values become one."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        plain = name.removeprefix("vit.")
        block = BLOCK.fullmatch(plain)
        if block is None:
            tensors[OUTSIDE.get(plain, name)] = value  # what is unknown is refused by its name where it is filled in
            continue
        owner = f"{'decoder_blocks' if block[1].startswith('decoder') else 'blocks'}.{block[2]}"
        if block[3] in ATTENTION:
            parts.setdefault(f"{owner}.attn.qkv.{block[4]}", {})[ATTENTION[block[3]]] = value
        else:
            ours = INSIDE.get(block[3])
            tensors[name if ours is None else f"{owner}.{ours}.{block[4]}"] = value
    for name, three in parts.items():
        if len(three) == 3:
            tensors[name] = torch.cat([three[number] for number in range(3)])
    return tensors
