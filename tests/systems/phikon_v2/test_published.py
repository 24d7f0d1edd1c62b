"""The published slide-level heads, beside their formulas written out tensor by tensor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from patchloom.errors import UsageError

WIDTH, BAGS, TILES = 12, 3, 9


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def mlp(name: str, widths: list[int]) -> dict[str, tuple[int, ...]]:
    *hidden, last = range(len(widths) - 1)
    shapes = {}
    for number in hidden:
        shapes |= linear(f"{name}.{number}.0", widths[number], widths[number + 1])
    return shapes | linear(f"{name}.{last}", widths[-2], widths[-1])


def tiles_mlp(name: str, widths: list[int], bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        shapes |= linear(f"{name}.hidden_layers.{2 * number}", inputs, outputs, bias)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def run_linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    bias = state.get(f"{name}.bias")
    return x @ state[f"{name}.weight"].double().T + (0 if bias is None else bias.double())


def run_mlp(state: dict[str, Tensor], name: str, x: Tensor, hidden: int, activation=torch.sigmoid) -> Tensor:
    for number in range(hidden):
        x = activation(run_linear(state, f"{name}.{number}.0", x))
    return run_linear(state, f"{name}.{hidden}", x)


def run_tiles(state: dict[str, Tensor], name: str, x: Tensor, hidden: int) -> Tensor:
    for number in range(hidden):
        x = torch.sigmoid(run_linear(state, f"{name}.hidden_layers.{2 * number}", x))
    return run_linear(state, f"{name}.hidden_layers.{2 * hidden}", x)


@pytest.fixture
def bags() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return three bags of 9, 5 and 7 tiles: padded with noise, their mask, and each without padding in float64."""
    x = torch.randn(BAGS, TILES, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 5, 7])
    mask = (torch.arange(TILES) >= lengths[:, None]).unsqueeze(-1)
    return x, mask, [bag[:n].double() for bag, n in zip(x, lengths.tolist(), strict=True)]


