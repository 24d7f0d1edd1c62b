"""Published layouts of ViT-VQGAN: stage 1, discriminator and stage 2 against formulas of their own in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.systems.vit_vqgan.losses import r1_penalty

State = dict[str, Tensor]


def drawn(generator: torch.Generator, *shape: int, std: float = 0.3) -> Tensor:
    return std * torch.randn(shape, generator=generator)


# Stage 1.


def stage1(
    seed: int = 0,
    *,
    grid: tuple[int, int] = (3, 3),
    patch: int = 4,
    dim: int = 20,
    heads: int = 2,
    head_dim: int = 64,
    depth: int = 2,
    dim_dec: int = 24,
    heads_dec: int = 1,
    codes: int = 16,
    code_dim: int = 6,
) -> State:
    g = torch.Generator().manual_seed(seed)
    state: State = {}
    for side, width, count in (("encoder", dim, heads), ("decoder", dim_dec, heads_dec)):
        inner, mlp = count * head_dim, 3 * width
        for number in range(depth):
            layer = f"{side}.transformer.layers.{number}"
            for norm in (0, 1):
                state[f"{layer}.{norm}.norm.weight"] = 1 + drawn(g, width)
                state[f"{layer}.{norm}.norm.bias"] = drawn(g, width)
            state[f"{layer}.0.fn.to_qkv.weight"] = drawn(g, 3 * inner, width)
            state[f"{layer}.0.fn.to_out.weight"] = drawn(g, width, inner)
            state[f"{layer}.0.fn.to_out.bias"] = drawn(g, width)
            state[f"{layer}.1.fn.net.0.weight"], state[f"{layer}.1.fn.net.0.bias"] = drawn(g, mlp, width), drawn(g, mlp)
            state[f"{layer}.1.fn.net.2.weight"] = drawn(g, width, mlp)
            state[f"{layer}.1.fn.net.2.bias"] = drawn(g, width)
        state[f"{side}.transformer.norm.weight"] = 1 + drawn(g, width)
        state[f"{side}.transformer.norm.bias"] = drawn(g, width)
    tokens = grid[0] * grid[1]
    state["encoder.to_patch_embedding.0.weight"] = drawn(g, dim, 3, patch, patch)
    state["encoder.to_patch_embedding.0.bias"] = drawn(g, dim)
    state["encoder.en_pos_embedding"] = drawn(g, 1, tokens, dim)
    state["decoder.de_pos_embedding"] = drawn(g, 1, tokens, dim_dec)
    state["decoder.to_pixel.1.weight"] = drawn(g, dim_dec, 3, patch, patch)
    state["decoder.to_pixel.1.bias"] = drawn(g, 3)
    state["quantizer.embedding.weight"] = drawn(g, codes, code_dim, std=1.0)
    state["pre_quant.weight"], state["pre_quant.bias"] = drawn(g, code_dim, dim), drawn(g, code_dim)
    state["post_quant.weight"], state["post_quant.bias"] = drawn(g, dim_dec, code_dim), drawn(g, dim_dec)
    return state


def norm64(x: np.ndarray, state: State, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * state[f"{name}.weight"].double().numpy() + state[f"{name}.bias"].double().numpy()


def linear64(x: np.ndarray, state: State, name: str) -> np.ndarray:
    out = x @ state[f"{name}.weight"].double().numpy().T
    return out + state[f"{name}.bias"].double().numpy() if f"{name}.bias" in state else out


def softmax64(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def transformer64(x: np.ndarray, state: State, side: str, heads: int, head_dim: int) -> np.ndarray:
    number = 0
    while f"{side}.transformer.layers.{number}.0.norm.weight" in state:
        layer = f"{side}.transformer.layers.{number}"
        qkv = linear64(norm64(x, state, f"{layer}.0.norm"), state, f"{layer}.0.fn.to_qkv")
        q, k, v = np.split(qkv, 3, -1)
        out = np.empty_like(q)
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            weights = softmax64(q[..., part] @ np.swapaxes(k[..., part], 1, 2) / math.sqrt(head_dim))
            out[..., part] = weights @ v[..., part]
        x = x + (linear64(out, state, f"{layer}.0.fn.to_out") if f"{layer}.0.fn.to_out.weight" in state else out)
        hidden = np.tanh(linear64(norm64(x, state, f"{layer}.1.norm"), state, f"{layer}.1.fn.net.0"))
        x = x + linear64(hidden, state, f"{layer}.1.fn.net.2")
        number += 1
    return norm64(x, state, f"{side}.transformer.norm")


def unit64(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def stage1_64(images: Tensor, state: State, heads: int = 2, heads_dec: int = 1, head_dim: int = 64, patch: int = 4):
    pixels = images.double().numpy()
    b, _, height, width = pixels.shape
    h, w = height // patch, width // patch
    kernel = state["encoder.to_patch_embedding.0.weight"].double().numpy()
    x = np.empty((b, h * w, len(kernel)))
    for i in range(h):
        for j in range(w):
            part = pixels[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            x[:, i * w + j] = np.einsum("bcpq,dcpq->bd", part, kernel)
    x = x + state["encoder.to_patch_embedding.0.bias"].double().numpy()
    x = transformer64(x + state["encoder.en_pos_embedding"].double().numpy(), state, "encoder", heads, head_dim)
    z = linear64(x, state, "pre_quant")
    zn, codes = unit64(z), unit64(state["quantizer.embedding.weight"].double().numpy())
    ids = ((zn[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
    z_q = codes[ids]
    loss = 1.25 * ((z_q - zn) ** 2).mean()
    return ids, z_q, loss, decode64(z_q, state, (h, w), heads_dec, head_dim, patch)


def decode64(z_q: np.ndarray, state: State, grid: tuple[int, int], heads: int, head_dim: int, patch: int) -> np.ndarray:
    x = linear64(z_q, state, "post_quant") + state["decoder.de_pos_embedding"].double().numpy()
    x = transformer64(x, state, "decoder", heads, head_dim)
    kernel = state["decoder.to_pixel.1.weight"].double().numpy()
    out = np.empty((len(x), 3, grid[0] * patch, grid[1] * patch))
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = np.einsum("bd,dcpq->bcpq", x[:, i * grid[1] + j], kernel)
            out[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = part
    return out + state["decoder.to_pixel.1.bias"].double().numpy()[:, None, None]


def close(found: Tensor, expected: np.ndarray | float, atol: float = 1e-5) -> None:
    wanted = torch.as_tensor(np.asarray(expected))
    torch.testing.assert_close(
        found.detach().double(), wanted, rtol=1e-5, atol=atol * max(1, float(wanted.abs().max()))
    )


@pytest.mark.parametrize(("grid", "size"), [((3, 3), None), ((2, 4), (8, 16))])
def test_stage_1_is_that_of_the_formulas(grid, size):
    state = stage1(grid=grid)
    model = pl.load_reference("vit_vqgan", state, **({} if size is None else {"image_size": size}))
    images = torch.rand(2, 3, grid[0] * 4, grid[1] * 4)
    ids, z_q, loss, decoded = stage1_64(images, state)
    out = model(images)
    assert np.array_equal(out.ids.numpy(), ids)
    close(out.z_q, z_q)
    close(out.loss, loss)
    close(out.images, decoded)
    close(model.decode_ids(torch.as_tensor(ids)), decoded)
    assert torch.equal(model.encode_ids(images), out.ids)


def test_a_single_head_as_wide_as_the_tokens_has_no_projection():
    state = stage1(dim=20, heads=1, head_dim=20, dim_dec=20)
    state = {name: value for name, value in state.items() if "to_out" not in name}
    model = pl.load_reference("vit_vqgan", state, encoder={"heads": 1, "dim_head": 20}, decoder={"heads": 1})
    images = torch.rand(1, 3, 12, 12)
    close(model(images).images, stage1_64(images, state, 1, 1, 20)[3])


def test_residual_codes_are_those_of_the_formulas():
    state = stage1()
    config = {"quantizer": {"use_residual": True, "num_quantizers": 3, "beta": 0.5}}
    model = pl.load_reference("vit_vqgan", state, **config)
    images = torch.rand(2, 3, 12, 12)
    z = model.latents(images).detach().double().numpy()
    codes = unit64(state["quantizer.embedding.weight"].double().numpy())
    rest, total, losses, levels = z.copy(), np.zeros_like(z), [], []
    for _ in range(3):
        unit = unit64(rest)
        ids = ((unit[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
        rest, total = rest - codes[ids], total + codes[ids]
        losses.append(1.5 * ((codes[ids] - unit) ** 2).mean())
        levels.append(ids)
    out = model.encode(images)
    assert np.array_equal(out.ids.numpy(), np.stack(levels, -1))
    close(out.z_q, total)
    close(out.loss, np.mean(losses))
    close(model.quantizer.lookup(out.ids), total)
    close(model.decode_ids(out.ids), decode64(total, state, (3, 3), 1, 64, 4))


def test_vectors_may_be_compared_as_they_are():
    state = stage1()
    model = pl.load_reference("vit_vqgan", state, quantizer={"use_norm": False})
    images = torch.rand(2, 3, 12, 12)
    z = model.latents(images).detach().double().numpy()
    codes = state["quantizer.embedding.weight"].double().numpy()
    ids = ((z[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
    assert np.array_equal(model.encode_ids(images).numpy(), ids)
    close(model.quantizer.lookup(torch.as_tensor(ids)), codes[ids])


def test_losses_of_training_are_left_out_of_a_checkpoint_and_nothing_else():
    state = stage1()
    more = {
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
        "loss.discriminator.blocks.0.0.weight": torch.ones(1),
    }
    pl.load_reference("vit_vqgan", {"state_dict": state | more})
    with pytest.raises(UsageError, match=r"unexpected: encoder\.extra"):
        pl.load_reference("vit_vqgan", {**state, "encoder.extra": torch.ones(1)})
    del state["encoder.transformer.layers.1.0.fn.to_out.weight"]
    with pytest.raises(UsageError, match=r"missing: encoder\.transformer\.layers\.1\.0\.fn\.to_out\.weight"):
        pl.load_reference("vit_vqgan", state)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"grid": (2, 4)}, {}, r"8 positions are of no square grid; give image_size"),
        ({}, {"image_size": 32}, "image_size=32 has 8x8 patches, and there are 9"),
        ({"head_dim": 50}, {}, "give heads"),
        ({}, {"heads": 5}, "heads=5 of the encoder contradict"),
        ({}, {"encoder": {"depth": 3}}, "depth"),
        ({}, {"n_embed": 99}, "n_embed|num_codes"),
        ({}, {"no_such_setting": 1}, "no_such_setting"),
        ({}, {"part": "wheels"}, "part is 'wheels'"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(change, config, message):
    with pytest.raises(UsageError, match=message):
        pl.load_reference("vit_vqgan", stage1(**change), **config)


# The discriminator.


def critic(seed: int = 0, channels: tuple[int, ...] = (5, 6, 7), prefix: str = "") -> State:
    g = torch.Generator().manual_seed(seed)
    state = {"blocks.0.0.weight": drawn(g, channels[0], 3, 1, 1, std=1.0), "blocks.0.1.bias": drawn(g, channels[0])}
    taps = torch.tensor([1.0, 3, 3, 1])
    kernel = torch.outer(taps, taps) / 64
    for number, (into, out) in enumerate(pairwise(channels), 1):
        block = f"blocks.{number}"
        state[f"{block}.conv1.0.weight"] = drawn(g, into, into, 3, 3, std=1.0)
        state[f"{block}.conv1.1.bias"] = drawn(g, into)
        state[f"{block}.conv2.0.kernel"] = state[f"{block}.skip.0.kernel"] = kernel
        state[f"{block}.conv2.1.weight"] = drawn(g, out, into, 3, 3, std=1.0)
        state[f"{block}.conv2.2.bias"] = drawn(g, out)
        state[f"{block}.skip.1.weight"] = drawn(g, out, into, 1, 1, std=1.0)
    last = channels[-1]
    state["final_conv.0.weight"] = drawn(g, last, last + 1, 3, 3, std=1.0)
    state["final_conv.1.bias"] = drawn(g, last)
    state["final_linear.0.weight"] = drawn(g, last, last * 16, std=1.0)
    state["final_linear.0.bias"] = drawn(g, last)
    state["final_linear.1.weight"] = drawn(g, 1, last, std=1.0)
    state["final_linear.1.bias"] = drawn(g, 1)
    return {prefix + name: value for name, value in state.items()}


def conv64(x: np.ndarray, weight: Tensor, stride: int, pad: int) -> np.ndarray:
    kernel = weight.double().numpy() / math.sqrt(weight[0].numel())
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    size, side = kernel.shape[-1], (x.shape[-1] - kernel.shape[-1]) // stride + 1
    out = np.empty((len(x), len(kernel), side, side))
    for i in range(side):
        for j in range(side):
            part = x[:, :, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, :, i, j] = np.einsum("bcpq,dcpq->bd", part, kernel)
    return out


def leaky64(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def blur64(x: np.ndarray, pad: int) -> np.ndarray:
    taps = np.array([1.0, 3, 3, 1]) / 8
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows = sum(t * x[..., i : x.shape[-2] - 3 + i, :] for i, t in enumerate(taps))
    return sum(t * rows[..., i : rows.shape[-1] - 3 + i] for i, t in enumerate(taps))


def critic64(images: Tensor, state: State) -> np.ndarray:
    def bias(name: str) -> np.ndarray:
        return state[name].double().numpy()[:, None, None]

    x = leaky64(conv64(images.double().numpy(), state["blocks.0.0.weight"], 1, 0) + bias("blocks.0.1.bias"))
    number = 1
    while f"blocks.{number}.conv1.0.weight" in state:
        block = f"blocks.{number}"
        out = leaky64(conv64(x, state[f"{block}.conv1.0.weight"], 1, 1) + bias(f"{block}.conv1.1.bias"))
        out = leaky64(conv64(blur64(out, 2), state[f"{block}.conv2.1.weight"], 2, 0) + bias(f"{block}.conv2.2.bias"))
        x = (out + conv64(blur64(x, 1), state[f"{block}.skip.1.weight"], 2, 0)) / math.sqrt(2)
        number += 1
    batch = len(x)
    group = batch // (batch // min(batch, 4))
    sets = x.reshape(group, batch // group, *x.shape[1:])
    spread = np.sqrt(sets.var(0) + 1e-8).mean((1, 2, 3))
    plane = np.tile(spread, group)[:, None, None, None] * np.ones((1, 1, *x.shape[2:]))
    x = leaky64(conv64(np.concatenate([x, plane], 1), state["final_conv.0.weight"], 1, 1) + bias("final_conv.1.bias"))
    first, second = (state[f"final_linear.{n}.weight"].double().numpy() for n in (0, 1))
    x = x.reshape(batch, -1) @ first.T / math.sqrt(first.shape[1])
    x = leaky64(x + state["final_linear.0.bias"].double().numpy())
    return (x @ second.T / math.sqrt(second.shape[1]) + state["final_linear.1.bias"].double().numpy())[:, 0]


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_the_discriminator_is_that_of_the_formulas(batch):
    state = critic()
    model = pl.load_reference("vit_vqgan", state)
    images = torch.rand(batch, 3, 16, 16)
    close(model(images), critic64(images, state))


def test_the_discriminator_of_a_whole_checkpoint_is_found_by_its_part():
    state = stage1() | critic(prefix="loss.discriminator.")
    model = pl.load_reference("vit_vqgan", state, part="discriminator")
    images = torch.rand(4, 3, 16, 16)
    close(model(images), critic64(images, critic()))


def test_the_penalty_is_the_squared_length_of_the_gradient():
    state = critic(channels=(3, 4))
    model = pl.load_reference("vit_vqgan", state).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    penalty = r1_penalty(model, images)
    step, total = 1e-6, 0.0
    flat = images.flatten()
    with torch.no_grad():
        for place in range(len(flat)):
            moved = [flat.clone(), flat.clone()]
            moved[0][place] += step
            moved[1][place] -= step
            up, down = (model(one.view_as(images)).sum() for one in moved)
            total += float((up - down) / (2 * step)) ** 2
    assert penalty.item() == pytest.approx(total / 2, rel=1e-4)
    penalty.backward()
    assert model.stem.weight.grad.abs().sum() > 0


def test_a_batch_that_groups_do_not_divide_is_refused():
    with pytest.raises(UsageError, match="a batch of 9 does not divide"):
        pl.load_reference("vit_vqgan", critic())(torch.rand(9, 3, 16, 16))


def test_another_blur_is_refused():
    state = critic()
    state["blocks.1.skip.0.kernel"] = torch.ones(4, 4)
    with pytest.raises(UsageError, match=r"blocks\.1\.skip\.0\.kernel is another blur"):
        pl.load_reference("vit_vqgan", state)


# Stage 2.


def gpt(
    seed: int = 0, *, dim: int = 24, depth: int = 3, vocab: int = 16, classes: int = 5, tokens: int = 9, cond: int = 1
) -> State:
    g = torch.Generator().manual_seed(seed)
    state: State = {
        "tok_emb_cond.weight": drawn(g, classes, dim),
        "tok_emb_code.weight": drawn(g, vocab, dim),
        "pos_emb_cond": drawn(g, 1, cond, dim),
        "pos_emb_code": drawn(g, 1, tokens, dim),
        "layer_norm.weight": 1 + drawn(g, dim),
        "layer_norm.bias": drawn(g, dim),
        "head.weight": drawn(g, vocab, dim),
    }
    for number in range(depth):
        block = f"blocks.{number}"
        for norm in ("ln1", "ln2"):
            state[f"{block}.{norm}.weight"], state[f"{block}.{norm}.bias"] = 1 + drawn(g, dim), drawn(g, dim)
        for part in ("query", "key", "value", "proj"):
            state[f"{block}.attn.{part}.weight"], state[f"{block}.attn.{part}.bias"] = drawn(g, dim, dim), drawn(g, dim)
        state[f"{block}.attn.time_mix"] = torch.rand(1, 1, dim, generator=g)
        state[f"{block}.mlp.p0.weight"], state[f"{block}.mlp.p0.bias"] = drawn(g, 4 * dim, dim), drawn(g, 4 * dim)
        state[f"{block}.mlp.p1.weight"], state[f"{block}.mlp.p1.bias"] = drawn(g, dim, 4 * dim), drawn(g, dim)
    return {f"transformer.{name}": value for name, value in state.items()}


def gpt64(ids: Tensor, cond: Tensor, published: State, heads: int = 4):
    state = {name.removeprefix("transformer."): value for name, value in published.items()}
    weight = {name: value.double().numpy() for name, value in state.items()}
    first = weight["tok_emb_cond.weight"][cond.numpy()] + weight["pos_emb_cond"]
    codes = weight["tok_emb_code.weight"][ids.numpy()] + weight["pos_emb_code"][:, : ids.shape[1]]
    x = np.concatenate([first, codes], 1)
    count, length, dim = cond.shape[1], x.shape[1], x.shape[2]
    sees = np.tril(np.ones((length, length), bool))
    sees[:count, :count] = True
    hidden = []
    number = 0
    while f"blocks.{number}.ln1.weight" in state:
        block = f"blocks.{number}"
        y = norm64(x, state, f"{block}.ln1")
        mix = weight[f"{block}.attn.time_mix"]
        y = y * mix + np.concatenate([np.zeros_like(y[:, :1]), y[:, :-1]], 1) * (1 - mix)
        q, k, v = (linear64(y, state, f"{block}.attn.{part}") for part in ("query", "key", "value"))
        out, size = np.empty_like(q), dim // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ np.swapaxes(k[..., part], 1, 2) / math.sqrt(size)
            out[..., part] = softmax64(np.where(sees, scores, -np.inf)) @ v[..., part]
        x = x + linear64(out, state, f"{block}.attn.proj")
        y = np.maximum(linear64(norm64(x, state, f"{block}.ln2"), state, f"{block}.mlp.p0"), 0) ** 2
        x = x + linear64(y, state, f"{block}.mlp.p1")
        hidden.append(x[:, count:])
        number += 1
    return hidden, norm64(x, state, "layer_norm")[:, count - 1 : -1] @ weight["head.weight"].T


@pytest.mark.parametrize("cond", [1, 3])
def test_stage_2_is_that_of_the_formulas_block_by_block(cond):
    state = gpt(cond=cond)
    model = pl.load_reference("vit_vqgan", state, n_heads=4)
    ids, conds = torch.randint(16, (2, 9)), torch.randint(5, (2, cond))
    hidden, logits = gpt64(ids, conds, state)
    close(model(ids, conds), logits)
    found = model.features(ids, conds)
    for number, expected in enumerate(hidden, 1):
        close(found[number], expected)


def test_stage_2_leaves_the_other_models_of_its_file_out():
    inner = {f"stage1_model.{name}": value for name, value in stage1().items()}
    state = gpt() | inner | {"cond_model.weight": torch.ones(1)}
    config = {"transformer": {"n_heads": 4, "n_layers": 3, "vocab_img_size": 16}}
    model = pl.load_reference("vit_vqgan", state, **config)
    assert type(model).__name__ == "ImageGPT"
    images = torch.rand(1, 3, 12, 12)
    tokenizer = pl.load_reference("vit_vqgan", state, part="tokenizer")
    assert torch.equal(tokenizer.encode_ids(images), pl.load_reference("vit_vqgan", stage1()).encode_ids(images))


def test_what_is_sampled_with_the_cache_is_what_the_whole_says():
    model = pl.load_reference("vit_vqgan", gpt(), n_heads=4)
    cond = torch.tensor([[0], [4], [2]])
    one, two = (
        model.generate(cond, generator=torch.Generator().manual_seed(1), use_cache=cached) for cached in (True, False)
    )
    assert torch.equal(one, two)


def test_no_part_of_a_vit_vqgan_is_named():
    with pytest.raises(UsageError, match="no ViT-VQGAN"):
        pl.load_reference("vit_vqgan", {"weight": torch.ones(2)})


def test_positions_computed_are_those_of_the_formula():
    from patchloom.systems.vit_vqgan.model import sincos_positions

    table = sincos_positions(8, (2, 3))[0]
    omega = [1.0, 10000**-0.5]
    for row in range(2):
        for column in range(3):
            angles = [[place * w for w in omega] for place in (column, row)]
            expected = [f(a) for angle in angles for f in (math.sin, math.cos) for a in angle]
            torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected), rtol=0, atol=1e-6)
