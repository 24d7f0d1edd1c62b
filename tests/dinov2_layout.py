"""DINOv2 as it was published, in plain torch: state dicts with random values everywhere, and what they compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, GRID = 32, 3, 4, 4, 5
PROTOTYPES, HIDDEN, BOTTLENECK = 24, 20, 12


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def backbone(registers: int = 0, gated: bool = False, scale: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """The official layout of a backbone."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    hidden = (int(4 * WIDTH * 2 / 3) + 7) // 8 * 8
    for number in range(DEPTH):
        block = f"blocks.{number}"
        for part in ("norm1", "norm2"):
            shapes |= {f"{block}.{part}.weight": (WIDTH,), f"{block}.{part}.bias": (WIDTH,)}
        shapes |= layer(f"{block}.attn.qkv", 3 * WIDTH, WIDTH) | layer(f"{block}.attn.proj", WIDTH, WIDTH)
        if gated:
            shapes |= layer(f"{block}.mlp.w12", 2 * hidden, WIDTH) | layer(f"{block}.mlp.w3", WIDTH, hidden)
        else:
            shapes |= layer(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH) | layer(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        if scale:
            shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
    return random(shapes, seed)


def head(seed: int = 0, prototypes: int = PROTOTYPES, bottleneck: int = BOTTLENECK) -> dict[str, Tensor]:
    """The official layout of a head of three layers."""
    shapes = layer("mlp.0", HIDDEN, WIDTH) | layer("mlp.2", HIDDEN, HIDDEN) | layer("mlp.4", bottleneck, HIDDEN)
    shapes |= {"last_layer.weight_g": (prototypes, 1), "last_layer.weight_v": (prototypes, bottleneck)}
    return random(shapes, seed)


def layer(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def transformers_layout(state: dict[str, Tensor], in_memory: bool = False, prefix: str = "") -> dict[str, Tensor]:
    """The same backbone under the names transformers writes to disk, or those of version 5 in memory."""
    outside = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    found = {}
    for name, value in state.items():
        if name in outside:
            found[outside[name]] = value
            continue
        _, number, rest = name.split(".", 2)
        block = f"encoder.layer.{number}."
        leaf = name.rsplit(".", 1)[1]
        if rest.startswith("attn.qkv"):
            stems = ("q_proj", "k_proj", "v_proj") if in_memory else ("query", "key", "value")
            for stem, part in zip(stems, value.chunk(3), strict=True):
                found[f"{block}attention.{'' if in_memory else 'attention.'}{stem}.{leaf}"] = part
        elif rest.startswith("mlp.w12") and in_memory:
            for stem, part in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                found[f"{block}mlp.{stem}.{leaf}"] = part
        else:
            proj = "attention.o_proj." if in_memory else "attention.output.dense."
            rest = rest.replace("attn.proj.", proj).replace("ls1.gamma", "layer_scale1.lambda1")
            rest = rest.replace("ls2.gamma", "layer_scale2.lambda1")
            rest = rest.replace("mlp.w3.", "mlp.down_proj." if in_memory else "mlp.weights_out.")
            found[block + rest.replace("mlp.w12.", "mlp.weights_in.")] = value
    return prefixed(found, prefix)


def positions(state: dict[str, Tensor], grid: tuple[int, int], offset: float | None, antialias: bool) -> Tensor:
    """Positions as published: by a scale with an offset, or by size."""
    table = state["pos_embed"]
    if grid == (GRID, GRID):
        return table
    maps = table[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    if offset:
        factor = ((grid[0] + offset) / GRID, (grid[1] + offset) / GRID)
        maps = F.interpolate(maps, scale_factor=factor, mode="bicubic", antialias=antialias)
    else:
        maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=antialias)
    assert maps.shape[-2:] == grid
    return torch.cat([table[:, :1], maps.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], dim=1)


def forward(
    state: dict[str, Tensor],
    images: Tensor,
    masks: Tensor | None = None,
    offset: float | None = None,
    antialias: bool | None = None,
) -> Tensor:
    """Normed tokens: class, registers, patches. By default positions go as the official code has them."""
    registers = state.get("register_tokens")
    if antialias is None:
        offset, antialias = (None, True) if registers is not None else (0.1, False)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    grid = (x.shape[-2], x.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    if masks is not None:
        x = torch.where(masks[..., None], state["mask_token"].view(1, 1, -1), x)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions(state, grid, offset, antialias)
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for number in range(DEPTH):
        block = {n.removeprefix(f"blocks.{number}."): v for n, v in state.items() if n.startswith(f"blocks.{number}.")}
        x = x + attention(block, norm(x, block, "norm1")) * block.get("ls1.gamma", torch.ones(1))
        x = x + mlp(block, norm(x, block, "norm2")) * block.get("ls2.gamma", torch.ones(1))
    return norm(x, state, "norm")


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def attention(block: dict[str, Tensor], x: Tensor) -> Tensor:
    n, t, _ = x.shape
    qkv = F.linear(x, block["attn.qkv.weight"], block["attn.qkv.bias"]).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(n, t, WIDTH)
    return F.linear(out, block["attn.proj.weight"], block["attn.proj.bias"])


def mlp(block: dict[str, Tensor], x: Tensor) -> Tensor:
    if "mlp.w12.weight" in block:
        a, b = F.linear(x, block["mlp.w12.weight"], block["mlp.w12.bias"]).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b, block["mlp.w3.weight"], block["mlp.w3.bias"])
    hidden = F.gelu(F.linear(x, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
    return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])


def logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a head says of tokens."""
    for number in (0, 2, 4):
        x = F.linear(x, state[f"mlp.{number}.weight"], state[f"mlp.{number}.bias"])
        x = F.gelu(x) if number < 4 else F.normalize(x, dim=-1)
    g, v = state["last_layer.weight_g"], state["last_layer.weight_v"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T