def compare(found: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden", [[], [6, 5]])
def test_meanpool(bags, hidden):
    x, mask, single = bags
    state = random_state(mlp("mlp", [WIDTH, *hidden, 3]))
    model = pl.load_reference("phikon_v2", state)
    compare(model(x, mask), [run_mlp(state, "mlp", bag.mean(0), len(hidden)) for bag in single])


@pytest.mark.parametrize(("tiles", "bias"), [([], True), ([10], False)])
def test_abmil(bags, tiles, bias):
    x, mask, single = bags
    state = random_state(
        {
            **tiles_mlp("tiles_emb", [WIDTH, *tiles, 8], bias),
            **linear("attention_layer.att", 8, 8),
            **linear("attention_layer.gate", 8, 8),
            **linear("attention_layer.w", 8, 1),
            **mlp("mlp", [8, 6, 5, 2]),
        }
    )
    model = pl.load_reference("abmil", state, temperature=0.7)
    weights, expected = [], []
    for bag in single:
        t = run_tiles(state, "tiles_emb", bag, len(tiles))
        a = torch.tanh(run_linear(state, "attention_layer.att", t))
        g = torch.sigmoid(run_linear(state, "attention_layer.gate", t))
        weights.append((run_linear(state, "attention_layer.w", a * g) / 0.7).softmax(0))
        expected.append(run_mlp(state, "mlp", (weights[-1] * t).sum(0), 2, torch.relu))
    compare(model(x, mask), expected)
    attention = model.attention(x, mask)
    torch.testing.assert_close(attention[1, :5].double(), weights[1].squeeze(1), atol=1e-5, rtol=1e-5)
    assert float(attention[1, 5:].detach().abs().max()) == 0
    sigmoid = pl.load_reference("phikon_v2", state, head="ABMIL", mlp_activation=torch.nn.Sigmoid())
    assert (sigmoid(x, mask) - model(x, mask)).abs().max() > 1e-3


@pytest.mark.parametrize(("top", "bottom"), [(2, 3), (4, 0), (0, 4), (3, 3)])
def test_chowder(bags, top, bottom):
    x, mask, single = bags
    state = random_state({**tiles_mlp("score_model", [WIDTH, 7, 2]), **mlp("mlp", [top + bottom, 6, 5, 1])})
    known = {} if top == bottom else {"n_top": top}
    model = pl.load_reference("chowder", state, **known)
    expected = []
    for bag in single:
        ordered = run_tiles(state, "score_model", bag, 1).sort(0).values
        extremes = torch.cat([ordered.flip(0)[:top], ordered[:bottom]])
        expected.append(run_mlp(state, "mlp", extremes.T, 2).squeeze(1))
    compare(model(x, mask), expected)


def test_chowder_puts_zeros_for_scores_a_small_bag_has_not(bags):
    x, mask, single = bags
    state = random_state({**tiles_mlp("score_model", [WIDTH, 1]), **mlp("mlp", [12, 1])})
    model = pl.load_reference("chowder", state, n_extreme=6)
    ordered = run_tiles(state, "score_model", single[1], 0).sort(0).values.flatten()
    extremes = torch.cat([ordered.flip(0), torch.zeros(1), ordered, torch.zeros(1)])
    with pytest.warns(UserWarning, match="fewer than 6 tiles"):
        found = model(x, mask)
    torch.testing.assert_close(found[1].double(), run_mlp(state, "mlp", extremes, 0), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="a bag of 5 tiles has no 6 extreme ones"):
        model(x[1:2, :5])


@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize("logits", ["mean", "bag", "max"])
def test_dsmil(bags, passing, logits):
    x, mask, single = bags
    state = random_state(
        {
            **tiles_mlp("tiles_scores", [WIDTH, 7, 1]),
            **tiles_mlp("tiles_values", [WIDTH, 4, 10]),
            **tiles_mlp("tiles_queries", [WIDTH, 6, 5, 3]),
            **mlp("mlp", [10 if passing else WIDTH, 6, 1]),
        }
    )
    model = pl.load_reference("dsmil", state, out_logits=logits)
    expected = []
    for bag in single:
        scores = run_tiles(state, "tiles_scores", bag, 1)
        queries = run_tiles(state, "tiles_queries", bag, 2)
        attention = (queries @ queries[scores.argmax()]).softmax(0)
        values = run_tiles(state, "tiles_values", bag, 1) if passing else bag
        pooled = run_mlp(state, "mlp", attention @ values, 1)
        both = {"mean": 0.5 * (scores.max() + pooled), "bag": pooled, "max": scores.max()[None]}
        expected.append(both[logits])
    compare(model(x, mask), expected)


def transmil_state(
    width: int, heads: int, nystrom: bool, projected: bool, groups: int = 1, second_nystrom: bool | None = None
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), **linear("head", width, 2)}
    if projected:
        shapes |= linear("proj.0", WIDTH, width)
    for norm in ("norm", "cor.norm1", "agg.norm1"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for block, approximate in (("cor", nystrom), ("agg", nystrom if second_nystrom is None else second_nystrom)):
        if approximate:
            shapes |= linear(f"{block}.attn.to_qkv", width, 3 * width, bias=False)
            shapes |= linear(f"{block}.attn.to_out.0", width, width)
            shapes[f"{block}.attn.res_conv.weight"] = (heads, 1, 5, 1)
        else:
            shapes |= linear(f"{block}.attn.qkv", width, 3 * width, bias=False)
            shapes |= linear(f"{block}.attn.proj", width, width)
    for number, side in ((1, 3), (2, 5), (3, 7)):
        name = f"pos_enc.group_conv{number}"
        shapes |= {f"{name}.weight": (width, width // groups, side, side), f"{name}.bias": (width,)}
    return random_state(shapes)


def run_exact_attention(state: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    width = x.shape[2]
    size = width // heads
    qkv = run_linear(state, f"{name}.qkv", x)
    out = torch.zeros_like(x)
    for head in range(heads):
        q, k, v = (qkv[..., part * width + head * size :][..., :size] for part in range(3))
        out[..., head * size : (head + 1) * size] = (q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v
    return run_linear(state, f"{name}.proj", out)


def run_nystrom_attention(state: dict[str, Tensor], name: str, x: Tensor, heads: int, m: int) -> Tensor:
    b, n, width = x.shape
    size, group = width // heads, math.ceil(n / m)
    padded = torch.cat([torch.zeros(b, group * m - n, width).double(), x], 1)
    q, k, v = (
        part.reshape(b, -1, heads, size).permute(0, 2, 1, 3)
        for part in run_linear(state, f"{name}.to_qkv", padded).chunk(3, -1)
    )
    q = q / math.sqrt(size)
    q_marks, k_marks = (t.reshape(b, heads, m, group, size).sum(3) / group for t in (q, k))
    first = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k_marks), -1)
    second = torch.softmax(torch.einsum("bhid,bhjd->bhij", q_marks, k_marks), -1)
    third = torch.softmax(torch.einsum("bhid,bhjd->bhij", q_marks, k), -1)
    z = second.transpose(-1, -2) / (second.abs().sum(-2).max() * second.abs().sum(-1).max())
    one = torch.eye(m).double()
    for _ in range(6):
        az = second @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    along = F.conv2d(v, state[f"{name}.res_conv.weight"].double(), padding=(2, 0), groups=heads)
    out = first @ z @ (third @ v) + along
    return run_linear(state, f"{name}.to_out.0", out.permute(0, 2, 1, 3).reshape(b, -1, width))[:, -n:]


@pytest.mark.parametrize("tiles", [9, 10])
@pytest.mark.parametrize(
    ("nystrom", "projected", "groups"), [(False, True, 1), (True, True, 1), (False, False, 1), (False, True, 8)]
)
def test_transmil(tiles, nystrom, projected, groups):
    width, heads = (8, 4) if projected else (WIDTH, 3)
    state = transmil_state(width, heads, nystrom, projected, groups)
    x = torch.randn(2, tiles, WIDTH, generator=torch.Generator().manual_seed(2))
    block = {"num_attention_heads": heads, **({"attention_type": "nystrom", "num_landmarks": 4} if nystrom else {})}
    model = pl.load_reference("transmil", state, kw_cor=block, kw_agg=block)

    plan = {"cor": (nystrom, heads), "agg": (nystrom, heads)}
    compare(model(x), run_transmil(state, x, width, plan, groups))


@pytest.mark.parametrize("nystrom", [(True, False), (False, True), (False, False)])
def test_transmil_with_two_blocks_of_different_settings(nystrom):
    state = transmil_state(8, 4, nystrom[0], True, second_nystrom=nystrom[1])
    x = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(2))
    approximate = {"attention_type": "nystrom", "num_landmarks": 4, "residual_kernel_size": 5}
    first, second = ({**approximate, "num_attention_heads": 4} if kind else None for kind in nystrom)
    plan = {"cor": (nystrom[0], 4 if nystrom[0] else 8), "agg": (nystrom[1], 4 if nystrom[1] else 2)}
    if not nystrom[1]:
        second = {"num_attention_heads": 2, "mlp_multiplier": 4}
    # None is a block of the published defaults: 8 heads, exact.
    model = pl.load_reference("transmil", state, kw_cor=first, kw_agg=second, position_encoding="PPEG")
    compare(model(x), run_transmil(state, x, 8, plan))
    kind = "original" if nystrom[1] else "nystrom"
    with pytest.raises(UsageError, match=f"attention_type={kind}, but the checkpoint's tensors say"):
        pl.load_reference("transmil", state, kw_cor=first, kw_agg={**second, "attention_type": kind})


def run_transmil(
    state: dict[str, Tensor], x: Tensor, width: int, plan: dict[str, tuple[bool, int]], groups: int = 1
) -> list[Tensor]:
    """Return the published logits; the plan says of each block whether it approximates, and how many heads it has."""

    def run_block(name: str, tokens: Tensor) -> Tensor:
        weight, bias = (state[f"{name}.norm1.{kind}"].double() for kind in ("weight", "bias"))
        normed = F.layer_norm(tokens, (width,), weight, bias, eps=1e-5)
        approximate, heads = plan[name]
        if approximate:
            return tokens + run_nystrom_attention(state, f"{name}.attn", normed, heads, 4)
        return tokens + run_exact_attention(state, f"{name}.attn", normed, heads)

    projected, tiles = "proj.0.weight" in state, x.shape[1]
    tokens = run_linear(state, "proj.0", x.double()) if projected else x.double()
    side = math.ceil(math.sqrt(tiles))
    tokens = torch.cat([tokens, tokens[:, : side**2 - tiles]], 1)
    tokens = torch.cat([state["cls_token"].double().expand(2, -1, -1), tokens], 1)
    tokens = run_block("cor", tokens)
    square = tokens[:, 1:].reshape(2, side, side, width).permute(0, 3, 1, 2)
    mixed = square.clone()
    for number, padding in ((1, 1), (2, 2), (3, 3)):
        weight, bias = (state[f"pos_enc.group_conv{number}.{kind}"].double() for kind in ("weight", "bias"))
        mixed += F.conv2d(square, weight, bias, padding=padding, groups=groups)
    tokens = torch.cat([tokens[:, :1], mixed.permute(0, 2, 3, 1).reshape(2, -1, width)], 1)
    tokens = run_block("agg", tokens)
    norm = F.layer_norm(tokens[:, 0], (width,), state["norm.weight"].double(), state["norm.bias"].double(), eps=1e-5)
    return list(run_linear(state, "head", norm))


def test_hiptmil(bags):
    x, mask, single = bags
    reference = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(192, 3, 192, 0.25, activation="relu"), 2, enable_nested_tensor=False
    )
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in reference.state_dict().items()}
    state = random_state(
        {
            **shapes,
            **linear("phi.0", WIDTH, 192),
            **linear("gat.attention_a.0", 192, 192),
            **linear("gat.attention_b.0", 192, 192),
            **linear("gat.attention_c", 192, 1),
            **linear("rho.0", 192, 192),
            **linear("classifier", 192, 2),
        }
    )
    state = {name: value / 4 for name, value in state.items()}
    model = pl.load_reference("hiptmil", state)
    reference.load_state_dict({k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("trans")})
    reference.double().eval()
    expected = []
    for bag in single:
        tiles = reference(torch.relu(run_linear(state, "phi.0", bag)))
        a = torch.tanh(run_linear(state, "gat.attention_a.0", tiles))
        g = torch.sigmoid(run_linear(state, "gat.attention_b.0", tiles))
        pooled = (run_linear(state, "gat.attention_c", a * g).softmax(0) * tiles).sum(0)
        expected.append(run_linear(state, "classifier", torch.relu(run_linear(state, "rho.0", pooled))))
    compare(model(x, mask), expected)
    torch.testing.assert_close(model.attention(x, mask).sum(1), torch.ones(BAGS), atol=1e-5, rtol=0)


