"""BEiT's and VQ-KD's published networks as formulas of their own in float64, and state dicts in their layouts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from tests_support import pretraining_layout

State = dict[str, Tensor]
OWN_HEAD = ("cls_pt_norm.", "cls_pt_lm_head.")


def beit_layout(depth: int = 3, condenser: int = 0, vocab: int = 11) -> State:
    """Return a pre-training state dict of BEiT (of v2 with a condenser), width 24, 3 heads, 4x4 patches of 4 pixels."""
    state = pretraining_layout(depth, width=24, heads=3, grid=4, patch=4, vocab=vocab, condenser=condenser)
    return {name: value for name, value in state.items() if not name.startswith(OWN_HEAD)}


def vq_kd_layout(
    grid: int = 3, patch: int = 4, width: int = 16, depth: int = 2, codes: int = 13, code_dim: int = 6, teacher: int = 9
) -> State:
    """Return a state dict of VQ-KD with a decoder of one block, everything in it drawn."""
    g = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {}
    for side, channels, kernel, blocks in (("encoder", 3, patch, depth), ("decoder", code_dim, 1, 1)):
        shapes |= {
            f"{side}.cls_token": (1, 1, width),
            f"{side}.pos_embed": (1, grid**2 + 1, width),
            f"{side}.patch_embed.proj.weight": (width, channels, kernel, kernel),
            f"{side}.patch_embed.proj.bias": (width,),
            f"{side}.fc_norm.weight": (width,),
            f"{side}.fc_norm.bias": (width,),
        }
        for number in range(blocks):
            block = f"{side}.blocks.{number}"
            shapes |= {f"{block}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
            shapes |= {f"{block}.attn.qkv.weight": (3 * width, width), f"{block}.attn.proj.weight": (width, width)}
            shapes |= {f"{block}.attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * width, width), f"{block}.mlp.fc2.weight": (width, 4 * width)}
            shapes |= {f"{block}.mlp.fc1.bias": (4 * width,), f"{block}.mlp.fc2.bias": (width,)}
    for side, last in (("encode", code_dim), ("decode", teacher)):
        layer = f"{side}_task_layer"
        shapes |= {f"{layer}.0.weight": (width, width), f"{layer}.0.bias": (width,)}
        shapes |= {f"{layer}.2.weight": (last, width), f"{layer}.2.bias": (last,)}
    shapes |= {"quantize.cluster_size": (codes,), "quantize.embedding.cluster_size": (codes,)}
    shapes |= {"quantize.embedding.weight": (codes, code_dim), "quantize.embedding.embed_avg": (codes, code_dim)}
    state = {name: 0.5 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    table = state["quantize.embedding.weight"]
    state["quantize.embedding.weight"] = table / table.norm(dim=1, keepdim=True)
    state["quantize.embedding.initted"] = torch.ones(1)
    return state


def norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(x: Tensor, state: State, name: str, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Return a block's output for (N, D) tokens of one image; `bias` is (heads, N, N)."""
    width = x.shape[1]
    qkv = norm(x, state, f"{name}.norm1") @ state[f"{name}.attn.qkv.weight"].T
    q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
    qkv = qkv + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = (part.view(-1, heads, width // heads).transpose(0, 1) for part in qkv.split(width, 1))
    scores = q @ k.mT / math.sqrt(width // heads) + bias
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(-1, width)
    x = x + state.get(f"{name}.gamma_1", 1.0) * linear(mixed, state, f"{name}.attn.proj")
    hidden = gelu(linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + state.get(f"{name}.gamma_2", 1.0) * linear(hidden, state, f"{name}.mlp.fc2")


def patches_of(image: Tensor, state: State, name: str) -> Tensor:
    """Return the embedded patches (N, D) of an image (C, H, W), each by a sum over its pixels."""
    kernel = state[f"{name}.weight"]
    side = kernel.shape[-1]
    rows, columns = image.shape[1] // side, image.shape[2] // side
    cut = [
        image[:, side * i : side * (i + 1), side * j : side * (j + 1)].flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(cut) @ kernel.flatten(1).T + state[f"{name}.bias"]


def relative_bias(table: Tensor, side: int) -> Tensor:
    """Return (heads, 1 + N, 1 + N): a row of the table for each offset, and three for the class token's pairs."""
    count = side**2 + 1
    bias = torch.zeros(table.shape[1], count, count, dtype=table.dtype)
    for a in range(count):
        for b in range(count):
            if a and b:
                (ya, xa), (yb, xb) = divmod(a - 1, side), divmod(b - 1, side)
                row = (ya - yb + side - 1) * (2 * side - 1) + (xa - xb + side - 1)
            else:
                row = len(table) - (1 if not a and not b else 3 if not a else 2)
            bias[:, a, b] = table[row]
    return bias


def beit_logits(state: State, images: Tensor, masked: Tensor, early: int, heads: int = 3) -> list[Tensor]:
    """Return the logits (M, K) of the masked patches: of the main branch and, where there is one, of the other."""
    state = {name: value.double() for name, value in state.items()}
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    extra = len({name.split(".")[1] for name in state if name.startswith("cls_pt_layers.")})
    branches: list[list[Tensor]] = [[], []]
    for image, hidden in zip(images.double(), masked, strict=True):
        patches = patches_of(image, state, "patch_embed.proj")
        patches = torch.where(hidden[:, None], state["mask_token"][0], patches)
        x = torch.cat([state["cls_token"][0], patches])
        bias = relative_bias(state["rel_pos_bias.relative_position_bias_table"], math.isqrt(len(patches)))
        for number in range(depth):
            x = block(x, state, f"blocks.{number}", heads, bias)
            if number + 1 == early:
                tapped = x
        ends = [x]
        if extra:
            joined = torch.cat([x[:1], tapped[1:]])
            for number in range(extra):
                joined = block(joined, state, f"cls_pt_layers.{number}", heads, bias)
            ends.append(joined)
        for branch, end in zip(branches, ends, strict=False):
            branch.append(linear(norm(end[1:][hidden], state, "norm"), state, "lm_head"))
    return [torch.cat(branch) for branch in branches if branch]


def _vit(state: State, side: str, image: Tensor, heads: int) -> Tensor:
    """Return the normed patch tokens (N, D) of a ViT with absolute positions."""
    x = torch.cat([state[f"{side}.cls_token"][0], patches_of(image, state, f"{side}.patch_embed.proj")])
    x = x + state[f"{side}.pos_embed"][0]
    for number in range(len({name.split(".")[2] for name in state if name.startswith(f"{side}.blocks.")})):
        x = block(x, state, f"{side}.blocks.{number}", heads)
    return norm(x[1:], state, f"{side}.fc_norm")


def vq_kd(state: State, images: Tensor, heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids (B, N), unit vectors before the table (B, N, d), features (B, N, T) and the quantiser's loss."""
    state = {name: value.double() for name, value in state.items()}
    table, ids, vectors, features = state["quantize.embedding.weight"], [], [], []
    side = math.isqrt(state["encoder.pos_embed"].shape[1] - 1)
    for image in images.double():
        tokens = _vit(state, "encoder", 2 * image - 1, heads)
        z = linear(linear(tokens, state, "encode_task_layer.0").tanh(), state, "encode_task_layer.2")
        z = z / z.norm(dim=1, keepdim=True)
        found = torch.stack([((v - table) ** 2).sum(1).argmin() for v in z])
        codes = table[found].T.reshape(-1, side, side)
        decoded = _vit(state, "decoder", codes, heads)
        features.append(linear(linear(decoded, state, "decode_task_layer.0").tanh(), state, "decode_task_layer.2"))
        ids.append(found)
        vectors.append(z)
    found, z = torch.stack(ids), torch.stack(vectors)
    return found, z, torch.stack(features), (z - table[found]).square().mean()
