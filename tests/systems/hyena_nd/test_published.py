"""Published checkpoints of Hyena N-D against the published forward pass, written out by the names of its tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import patchloom as pl
from patchloom.encoders.hyena import HyenaND
from patchloom.errors import UsageError

DIRECTIONS = ["standard", "seq", "parallel", "4dir", "4dirp"]
FILTERS = [
    *(("joint", window, root) for window in ("standard", "learn", "symettric", "no") for root in (False, True)),
    *(("product", window, False) for window in ("standard", "learn", "no")),
    ("explicit", "standard", False),
]
WIDTH, SIDE, CLASSES, PATCH = 6, 4, 3, 2


def operator_shapes(direction="standard", kind="joint", window="standard", order=2, width=5, emb_dim=3, rank=2):
    """Return the shapes of an operator's tensors, as section 4 of the specification lists them."""
    inner, filters, places = (order + 1) * WIDTH, (order - 1) * WIDTH, SIDE**2 if rank == 1 else SIDE
    copies = 4 if direction == "parallel" else 1
    shapes = {
        "in_proj.weight": (inner, WIDTH),
        "in_proj.bias": (inner,),
        "out_proj.weight": (WIDTH, copies * WIDTH),
        "out_proj.bias": (WIDTH,),
        "short_filter.weight": (copies * inner, 1, *[3] * rank),
        "short_filter.bias": (copies * inner,),
    }
    if direction in ("4dir", "4dirp"):
        out = 1 if direction == "4dir" else WIDTH
        shapes |= {"linear_mix.weight": (out, 4 * out), "linear_mix.bias": (out,)}
    if kind == "explicit":
        return shapes | {"filter": (order, WIDTH, SIDE, SIDE), "bias": (order, WIDTH)}
    shapes |= {
        "filter_fn.bias": (filters,),
        "filter_fn.pos_emb.z": (1, places, emb_dim),
        "filter_fn.pos_emb.t": (1, places, 1),
    }
    axes = ("X", "Y") if kind == "product" else ("",)
    for axis in axes:
        network = f"filter_fn.{axis}implicit_filter"
        features = emb_dim if kind == "product" or rank == 1 else 2 * emb_dim
        for layer in (0, 2, 4):
            shapes[f"{network}.{layer}.weight"] = (width, width if layer else features)
            shapes[f"{network}.{layer}.bias"] = (width,)
            shapes[f"{network}.{layer + 1}.freq"] = (1, width)
        shapes[f"{network}.6.weight"] = (filters, width)
        rates = ("deltas",) if kind == "product" or window == "symettric" or rank == 1 else ("Xdeltas", "Ydeltas")
        if window != "no":
            rates += ("shift",) if window in ("learn", "symettric") else ()
            shapes |= {f"filter_fn.{axis}modulation.{name}": (1, 1, filters) for name in rates}
    return shapes


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.7 for name, shape in shapes.items()}
    for name in state:  # one module in many places
        if name.endswith(".freq"):
            owner = name.split("filter_fn.")[0]
            state[name] = next(value for other, value in state.items() if other.startswith(owner) and "freq" in other)
    return state


def vit_shapes(blocks):
    """Return the shapes of a ViT's tensors, its operators' given (None: attention)."""
    shapes = {
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "pos_embed": (1, SIDE**2, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH),
        "head.bias": (CLASSES,),
    }
    attention = {"qkv.weight": (18, 6), "qkv.bias": (18,), "proj.weight": (6, 6), "proj.bias": (6,)}
    for number, own in enumerate(blocks):
        parts = {f"attn.{name}": shape for name, shape in (own or attention).items()}
        parts |= {f"norm{n}.{part}": (WIDTH,) for n in (1, 2) for part in ("weight", "bias")}
        parts |= {"mlp.fc1.weight": (24, 6), "mlp.fc1.bias": (24,), "mlp.fc2.weight": (6, 24), "mlp.fc2.bias": (6,)}
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in parts.items()}
    return shapes