def test_bags_may_carry_their_metadata_columns(bags):
    x, mask, _ = bags
    model = pl.load_reference("meanpool", random_state(mlp("mlp", [WIDTH, 1])))
    with_metadata = torch.cat([torch.full((BAGS, TILES, 3), 7.0), x], 2)
    torch.testing.assert_close(model(with_metadata, mask), model(x, mask))
    with pytest.raises(UsageError, match="the bag's features are 14 wide, the model's 12"):
        model(with_metadata[..., 1:], mask)


@pytest.mark.parametrize(
    ("system", "change", "config", "message"),
    [
        ("phikon_v2", {}, {"head": "abmil"}, "those of meanpool, not of abmil"),
        ("phikon_v2", {}, {"head": "abml"}, "did you mean abmil"),
        ("meanpool", {}, {"hiden": [3]}, "did you mean hidden"),
        ("meanpool", {}, {"hidden": [4]}, r"hidden=\[4\], but the checkpoint's tensors say \[6\]"),
        ("meanpool", {"surprise": torch.zeros(1)}, {}, "unexpected: surprise"),
        ("meanpool", {"mlp.1.bias": None}, {}, "missing: mlp.1.bias"),
        ("meanpool", {}, {"activation": "reluu"}, "did you mean relu"),
    ],
)
def test_what_does_not_fit_is_named(system, change, config, message):
    state = random_state(mlp("mlp", [WIDTH, 6, 1])) | change
    with pytest.raises(UsageError, match=message):
        pl.load_reference(system, {name: value for name, value in state.items() if value is not None}, **config)


