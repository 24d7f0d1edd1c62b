"""The Hyena operator against sums written out in float64, on 1, 2 and 3 axes, every parameter drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from patchloom.encoders.hyena import HyenaND
from patchloom.encoders.implicit_filters import ImplicitFilterND
from patchloom.encoders.long_convolution import direct_long_conv, fast_length, fft_long_conv
from patchloom.errors import UsageError

GRIDS = [(5,), (3, 3), (2, 4), (2, 3, 2)]
FILTERS = [
    ("joint", "exp", False),
    ("joint", "learned", True),
    ("joint", "symmetric", False),
    ("joint", "none", False),
    ("product", "exp", False),
    ("product", "learned", False),
    ("product", "none", False),
    ("explicit", "exp", False),
]


def drawn(module):
    """Return a module in float64 with every parameter and every rate of decay drawn."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
            if name.endswith("mix.weight") or "z." in name:
                value.mul_(0.5)
        for name, value in module.named_buffers():
            if name.endswith("deltas"):
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
            if "t" in name.split("."):  # thirds, too, to all digits
                value.copy_(torch.linspace(0, 1, value.shape[1], dtype=value.dtype).view(value.shape))
    return module


def places(grid):
    return list(itertools.product(*(range(side) for side in grid)))


def summed(u, k, skip, scale):
    """Return scale · Σ_{a ≤ i} k[a] u[i - a] + skip · u[i], place by place; u (C, *grid), k (C, *grid)."""
    out = torch.zeros_like(u)
    for i in places(u.shape[1:]):
        total = torch.zeros(len(u), dtype=u.dtype)
        for a in itertools.product(*(range(n + 1) for n in i)):
            total += k[(slice(None), *a)] * u[(slice(None), *(n - m for n, m in zip(i, a, strict=True)))]
        out[(slice(None), *i)] = scale * total + skip * u[(slice(None), *i)]
    return out


def network(layers, freq, x):
    for number, layer in enumerate(layers):
        x = layer.weight @ x + (0 if layer.bias is None else layer.bias)
        if number < len(layers) - 1:
            x = torch.sin(freq * x)
    return x


def filters_of(module, grid):
    """Return the filters (O - 1, C, *grid) of a module on its own grid, place by place."""
    if module.kind == "explicit":
        return module.filter
    count = (module.order - 1) * module.channels
    out = torch.zeros(count, *grid, dtype=torch.float64)
    lengths = list(dict.fromkeys(grid))
    rows = [(module.z[lengths.index(side)][0], [n / (side - 1) for n in range(side)]) for side in grid]
    learned = module.window in ("learned", "symmetric")
    for place in places(grid):
        z = [rows[axis][0][n] for axis, n in enumerate(place)]
        t = [rows[axis][1][n] for axis, n in enumerate(place)]
        if module.kind == "product":
            value = torch.ones(count, dtype=torch.float64)
            for axis, layers in enumerate(module.networks):
                h = network(layers, module.freq[0], z[axis])
                if module.window != "none":
                    h = h * (torch.exp(-t[axis] * module.deltas[axis].abs()) + (module.shift[axis] if learned else 0))
                value = value * h
        else:
            value = network(module.networks[0], module.freq[0], torch.cat(z))
            decay = None
            if module.window == "symmetric":
                decay = torch.exp(-sum(place) * module.deltas[0].abs())
            elif module.window != "none":
                decay = math.prod(torch.exp(-time * rate.abs()) for time, rate in zip(t, module.deltas, strict=True))
            if decay is not None:
                decay = decay.sqrt() if module.sqrt_decay else decay
                value = value * (decay + (module.shift[0] if learned else 0))
        out[(slice(None), *place)] = value
    return out.unflatten(0, (module.order - 1, module.channels))


