"""ViT-CoMer written out a second time, with plain functions of torch, on tensors under the published names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def of(state: State, prefix: str) -> State:
    """Return the tensors under a name, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def batch_norm(s: State, name: str, x: Tensor) -> Tensor:
    mean, var, scale, shift = (
        s[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def shapes(h: int, w: int) -> list[tuple[int, int]]:
    return [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]


def levels(c: Tensor, h: int, w: int) -> list[Tensor]:
    """Return the maps (B, D, ., .) of a pyramid."""
    sizes = [a * b for a, b in shapes(h, w)]
    parts = torch.split(c, sizes, 1)
    return [x.permute(0, 2, 1).reshape(len(c), -1, *shape) for x, shape in zip(parts, shapes(h, w), strict=True)]


def sequence(maps: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten(2).permute(0, 2, 1) for x in maps], 1)


def with_middle(c: Tensor, x: Tensor, h: int, w: int) -> Tensor:
    c = c.clone()
    c[:, 4 * h * w : 5 * h * w] += x
    return c


def sampled(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return what maps (B, d, h, w) hold at places (B, Q), in pixels from the centre of the first: (B, d, Q)."""
    batch, dim, h, w = maps.shape
    total = maps.new_zeros(batch, dim, x.shape[1])
    left, top = x.floor(), y.floor()
    for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
            found = maps.flatten(2).gather(2, index[:, None].expand(-1, dim, -1))
            total = total + found * (share_x * share_y * inside)[:, None]
    return total


def attend(s: State, query: Tensor, value: Tensor, own: list[tuple[int, int]], heads: int, points: int) -> Tensor:
    """Return multi-scale deformable attention of queries on the cells of maps to these maps."""
    batch, queries, _ = query.shape
    places = torch.cat(
        [
            torch.tensor([[(j + 0.5) / w, (i + 0.5) / h] for i in range(h) for j in range(w)], dtype=query.dtype)
            for h, w in own
        ]
    )
    offsets = linear(s, "sampling_offsets", query).reshape(batch, queries, heads, len(own), points, 2)
    weights = linear(s, "attention_weights", query).reshape(batch, queries, heads, -1).softmax(-1)
    weights = weights.reshape(batch, queries, heads, len(own), points)
    values = linear(s, "value_proj", value).reshape(batch, value.shape[1], heads, -1)
    out = query.new_zeros(batch, queries, heads, values.shape[-1])
    start = 0
    for level, (h, w) in enumerate(own):
        part = values[:, start : start + h * w]
        start += h * w
        for head in range(heads):
            maps = part[:, :, head].permute(0, 2, 1).reshape(batch, -1, h, w)
            for point in range(points):
                dx, dy = offsets[:, :, head, level, point].unbind(-1)
                found = sampled(maps, places[:, 0] * w + dx - 0.5, places[:, 1] * h + dy - 0.5)
                out[:, :, head] += found.permute(0, 2, 1) * weights[:, :, head, level, point, None]
    return linear(s, "output_proj", out.flatten(2))


def depthwise(s: State, name: str, x: Tensor) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, s[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=len(weight))


def conv_ffn(s: State, x: Tensor, h: int, w: int) -> Tensor:
    hidden = levels(linear(s, "fc1", x), h, w)
    return linear(s, "fc2", F.gelu(sequence([depthwise(s, "dwconv.dwconv", maps) for maps in hidden])))


def mrfp(s: State, c: Tensor, h: int, w: int) -> Tensor:
    out = []
    for number, maps in enumerate(levels(linear(s, "fc1", c), h, w)):
        half = maps.shape[1] // 2
        first = depthwise(s, f"dwconv.dwconv{2 * number + 1}", maps[:, :half])
        second = depthwise(s, f"dwconv.dwconv{2 * number + 2}", maps[:, half:])
        out.append(F.gelu(batch_norm(s, f"dwconv.bn{number + 1}", torch.cat([first, second], 1))))
    return linear(s, "fc2", F.gelu(sequence(out)))


def to_vit(s: State, x: Tensor, c: Tensor, h: int, w: int, heads: int, points: int) -> Tensor:
    a = attend(
        of(s, "attn"), layer_norm(s, "query_norm", c), layer_norm(s, "feat_norm", c), shapes(h, w), heads, points
    )
    a = a + conv_ffn(of(s, "ffn"), layer_norm(s, "ffn_norm", a), h, w)
    fine, same, coarse = levels(a, h, w)
    fine = fine.unflatten(2, (h, 2)).unflatten(4, (w, 2)).mean((3, 5))  # halving is the mean of four
    coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return x + s["gamma"] * sequence([fine + same + coarse])


def extractor(s: State, query: Tensor, feat: Tensor, h: int, w: int, heads: int, points: int) -> Tensor:
    normed = layer_norm(s, "query_norm", query), layer_norm(s, "feat_norm", feat)
    query = query + attend(of(s, "attn"), *normed, shapes(h, w), heads, points)
    return query + conv_ffn(of(s, "ffn"), layer_norm(s, "ffn_norm", query), h, w)


def to_cnn(s: State, c: Tensor, x: Tensor, h: int, w: int, heads: int, points: int, extra: bool) -> Tensor:
    c = with_middle(c, x, h, w)
    if extra:
        c = c + conv_ffn(of(s, "ffn"), layer_norm(s, "ffn_norm", c), h, w)
    if any(name.startswith("cfinter.") for name in s):
        normed = layer_norm(s, "query_norm", c), layer_norm(s, "feat_norm", c)
        c = extractor(of(s, "cfinter"), *normed, h, w, heads, points)
    return c


def interaction(s: State, x: Tensor, c: Tensor, blocks, h: int, w: int, heads: int, points: int, back: bool = True):
    """Return tokens and pyramid after a stage; `back` is whether it has an exchange towards the CNN."""
    if "cti_tov.gamma" in s:
        c = with_middle(mrfp(of(s, "mrfp"), c, h, w), x, h, w)
        x = to_vit(of(s, "cti_tov"), x, c, h, w, heads, points)
    x = blocks(x)
    if back:
        c = to_cnn(of(s, "cti_toc"), c, x, h, w, heads, points, False)
    extras = {name.split(".")[1] for name in s if name.startswith("extra_CTIs.")}
    for number in range(len(extras)):
        c = to_cnn(of(s, f"extra_CTIs.{number}"), c, x, h, w, heads, points, True)
    return x, c


def attention(s: State, x: Tensor, heads: int, grid: tuple[int, int], window: int | None) -> Tensor:
    """Return the attention of a plain ViT, within windows token by token."""
    qkv = linear(s, "qkv", x)
    batch, _, width = x.shape
    out = torch.zeros_like(x)
    h, w = grid
    side = window or max(h, w)
    for top in range(0, h, side):
        for left in range(0, w, side):
            rows = [(top + i) * w + left + j for i in range(side) for j in range(side) if top + i < h and left + j < w]
            fill = side * side - len(rows) if window else 0
            own = torch.cat([qkv[:, rows], qkv.new_zeros(batch, fill, 3 * width)], 1)
            q, k, v = own.reshape(batch, len(rows) + fill, 3, heads, -1).permute(2, 0, 3, 1, 4)
            shares = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
            out[:, rows] = (shares @ v).transpose(1, 2).flatten(2)[:, : len(rows)]
    return linear(s, "proj", out)


def block(s: State, x: Tensor, heads: int, grid: tuple[int, int], window: int | None) -> Tensor:
    x = x + s.get("gamma1", 1) * attention(of(s, "attn"), layer_norm(s, "norm1", x), heads, grid, window)
    hidden = F.gelu(linear(s, "mlp.fc1", layer_norm(s, "norm2", x)))
    return x + s.get("gamma2", 1) * linear(s, "mlp.fc2", hidden)


def cnn(s: State, images: Tensor) -> list[Tensor]:
    """Return the CNN's maps of strides 4, 8, 16, 32."""
    x = images
    for number, stride in ((0, 2), (3, 1), (6, 1)):
        x = F.conv2d(x, s[f"stem.{number}.weight"], stride=stride, padding=1)
        x = batch_norm(s, f"stem.{number + 1}", x).clamp(min=0)
    found = [F.max_pool2d(x, 3, 2, 1)]
    for number in (2, 3, 4):
        x = F.conv2d(found[-1], s[f"conv{number}.0.weight"], stride=2, padding=1)
        found.append(batch_norm(s, f"conv{number}.1", x).clamp(min=0))
    return [F.conv2d(x, s[f"fc{i}.weight"], s[f"fc{i}.bias"]) for i, x in enumerate(found, 1)]


def embed(s: State, images: Tensor) -> Tensor:
    """Return what enters the ViT: patches with positions of another grid, without a class token."""
    maps = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=16)
    table = s["pos_embed"][:, 1:]
    side = math.isqrt(table.shape[1])
    positions = table.permute(0, 2, 1).reshape(1, -1, side, side)
    positions = F.interpolate(positions, size=maps.shape[-2:], mode="bicubic", align_corners=False)
    return sequence([maps + positions])


def backbone(s: State, images: Tensor, settings: dict) -> list[Tensor]:
    """Return the four maps.

    Args:
        s: Tensors under the published names, in float64.
        images: (B, 3, H, W).
        settings: `heads`, `deform_heads`, `points`, `stages`, `windows` (one for each block), `vit` (per_stage, last).
    """
    h, w = images.shape[-2] // 16, images.shape[-1] // 16
    c1, *rest = cnn(of(s, "spm"), images)
    c = torch.cat([sequence([x]) + s["level_embed"][i] for i, x in enumerate(rest)], 1)
    x, after = embed(s, images), []
    for number, (first, last) in enumerate(settings["stages"]):

        def blocks(x: Tensor, first: int = first, last: int = last) -> Tensor:
            for i in range(first, last + 1):
                x = block(of(s, f"blocks.{i}"), x, settings["heads"], (h, w), settings["windows"][i])
            return x

        part = of(s, f"interactions.{number}")
        x, c = interaction(part, x, c, blocks, h, w, settings["deform_heads"], settings["points"])
        after.append(x)
    c2, c3, c4 = levels(c, h, w)
    maps = [F.conv_transpose2d(c2, s["up.weight"], s["up.bias"], stride=2) + c1, c2, c3, c4]
    vit = after if settings["vit"] == "per_stage" else [after[-1]] * 4
    for i, (tokens, scale) in enumerate(zip(vit, (4, 2, 1, 0.5), strict=True)):
        added = tokens.permute(0, 2, 1).reshape(len(x), -1, h, w)
        if scale != 1:
            added = F.interpolate(added, scale_factor=scale, mode="bilinear", align_corners=False)
        maps[i] = batch_norm(s, f"norm{i + 1}", maps[i] + added)
    return maps


def layout(
    width: int = 12,
    depth: int = 4,
    grid: int = 4,
    middle: int = 18,
    values: int = 12,
    heads: int = 3,
    points: int = 2,
    conv: int = 4,
    extra: int = 4,
    to_vit: tuple[bool, ...] = (True,) * 4,
    interacts: bool = True,
    gammas: bool = True,
    unused: bool = True,
) -> State:
    """Return the tensors of a backbone under the published names, all random.

    `unused` adds what the published segmentation code makes for stages without an exchange and never uses.
    """
    state: State = {}
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator) * 0.2

    def layer(name: str, out: int, *into: int) -> None:
        add(f"{name}.weight", out, *into)
        add(f"{name}.bias", out)

    def norm(name: str, dim: int = width) -> None:
        layer(name, dim)

    def batch_norm(name: str, dim: int = width) -> None:
        norm(name, dim)
        add(f"{name}.running_mean", dim)
        state[f"{name}.running_var"] = 0.5 + torch.rand(dim, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    def conv_ffn(name: str) -> None:
        layer(f"{name}.fc1", width // 4, width)
        layer(f"{name}.dwconv.dwconv", width // 4, 1, 3, 3)
        layer(f"{name}.fc2", width, width // 4)

    def attending(name: str) -> None:
        for part in ("query_norm", "feat_norm", "ffn_norm"):
            norm(f"{name}.{part}")
        layer(f"{name}.attn.sampling_offsets", heads * 3 * points * 2, width)
        layer(f"{name}.attn.attention_weights", heads * 3 * points, width)
        layer(f"{name}.attn.value_proj", values, width)
        layer(f"{name}.attn.output_proj", width, values)
        conv_ffn(f"{name}.ffn")

    add("pos_embed", 1, 1 + grid**2, width)
    layer("patch_embed.proj", width, 3, 16, 16)
    for number in range(depth):
        norm(f"blocks.{number}.norm1")
        norm(f"blocks.{number}.norm2")
        layer(f"blocks.{number}.attn.qkv", 3 * width, width)
        layer(f"blocks.{number}.attn.proj", width, width)
        layer(f"blocks.{number}.mlp.fc1", 2 * width, width)
        layer(f"blocks.{number}.mlp.fc2", width, 2 * width)
        if gammas:
            add(f"blocks.{number}.gamma1", width)
            add(f"blocks.{number}.gamma2", width)
    add("level_embed", 3, width)
    for number, into in ((0, 3), (3, conv), (6, conv)):
        add(f"spm.stem.{number}.weight", conv, into, 3, 3)
        batch_norm(f"spm.stem.{number + 1}", conv)
    for number, out, into in ((2, 2 * conv, conv), (3, 4 * conv, 2 * conv), (4, 4 * conv, 4 * conv)):
        add(f"spm.conv{number}.0.weight", out, into, 3, 3)
        batch_norm(f"spm.conv{number}.1", out)
    for number, into in enumerate((conv, 2 * conv, 4 * conv, 4 * conv), 1):
        layer(f"spm.fc{number}", width, into, 1, 1)
    for stage, exchanges in enumerate(to_vit):
        name = f"interactions.{stage}"
        if exchanges or unused:
            layer(f"{name}.mrfp.fc1", middle, width)
            layer(f"{name}.mrfp.fc2", width, middle)
            for number in range(1, 7):
                side = 3 if number % 2 else 5
                layer(f"{name}.mrfp.dwconv.dwconv{number}", middle // 2, 1, side, side)
            for number in range(1, 4):
                batch_norm(f"{name}.mrfp.dwconv.bn{number}", middle)
        if exchanges:
            attending(f"{name}.cti_tov")
            add(f"{name}.cti_tov.gamma", width)
        back = [f"{name}.cti_toc"]
        if stage == len(to_vit) - 1:
            back += [f"{name}.extra_CTIs.{number}" for number in range(extra)]
        for part in back:
            norm(f"{part}.query_norm")
            norm(f"{part}.feat_norm")
            if part != back[0]:
                norm(f"{part}.ffn_norm")
                conv_ffn(f"{part}.ffn")
            if interacts:
                attending(f"{part}.cfinter")
    add("up.weight", width, width, 2, 2)
    add("up.bias", width)
    for number in range(1, 5):
        batch_norm(f"norm{number}")
    return state