def test_settings_go_by_their_short_names_too():
    state = random_state({**tiles_mlp("score_model", [WIDTH, 7, 1]), **mlp("mlp", [6, 5, 1])})
    short = {"model": "chowder", "tiles_mlp": [7], "mlp": (5,), "activation": "tanh", "n_top": 2, "n_bottom": 4}
    full = {"head": "chowder", "tiles_mlp_hidden": [7], "mlp_hidden": [5], "mlp_activation": torch.nn.Tanh}
    x = torch.randn(2, 8, WIDTH)
    ours, theirs = (
        pl.load_reference("phikon_v2", state, **given)(x) for given in (short, {**full, "n_top": 2, "n_bottom": 4})
    )
    torch.testing.assert_close(ours, theirs)


def test_settings_that_tensors_contradict_are_refused():
    state = random_state({**tiles_mlp("score_model", [WIDTH, 1]), **mlp("mlp", [5, 1])})
    with pytest.raises(UsageError, match="give n_top or n_bottom"):
        pl.load_reference("chowder", state)
    with pytest.raises(UsageError, match="n_top=2 and n_bottom=2, but the checkpoint's classifier takes 5"):
        pl.load_reference("chowder", state, n_top=2, n_bottom=2)
    with pytest.raises(UsageError, match="no tensor of a known head"):
        pl.load_reference("phikon_v2", {"weight": torch.zeros(1)})
