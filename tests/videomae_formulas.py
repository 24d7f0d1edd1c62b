"""VideoMAE V2 written out in float64, and state dicts in its published layout with every tensor randomised."""

from __future__ import annotations

import math

import torch


def draw(*shape, generator, scale=0.3):
    return torch.randn(*shape, generator=generator) * scale


def block_layout(prefix, width, heads, generator, *, hidden=None, cos_attn=False, gamma=False, bias=True):
    hidden = 4 * width if hidden is None else hidden
    shapes = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    if bias:
        shapes |= {"attn.q_bias": (width,), "attn.v_bias": (width,)}
    if cos_attn:
        shapes["attn.scale"] = (heads, 1, 1)
    if gamma:
        shapes |= {"gamma_1": (width,), "gamma_2": (width,)}
    state = {f"{prefix}{name}": draw(*shape, generator=generator) for name, shape in shapes.items()}
    if cos_attn:  # some beyond the largest
        state[f"{prefix}attn.scale"] = 1 + 6 * torch.rand(heads, 1, 1, generator=generator)
    return state


def norm_layout(name, width, generator):
    return {f"{name}.{part}": draw(width, generator=generator) for part in ("weight", "bias")}


def encoder_layout(width, depth, heads, patch, generator, prefix="", **block):
    state = {
        f"{prefix}patch_embed.proj.weight": draw(width, 3, 2, patch, patch, generator=generator, scale=0.1),
        f"{prefix}patch_embed.proj.bias": draw(width, generator=generator),
    }
    for number in range(depth):
        state |= block_layout(f"{prefix}blocks.{number}.", width, heads, generator, **block)
    return state


def pretraining_layout(width, depth, heads, patch, decoder, decoder_depth, decoder_heads, generator, **block):
    state = encoder_layout(width, depth, heads, patch, generator, "encoder.", **block)
    state |= norm_layout("encoder.norm", width, generator)
    state["encoder_to_decoder.weight"] = draw(decoder, width, generator=generator)
    state["mask_token"] = draw(1, 1, decoder, generator=generator)
    for number in range(decoder_depth):
        state |= block_layout(f"decoder.blocks.{number}.", decoder, decoder_heads, generator, **block)
    out = 2 * patch * patch * 3
    return (
        state
        | norm_layout("decoder.norm", decoder, generator)
        | {
            "decoder.head.weight": draw(out, decoder, generator=generator),
            "decoder.head.bias": draw(out, generator=generator),
        }
    )


def table(count, width):
    rows = [
        [
            (math.sin if j % 2 == 0 else math.cos)(n / 10000 ** (2 * (j // 2) / width))
            for j in range(width)
        ]
        for n in range(count)
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def normed(state, name, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state, prefix, x, heads):
    width = x.shape[-1]
    q, k, v = (x @ part.T for part in state[f"{prefix}qkv.weight"].split(width))
    if f"{prefix}q_bias" in state:
        q, v = q + state[f"{prefix}q_bias"], v + state[f"{prefix}v_bias"]
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in (q, k, v))
    if f"{prefix}scale" in state:
        q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
        logits = q @ k.transpose(-1, -2) * torch.exp(torch.clamp(state[f"{prefix}scale"], max=4.6052))
    else:
        logits = (q * (width // heads) ** -0.5) @ k.transpose(-1, -2)
    mixed = (torch.softmax(logits, -1) @ v).transpose(-3, -2).flatten(-2)
    return mixed @ state[f"{prefix}proj.weight"].T + state[f"{prefix}proj.bias"]


def block(state, prefix, x, heads):
    attended = attention(state, f"{prefix}attn.", normed(state, f"{prefix}norm1", x), heads)
    x = x + state.get(f"{prefix}gamma_1", 1.0) * attended
    inner = normed(state, f"{prefix}norm2", x) @ state[f"{prefix}mlp.fc1.weight"].T + state[f"{prefix}mlp.fc1.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return x + state.get(f"{prefix}gamma_2", 1.0) * (
        inner @ state[f"{prefix}mlp.fc2.weight"].T + state[f"{prefix}mlp.fc2.bias"]
    )


def embedded(state, clip, patch, prefix=""):
    """Tokens of one clip (3, T, H, W), time, then rows, then columns."""
    kernel, rows = state[f"{prefix}patch_embed.proj.weight"], []
    _, times, height, width = clip.shape
    for t in range(0, times, 2):
        for y in range(0, height, patch):
            for x in range(0, width, patch):
                tube = clip[:, t : t + 2, y : y + patch, x : x + patch]
                rows.append((kernel * tube).sum((1, 2, 3, 4)) + state[f"{prefix}patch_embed.proj.bias"])
    return torch.stack(rows)


def encoded(state, x, heads, prefix=""):
    depth = len({name for name in state if name.startswith(f"{prefix}blocks.") and name.endswith("norm1.weight")})
    for number in range(depth):
        x = block(state, f"{prefix}blocks.{number}.", x, heads)
    return x


def predictions(state, clips, hidden, left_out, patch, heads, decoder_heads):
    """Predictions of a batch, a clip at a time."""
    state = {name: value.double() for name, value in state.items()}
    told = []
    for clip, mask, skipped in zip(clips.double(), hidden, left_out, strict=True):
        tokens = embedded(state, clip, patch, "encoder.")
        tokens = tokens + table(len(tokens), tokens.shape[1])
        x = normed(state, "encoder.norm", encoded(state, tokens[~mask], heads, "encoder."))
        x = x @ state["encoder_to_decoder.weight"].T
        positions = table(len(tokens), x.shape[1])
        asked = state["mask_token"][0] + positions[~skipped]
        x = encoded(state, torch.cat([x + positions[~mask], asked]), decoder_heads, "decoder.")
        x = normed(state, "decoder.norm", x[-len(asked) :])
        told.append(x @ state["decoder.head.weight"].T + state["decoder.head.bias"])
    return torch.stack(told)


def targets(pixels, patch):
    """Normalised tubes of clips (B, 3, T, H, W) in [0, 1], (B, N, 2 p² 3), channels last."""
    clips = []
    for clip in pixels.double():
        rows = []
        _, times, height, width = clip.shape
        for t in range(0, times, 2):
            for y in range(0, height, patch):
                for x in range(0, width, patch):
                    tube = clip[:, t : t + 2, y : y + patch, x : x + patch].reshape(3, -1)
                    tube = (tube - tube.mean(1, keepdim=True)) / (tube.std(1, keepdim=True) + 1e-6)
                    rows.append(tube.T.reshape(-1))
        clips.append(torch.stack(rows))
    return torch.stack(clips)


def loss(told, wanted, hidden, left_out):
    total, count = 0.0, 0
    for number in range(len(told)):
        decoded = (~left_out[number]).nonzero().flatten().tolist()
        for place, token in enumerate(decoded):
            if hidden[number, token]:
                total += ((told[number, place] - wanted[number, token]) ** 2).mean()
                count += 1
    return total / count


def logits(state, clips, patch, heads, positions=None):
    state = {name: value.double() for name, value in state.items()}
    told = []
    for clip in clips.double():
        tokens = embedded(state, clip, patch)
        x = encoded(state, tokens + (table(*tokens.shape) if positions is None else positions), heads)
        x = normed(state, "fc_norm", x.mean(0)) if "fc_norm.weight" in state else normed(state, "norm", x)[0]
        told.append(x @ state["head.weight"].T + state["head.bias"])
    return torch.stack(told)