def network(state, name, z):
    for layer in (0, 2, 4):
        z = F.linear(z, state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"])
        z = torch.sin(state[f"{name}.{layer + 1}.freq"] * z)
    return F.linear(z, state[f"{name}.6.weight"])


def filters(state, order, window, root):
    if "filter" in state:
        return state["filter"], state["bias"]
    z, t = state["filter_fn.pos_emb.z"], state["filter_fn.pos_emb.t"]
    side = z.shape[1]
    modulation = {n.removeprefix("filter_fn."): v for n, v in state.items() if "modulation" in n}
    if "filter_fn.Ximplicit_filter.0.weight" in state:
        per_axis = []
        for axis in "XY":
            h = network(state, f"filter_fn.{axis}implicit_filter", z)
            if window != "no":
                decay = torch.exp(-t * modulation[f"{axis}modulation.deltas"].abs())
                h = h * (decay + modulation.get(f"{axis}modulation.shift", 0.0))
            per_axis.append(h)
        k = torch.einsum("ijk,imk->ijmk", *per_axis)[0]
    else:
        rows, columns = z[0][:, None].expand(side, side, -1), z[0][None].expand(side, side, -1)
        k = network(state, "filter_fn.implicit_filter", torch.cat([rows, columns], -1))
        if window == "symettric":
            number = torch.arange(side)
            powers = (number[:, None] + number[None])[..., None]
            decay = torch.exp(-powers * modulation["modulation.deltas"][0].abs())
        elif window != "no":
            each = [torch.exp(-t * modulation[f"modulation.{axis}deltas"].abs())[0] for axis in "XY"]
            decay = each[0][:, None] * each[1][None]
        if window != "no":
            decay = decay**0.5 if root else decay
            k = k * (decay + modulation.get("modulation.shift", torch.zeros(1))[0])
    return k.permute(2, 0, 1).unflatten(0, (order - 1, -1)), state["filter_fn.bias"].unflatten(0, (order - 1, -1))


def convolved(u, k, skip):
    length = 2 * u.shape[-1]
    spectrum = torch.fft.rfft2(k, s=(length, length)) / length * torch.fft.rfft2(u, s=(length, length))
    out = torch.fft.irfft2(spectrum, s=(length, length))[..., : length // 2, : length // 2]
    return out + u * skip[:, None, None]


def operator(state, x, direction="standard", order=2, window="standard", root=False):
    """Return (B, L, L, C) of (B, L, L, C), by the steps of the specification."""
    batch = len(x)
    u = F.linear(x, state["in_proj.weight"], state["in_proj.bias"]).permute(0, 3, 1, 2)
    u = F.conv2d(u, state["short_filter.weight"], state["short_filter.bias"], padding=1, groups=u.shape[1])
    if direction == "parallel":
        u = u.unflatten(1, (4, -1)).flatten(0, 1)
    *gates, v = u.split(WIDTH, 1)

    def around(v):
        return torch.cat([v, v.flip(-1, -2), v.flip(-1), v.flip(-2)]) if direction in ("4dir", "4dirp") else v

    k, skip = filters(state, order, window, root)
    v = around(v)
    for number, gate in enumerate(reversed(gates[1:])):
        v = v * around(gate)
        turned = (-1, -2) if direction == "seq" and number == 0 else ()
        v = convolved(v.flip(turned), k[number], skip[number]).flip(turned)
    y = (v * around(gates[0])).permute(0, 2, 3, 1)
    if direction == "parallel":
        y = y.unflatten(0, (batch, 4)).permute(0, 2, 3, 1, 4).flatten(3)
    if direction in ("4dir", "4dirp"):
        parts = y.chunk(4)
        y = torch.stack([parts[0], parts[1].flip(1, 2), parts[2].flip(2), parts[3].flip(1)], -1)
        y = y if direction == "4dir" else y.flatten(-2)
        y = F.linear(y, state["linear_mix.weight"], state["linear_mix.bias"])
        y = y.squeeze(-1) if direction == "4dir" else y
    return F.linear(y, state["out_proj.weight"], state["out_proj.bias"])


def row_operator(state, x):
    """Return (B, L, C) of (B, L, C): the published operator of one axis."""
    u, length = F.linear(x, state["in_proj.weight"], state["in_proj.bias"]).transpose(1, 2), x.shape[1]
    u = F.conv1d(u, state["short_filter.weight"], state["short_filter.bias"], padding=2, groups=u.shape[1])
    gate0, gate1, v = u[..., :length].split(WIDTH, 1)
    h = network(state, "filter_fn.implicit_filter", state["filter_fn.pos_emb.z"])
    if "filter_fn.modulation.deltas" in state:
        h = h * torch.exp(-state["filter_fn.pos_emb.t"] * state["filter_fn.modulation.deltas"].abs())
    k, v = h[0].T, v * gate1
    out = torch.fft.irfft(torch.fft.rfft(k, n=2 * length) * torch.fft.rfft(v, n=2 * length))[..., :length]
    y = (out + v * state["filter_fn.bias"][:, None]) * gate0
    return F.linear(y.transpose(1, 2), state["out_proj.weight"], state["out_proj.bias"])


def vit(state, images, heads, direction="standard", row=False, **options):
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]

    def normed(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for number in itertools.count():
        prefix = f"blocks.{number}."
        own = {n.removeprefix(f"{prefix}attn."): v for n, v in state.items() if n.startswith(f"{prefix}attn.")}
        if not own:
            break
        z = normed(x, f"{prefix}norm1")
        if "qkv.weight" in own:
            q, k, v = (
                F.linear(z, own["qkv.weight"], own["qkv.bias"]).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            )
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            mixed = F.linear((weights @ v).transpose(1, 2).flatten(2), own["proj.weight"], own["proj.bias"])
        elif row:
            mixed = row_operator(own, z)
        else:
            way = "standard" if direction == "seq" and number % 2 else direction
            mixed = operator(own, z.unflatten(1, (SIDE, SIDE)), way, **options).flatten(1, 2)
        x = x + mixed
        z = normed(x, f"{prefix}norm2")
        z = F.gelu(F.linear(z, state[f"{prefix}mlp.fc1.weight"], state[f"{prefix}mlp.fc1.bias"]))
        x = x + F.linear(z, state[f"{prefix}mlp.fc2.weight"], state[f"{prefix}mlp.fc2.bias"])
    return F.linear(normed(x, "norm")[:, 0], state["head.weight"], state["head.bias"])


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("kind", "window", "root"), FILTERS)
@pytest.mark.parametrize("order", [2, 3])
def test_the_operator_of_every_mode(direction, kind, window, root, order):
    state = drawn(operator_shapes(direction, kind, window, order))
    module = pl.load_reference("hyena_nd", state, direction=direction, hyena2d_sqrt_decay=root)
    assert isinstance(module, HyenaND)
    x = torch.randn(2, SIDE, SIDE, WIDTH)
    close(module(x), operator(state, x, direction, order, window, root))


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("hyena2d", "hhhh"),
        ("hyena2dattn", "hhha"),
        ("attnhyena2d", "aaah"),
        ("onebyone", "haha"),
        ("attention", "aaaa"),
    ],
)
@pytest.mark.parametrize("direction", ["seq", "parallel"])
def test_the_vit_of_every_mixer(method, own, direction):
    state = drawn(vit_shapes([operator_shapes(direction, window="learn") if each == "h" else None for each in own]))
    config = {"method": method, "directional_mode": direction, "hyena_order": 2, "hyena_filter_order": 5}
    config |= {"num_heads": 2, "hyena2d_filter": True, "window_mode": "learn", "lr": 1e-3, "use_cls_token": False}
    if method == "attention":
        config = {name: value for name, value in config.items() if "hyena_" not in name}
    model = pl.load_reference("hyena_nd", {"model": state, "optimizer": {}}, **config)
    images = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)
    close(model(images), vit(state, images, 2, direction, window="learn"))


