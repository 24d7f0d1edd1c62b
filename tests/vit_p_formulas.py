"""ViT-P's point classifier as it was published, with plain functions of torch, and its tensors at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_layout import GRID, HEADS, PATCH, WIDTH, backbone

CLASSES = 6


def layout(classes: int = CLASSES, registers: int = 0, gated: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a published classifier, every one drawn at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    state = backbone(registers=registers, gated=gated, seed=seed)
    del state["cls_token"]
    state["cls_embeddings.weight"] = torch.randn(WIDTH, 2, generator=generator)
    state["head.weight"] = torch.randn(classes, WIDTH, generator=generator)
    state["head.bias"] = torch.randn(classes, generator=generator)
    return state


def positions(state: dict[str, Tensor], points: int, height: int, width: int) -> Tensor:
    table = state["pos_embed"]
    if points == 1 and height == width == GRID:
        return table
    maps = table[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    factors = ((height + 0.1) / GRID, (width + 0.1) / GRID)
    maps = F.interpolate(maps, scale_factor=factors, mode="bicubic", antialias=False)
    assert maps.shape[-2:] == (height, width)
    return torch.cat([table[:, :1].repeat(1, points, 1), maps.flatten(2).transpose(1, 2)], 1)


def classify(state: dict[str, Tensor], images: Tensor, points: Tensor) -> Tensor:
    """Return logits (B, P, K) in the precision of what is given."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    count = points.shape[1]
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    height, width = patches.shape[-2:]
    x = torch.cat([points @ state["cls_embeddings.weight"].T, patches.flatten(2).transpose(1, 2)], 1)
    x = x + positions(state, count, height, width)
    if "register_tokens" in state:
        registers = state["register_tokens"].expand(len(x), -1, -1)
        x = torch.cat([x[:, :count], registers, x[:, count:]], 1)
    for number in range(3):
        block = f"blocks.{number}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        seen = (weights @ v).transpose(1, 2).reshape(x.shape)
        x = x + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", seen)
        inner = norm(f"{block}.norm2", x)
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(f"{block}.mlp.w12", inner).chunk(2, -1)
            inner = linear(f"{block}.mlp.w3", F.silu(gate) * value)
        else:
            inner = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", inner)))
        x = x + state[f"{block}.ls2.gamma"] * inner
    return linear("head", norm("norm", x)[:, :count])
