"""State dicts in the published layouts, with random values in every tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def pretraining_layout(
    depth: int, width: int, heads: int, grid: int | tuple[int, int], patch: int, vocab: int, condenser: int
) -> dict[str, Tensor]:
    """Return the pre-training layout of CCViT's public implementation."""
    h, w = (grid, grid) if isinstance(grid, int) else grid
    state = {
        **_stem(width, patch),
        "mask_token": (1, 1, width),
        "rel_pos_bias.relative_position_bias_table": ((2 * h - 1) * (2 * w - 1) + 3, heads),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "cls_pt_norm.weight": (width,),
        "cls_pt_norm.bias": (width,),
        "lm_head.weight": (vocab, width),
        "lm_head.bias": (vocab,),
        "cls_pt_lm_head.weight": (3 * patch**2, width),
        "cls_pt_lm_head.bias": (3 * patch**2,),
    }
    for number in range(depth):
        state |= _block(f"blocks.{number}", width)
    for number in range(condenser):
        state |= _block(f"cls_pt_layers.{number}", width)
    tensors = _random(state)
    tensors["rel_pos_bias.relative_position_index"] = torch.zeros(h * w + 1, h * w + 1, dtype=torch.long)
    return tensors


def finetuned_layout(depth: int, width: int, heads: int, grid: int, patch: int, classes: int) -> dict[str, Tensor]:
    """Return the fine-tuning layout: a relative table per block, mean pooling, classifier."""
    state = {
        **_stem(width, patch),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for number in range(depth):
        state |= _block(f"blocks.{number}", width)
        state[f"blocks.{number}.attn.relative_position_bias_table"] = ((2 * grid - 1) ** 2 + 3, heads)
    tensors = _random(state)
    for number in range(depth):
        index = torch.zeros(grid**2 + 1, grid**2 + 1, dtype=torch.long)
        tensors[f"blocks.{number}.attn.relative_position_index"] = index
    return tensors


def _stem(width: int, patch: int) -> dict[str, tuple[int, ...]]:
    return {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }


def _block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.norm1.weight": (width,),
        f"{name}.norm1.bias": (width,),
        f"{name}.norm2.weight": (width,),
        f"{name}.norm2.bias": (width,),
        f"{name}.gamma_1": (width,),
        f"{name}.gamma_2": (width,),
        f"{name}.attn.qkv.weight": (3 * width, width),
        f"{name}.attn.q_bias": (width,),
        f"{name}.attn.v_bias": (width,),
        f"{name}.attn.proj.weight": (width, width),
        f"{name}.attn.proj.bias": (width,),
        f"{name}.mlp.fc1.weight": (4 * width, width),
        f"{name}.mlp.fc1.bias": (4 * width,),
        f"{name}.mlp.fc2.weight": (width, 4 * width),
        f"{name}.mlp.fc2.bias": (width,),
    }


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