def operator(module, x, grid):
    """Return the operator's output for one sample (*grid, C), by the steps of the specification."""
    dim, order, rank = module.dim, module.order, len(grid)
    projected = (x @ module.in_proj.weight.T + module.in_proj.bias).movedim(-1, 0)
    weight, bias = module.short_filter.weight, module.short_filter.bias
    copies = len(weight) // len(projected)
    smooth = torch.zeros(len(weight), *grid, dtype=torch.float64)
    for channel in range(len(weight)):
        for i in places(grid):
            total = bias[channel]
            for a in itertools.product(range(3), repeat=rank):
                at = tuple(n + m - (2 if module.causal else 1) for n, m in zip(i, a, strict=True))
                if all(0 <= n < side for n, side in zip(at, grid, strict=True)):
                    total = total + weight[(channel, 0, *a)] * projected[(channel // copies, *at)]
            smooth[(channel, *i)] = total
    kernels, scale = filters_of(module.filters, grid), 1.0
    if rank > 1:
        scale = 1 / (2 * math.prod(grid) ** (1 / rank))
    skips = module.skip.view(order - 1, dim)

    def through(parts, turned_first):
        *gates, v = parts.split(dim)
        for number, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            axes = tuple(range(1, rank + 1)) if turned_first and number == 0 else ()
            v = summed(v.flip(axes), kernels[number], skips[number], scale).flip(axes)
        return v * gates[0]

    if module.direction == "shared4":
        y = torch.cat([through(part, False) for part in smooth.chunk(copies)])
    elif module.direction in ("four_shared", "four_full"):
        corners = {1: [(), (1,)], 2: [(), (1, 2), (2,), (1,)]}.get(rank)
        corners = corners or [(), (1, 2, 3), (2, 3), (1, 3), (1, 2), (3,), (2,), (1,)]
        seen = torch.stack([through(smooth.flip(axes), False).flip(axes) for axes in corners], 1)  # (C, h, *grid)
        if module.direction == "four_shared":
            y = torch.tensordot(module.mix.weight[0], seen, ([0], [1])) + module.mix.bias
        else:
            y = (module.mix.weight @ seen.flatten(2).flatten(0, 1)).unflatten(1, grid)
            y = y + module.mix.bias.view(-1, *[1] * rank)
    else:
        y = through(smooth, module.direction == "reverse_first")
    return y.movedim(0, -1) @ module.out_proj.weight.T + module.out_proj.bias


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("convolve", [fft_long_conv, direct_long_conv])
def test_a_long_convolution_is_the_sum_over_all_places_before(grid, convolve):
    torch.manual_seed(0)
    u, k, skip = torch.randn(2, 3, *grid).double(), torch.randn(3, *grid).double(), torch.randn(3).double()
    expected = torch.stack([summed(each, k, skip, 0.3) for each in u])
    torch.testing.assert_close(convolve(u, k, skip, 0.3), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(4,), (2, 3), (2, 1, 2)])
def test_gradients_of_the_transformed_convolution_are_right(grid):
    torch.manual_seed(0)
    u, k = torch.randn(2, 2, *grid).double().requires_grad_(), torch.randn(2, *grid).double().requires_grad_()
    assert torch.autograd.gradcheck(fft_long_conv, (u, k))


def test_half_precision_is_computed_in_single_and_given_back():
    u, k = torch.randn(1, 2, 6, 6), torch.randn(2, 6, 6)
    half = fft_long_conv(u.bfloat16(), k)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, fft_long_conv(u.bfloat16().float(), k).bfloat16())


def test_transforms_have_lengths_without_large_factors():
    assert [fast_length(n) for n in (1, 11, 27, 127, 2 * 97 - 1)] == [1, 12, 27, 128, 196]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "window", "sqrt_decay"), FILTERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_filters_are_the_published_functions_of_places(kind, window, sqrt_decay, grid):
    module = drawn(ImplicitFilterND(2, grid, 3, 4, 5, kind, window, sqrt_decay))
    torch.testing.assert_close(module(), filters_of(module, grid), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["forward", "reverse_first", "shared4", "four_shared", "four_full"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_operator_in_every_direction_and_order(direction, order, grid):
    module = drawn(HyenaND(2, grid, order, 4, direction))
    x = torch.randn(1, *grid, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = operator(module, x[0], grid)
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module(x.flatten(1, -2))[0], expected.flatten(0, -2), rtol=1e-9, atol=1e-9)
    module.backend = "direct"
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "window", "sqrt_decay"), FILTERS)
def test_the_operator_with_every_filter(kind, window, sqrt_decay):
    options = {"filter_kind": kind, "window": window, "sqrt_decay": sqrt_decay}
    module = drawn(HyenaND(2, (3, 3), 3, 4, "reverse_first", **options))
    x = torch.randn(1, 3, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], operator(module, x[0], (3, 3)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_on_a_row_the_published_operator_smooths_over_the_past_alone():
    module = drawn(HyenaND(2, (5,), filter_width=4, causal=True))
    x = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], operator(module, x[0], (5,)), rtol=1e-9, atol=1e-9)
    changed = x.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(module(changed)[:, :3], module(x)[:, :3])


def test_published_names_mean_ours():
    names = {"standard": "forward", "seq": "reverse_first", "parallel": "shared4", "4dir": "four_shared"}
    for published, ours in (names | {"4dirp": "four_full"}).items():
        assert HyenaND(2, (2, 2), direction=published).direction == ours
    for published, ours in {"standard": "exp", "learn": "learned", "symettric": "symmetric", "no": "none"}.items():
        assert ImplicitFilterND(2, (2, 2), window=published).window == ours