@torch.no_grad()
def test_the_vit_over_rows_of_tokens():
    state = drawn(vit_shapes([operator_shapes(rank=1)] * 2))
    model = pl.load_reference("hyena_nd", state, method="hyena")
    images = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)
    close(model(images), vit(state, images, 1, row=True))


@torch.no_grad()
def test_our_own_pooling_on_request():
    state = drawn(vit_shapes([operator_shapes()] * 2))
    model = pl.load_reference("hyena_nd", state, mixer="hyena", direction="seq", pool="avg")
    images = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)
    close(model(images), model.head(model.forward_features(images).mean(1)))


@torch.no_grad()
def test_without_the_published_scale_on_request():
    state = drawn(operator_shapes())
    x = torch.randn(1, SIDE, SIDE, WIDTH)
    modules = [
        pl.load_reference("hyena_nd", state, direction="seq", conv_scale=s) for s in (1 / (2 * SIDE), "official")
    ]
    close(modules[0](x), modules[1](x))


GOOD = {"mixer": "hyena", "direction": "seq"}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, {"direction": "seq"}, "give mixer"),
        ({}, {"mixer": "hyena"}, "direction=seq"),
        ({}, GOOD | {"mixer": "hyena2dattn", "hyena_order": 2}, "blocks are hyena, hyena, hyena, hyena"),
        ({}, GOOD | {"mixer": "attentionec"}, "convolutional stem"),
        ({}, GOOD | {"mixer": "hyena3d"}, "hyena2d"),
        ({}, GOOD | {"direction": "4dir"}, "forward or reverse_first"),
        ({}, GOOD | {"order": 3}, "order=3"),
        ({}, GOOD | {"window": "learn"}, "window"),
        ({}, GOOD | {"hyena2d_filter": False}, "hyena2d_filter"),
        ({}, GOOD | {"use_cls_token": True}, "use_cls_token"),
        ({}, GOOD | {"kernel": 3}, "unknown setting"),
        ({"cls_token": torch.zeros(1, 1, WIDTH)}, GOOD, "class token"),
        ({"pos_embed": torch.zeros(1, 15, WIDTH)}, GOOD, "no square"),
        ({"blocks.1.attn.filter_fn.pos_emb.z": None}, GOOD, r"missing: blocks\.1\.attn\.filter_fn\.pos_emb\.z"),
        (
            {"blocks.1.attn.filter_fn.modulation.Ydeltas": None},
            GOOD,
            r"blocks\.1\.attn\.filter_fn\.modulation\.Ydeltas",
        ),
        ({"blocks.0.attn.filter_fn.implicit_filter.3.freq": torch.ones(1, 5)}, GOOD, "one tensor"),
        ({"blocks.2.mlp.fc3.weight": torch.zeros(1)}, GOOD, r"unexpected: blocks\.2\.mlp\.fc3\.weight"),
        ({"head.bias": None}, GOOD, "missing: head.bias"),
    ],
)
def test_what_does_not_fit_is_named(change, config, message):
    state = drawn(vit_shapes([operator_shapes()] * 4)) | change
    with pytest.raises(UsageError, match=message):
        pl.load_reference("hyena_nd", {name: value for name, value in state.items() if value is not None}, **config)
