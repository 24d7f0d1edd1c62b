"""MAE written out in plain torch, as published: random state dicts and what they compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def vit_layout(depth: int, width: int, patch: int, grid: tuple[int, int], channels: int = 3) -> dict[str, Tensor]:
    """Return the encoder's part of the layout, without a norm at the end."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid[0] * grid[1] + 1, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for number in range(depth):
        shapes |= _block(f"blocks.{number}", width)
    return _random(shapes, seed=0)


def norm_layout(name: str, width: int) -> dict[str, Tensor]:
    return _random({f"{name}.weight": (width,), f"{name}.bias": (width,)}, seed=1)


def decoder_layout(
    depth: int, width: int, encoder_width: int, patch: int, patches: int, channels: int = 3
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, width),
        "decoder_pos_embed": (1, patches + 1, width),
        "decoder_embed.weight": (width, encoder_width),
        "decoder_embed.bias": (width,),
        "decoder_norm.weight": (width,),
        "decoder_norm.bias": (width,),
        "decoder_pred.weight": (channels * patch**2, width),
        "decoder_pred.bias": (channels * patch**2,),
    }
    for number in range(depth):
        shapes |= _block(f"decoder_blocks.{number}", width)
    return _random(shapes, seed=2)


def head_layout(classes: int, width: int) -> dict[str, Tensor]:
    return _random({"head.weight": (classes, width), "head.bias": (classes,)}, seed=3)


def embedded(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return patch embeddings with their positions, (B, N, D)."""
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    return x + state["pos_embed"][:, 1:]


def with_class_token(state: dict[str, Tensor], x: Tensor) -> Tensor:
    token = state["cls_token"] + state["pos_embed"][:, :1]
    return torch.cat([token.expand(len(x), -1, -1), x], dim=1)


def block(state: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Return a pre-norm block's output."""
    y = norm(state, f"{name}.norm1", x)
    batch, length, width = y.shape
    qkv = y @ state[f"{name}.attn.qkv.weight"].T + state[f"{name}.attn.qkv.bias"]
    q, k, v = qkv.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(width // heads)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + y @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
    y = norm(state, f"{name}.norm2", x) @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def autoencode(
    state: dict[str, Tensor],
    images: Tensor,
    noise: Tensor,
    ratio: float,
    *,
    heads: int,
    decoder_heads: int,
    norm_pix: bool,
) -> dict[str, Tensor]:
    """Return loss, pred, mask, latent and ids_restore of the published forward pass."""
    state = {name: value.double() for name, value in state.items()}
    images = images.double()
    x = embedded(state, images)
    batch, count = x.shape[:2]
    keep = int(count * (1 - ratio))
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    visible = torch.stack([x[b, shuffle[b, :keep]] for b in range(batch)])
    mask = torch.ones(batch, count, dtype=torch.float64)
    for b in range(batch):
        mask[b, shuffle[b, :keep]] = 0
    y = with_class_token(state, visible)
    for number in range(_count(state, "blocks")):
        y = block(state, f"blocks.{number}", y, heads)
    latent = norm(state, "norm", y)
    z = latent @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
    rows = torch.cat([z[:, 1:], state["mask_token"].expand(batch, count - keep, -1)], dim=1)
    rows = torch.stack([rows[b, restore[b]] for b in range(batch)])
    z = torch.cat([z[:, :1], rows], dim=1) + state["decoder_pos_embed"]
    for number in range(_count(state, "decoder_blocks")):
        z = block(state, f"decoder_blocks.{number}", z, decoder_heads)
    z = norm(state, "decoder_norm", z)
    pred = (z @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[:, 1:]
    target = patches_hwc(images, state["patch_embed.proj.weight"].shape[-1])
    if norm_pix:
        mean = target.mean(-1, keepdim=True)
        variance = (target - mean).square().sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / torch.sqrt(variance + 1e-6)
    loss = ((pred - target).square().mean(-1) * mask).sum() / mask.sum()
    return {"loss": loss, "pred": pred, "mask": mask, "latent": latent, "ids_restore": restore}


def patches_hwc(images: Tensor, size: int) -> Tensor:
    """Return patches (B, N, p² C), elements in the order row, column, channel."""
    rows = []
    for top in range(0, images.shape[-2], size):
        for left in range(0, images.shape[-1], size):
            cell = images[:, :, top : top + size, left : left + size]
            rows.append(cell.permute(0, 2, 3, 1).reshape(len(images), -1))
    return torch.stack(rows, dim=1)


def _block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, shape in layers.items():
        shapes |= {f"{name}.{layer}.weight": shape, f"{name}.{layer}.bias": shape[:1]}
    for layer in ("norm1", "norm2"):
        shapes |= {f"{name}.{layer}.weight": (width,), f"{name}.{layer}.bias": (width,)}
    return shapes


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def _count(state: dict[str, Any], prefix: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})