def test_initial_values_are_the_published_ones():
    module = HyenaND(8, (4, 4), order=3, emb_dim=5)
    filters = module.filters
    n = torch.arange(4.0)
    angle = 2 * math.pi * n / 4
    expected = [n / 3, (1e-4 * angle).cos(), angle.cos(), -(1e-4 * angle).sin(), -angle.sin()]
    torch.testing.assert_close(filters.z[0][0], torch.stack(expected, 1))
    assert filters.freq.unique().tolist() == [1.0]
    torch.testing.assert_close(filters.deltas[0, [0, -1]], torch.tensor([-3.0701, -15.3506]), rtol=0, atol=1e-4)
    assert not filters.deltas.requires_grad
    assert float(module._scale()) == 1 / 8


@torch.no_grad()
@pytest.mark.parametrize(("kind", "window", "sqrt_decay"), FILTERS)
def test_filters_on_another_grid_agree_where_places_coincide(kind, window, sqrt_decay):
    """Every second place of a grid of 5 is one of a grid of 3; the scale stays that of the grid it was made for."""
    module = drawn(HyenaND(2, (3, 3), 2, 4, filter_kind=kind, window=window, sqrt_decay=sqrt_decay))
    before, scale = module.filters(), module._scale()
    torch.testing.assert_close(module.filters((5, 5))[..., ::2, ::2], before)
    x = torch.randn(1, 5, 4, 2, dtype=torch.float64)
    asked = module(x.flatten(1, 2), (5, 4))
    torch.testing.assert_close(asked, module(x).flatten(1, 2))
    module.resize((5, 5))
    assert module.grid == (5, 5)
    torch.testing.assert_close(module.filters()[..., ::2, ::2], before)
    torch.testing.assert_close(module._scale(), scale)
    rebuilt = HyenaND(2, (5, 5), 2, 4, filter_kind=kind, window=window, sqrt_decay=sqrt_decay).double()
    rebuilt.load_state_dict(module.state_dict())
    x = torch.randn(1, 25, 2, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(x), module(x))


def test_the_first_corner_sees_the_whole_grid_only_from_the_last_one():
    x = torch.randn(1, 36, 4, requires_grad=True)
    for direction, reach in (("forward", 4), ("reverse_first", 36), ("four_shared", 36), ("shared4", 4)):
        (grad,) = torch.autograd.grad(HyenaND(4, (6, 6), direction=direction, backend="direct")(x)[0, 0].sum(), x)
        assert int((grad[0].abs().amax(1) > 0).sum()) == reach, direction


def test_dropout_is_of_the_gated_product():
    torch.manual_seed(0)
    module = HyenaND(4, (3, 3), dropout=0.5)
    x, seen = torch.randn(1, 9, 4), []
    module.dropout.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    module(x)
    (before, after) = seen[0]
    kept = after != 0
    assert before.shape == (1, 4, 3, 3)
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(after[kept], 2 * before[kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order=1"),
        ({"emb_dim": 4}, "emb_dim=4"),
        ({"filter_kind": "product", "window": "symettric"}, "symmetric window"),
        ({"filter_kind": "product", "sqrt_decay": True}, "sqrt_decay"),
        ({"filter_kind": "explicit", "window": "learned"}, "no window"),
        ({"direction": "sideways"}, "reverse_first"),
        ({"window": "round"}, "symmetric"),
        ({"filter_kind": "free"}, "explicit"),
        ({"conv_scale": "none"}, "conv_scale"),
        ({"causal": True}, "rows"),
        ({"backend": "tf"}, "direct"),
    ],
)
def test_settings_that_do_not_go_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        HyenaND(4, (3, 3), **options)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    module = HyenaND(4, (3, 3))
    with pytest.raises(UsageError, match="class tokens"):
        module(torch.zeros(1, 10, 4))
    with pytest.raises(UsageError, match="do not fill"):
        module(torch.zeros(1, 12, 4), (3, 3))
    with pytest.raises(UsageError, match="axes"):
        HyenaND(4, (2, 2, 2, 2))
    with pytest.raises(UsageError, match="do not fit"):
        fft_long_conv(torch.zeros(1, 4, 3), torch.zeros(4, 3, 3))


def test_under_autocast_filters_and_transforms_keep_their_digits():
    torch.manual_seed(0)
    module, x = HyenaND(4, (4, 4)), torch.randn(1, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.filters().dtype == torch.float32
        out = module(x)
    torch.testing.assert_close(out.float(), module(x), rtol=0.1, atol=0.05)


def test_the_scale_keeps_its_digits_in_half_precision():
    module = HyenaND(4, (14, 14)).bfloat16()
    assert float(module._scale()) == pytest.approx(1 / 28, rel=1e-6)
