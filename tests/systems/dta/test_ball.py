"""Attacked images stay within ε and on the grid of 8 bits; steps are what the papers say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.errors import UsageError
from patchloom.systems.dta.ball import (
    Steps,
    check_ball,
    check_images,
    descend,
    descend_tanh,
    diverse,
    gaussian_kernel,
    inside,
    quantised,
    smoothed,
    uniform_noise,
)

EDGE = 1e-6


def images(seed: int = 0, size: int = 5, batch: int = 2, on_grid: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if on_grid:
        return torch.randint(0, 256, (batch, 3, size, size), generator=generator) / 255
    return torch.rand(batch, 3, size, size, generator=generator)


def wave(x: torch.Tensor) -> torch.Tensor:
    return (x * 37).sin().sum((1, 2, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.002, 0.6),
    st.floats(0.001, 0.9),
    st.sampled_from(["plain", "momentum", "diversity", "smoothing", "tanh"]),
    st.booleans(),
)
def test_every_attack_stays_inside_the_ball_and_on_the_grid(seed, eps, step_size, how, on_grid):
    x = images(seed, on_grid=on_grid)
    generator = torch.Generator().manual_seed(seed)
    start = uniform_noise(x, 2 * eps, generator)
    if how == "tanh":
        found = descend_tanh(x, wave, eps=eps, lr=1.0, steps=2, init=start)
    else:
        ways = {"momentum": Steps(momentum=1.0), "diversity": Steps(diversity=1.0), "smoothing": Steps(smoothing=True)}
        found = descend(
            x, wave, eps=eps, step_size=step_size, steps=2, init=start, how=ways.get(how, Steps()), generator=generator
        )
    assert (found - x).abs().max() <= eps + EDGE
    assert found.min() >= 0
    assert found.max() <= 1
    stored = quantised(found, x, eps)
    levels = (stored.double() * 255).round()
    assert torch.equal((levels / 255).float(), stored)
    if on_grid:
        assert (stored - x).abs().max() <= eps + EDGE
        # Never further from the clean image than before, and not a whole level nearer to it.
        assert ((stored - x).abs() <= (found - x).abs() + EDGE).all()
        assert ((stored - found).abs() < 1 / 255 + EDGE).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 32))
def test_what_is_on_the_grid_already_is_stored_as_it_is(seed, levels):
    x = images(seed)
    shift = torch.randint(-levels, levels + 1, x.shape, generator=torch.Generator().manual_seed(seed + 1))
    attacked = ((x * 255).round() + shift).clamp(0, 255) / 255
    assert torch.equal(quantised(attacked, x, levels / 255), attacked)


def test_of_clean_values_off_the_grid_rounding_keeps_to_the_ball_where_a_level_is_in_it():
    x = torch.full((1, 1, 1, 3), 0.5 + 0.3 / 255)
    attacked = x + torch.tensor([0.9, -0.9, 0.1]) / 255
    stored = quantised(attacked, x, 0.9 / 255)
    assert ((stored - x).abs() <= 0.9 / 255 + EDGE).all()
    nothing_near = quantised(attacked, x, 0.1 / 255)
    assert torch.equal(nothing_near, (x * 255).round() / 255)


def test_steps_written_out():
    x = images(3).double()
    start = uniform_noise(x, 8 / 255, torch.Generator().manual_seed(1))
    expected = (x + start).clamp(0, 1)
    for _ in range(4):
        g = 37 * (37 * expected).cos()
        expected = expected - 2 / 255 * g.sign()
        expected = torch.max(torch.min(expected, x + 8 / 255), x - 8 / 255).clamp(0, 1)
    assert torch.equal(descend(x, wave, eps=8 / 255, step_size=2 / 255, steps=4, init=start), expected)


def test_momentum_is_of_gradients_over_their_mean_size():
    x = images(4).double()
    expected, pace = x, torch.zeros_like(x)
    for _ in range(3):
        g = 37 * (37 * expected).cos()
        pace = 0.9 * pace + g / g.abs().mean((1, 2, 3), keepdim=True)
        expected = (expected - 0.01 * pace.sign()).clamp(x - 0.02, x + 0.02).clamp(0, 1)
    found = descend(x, wave, eps=0.02, step_size=0.01, steps=3, how=Steps(momentum=0.9))
    assert torch.allclose(found, expected, atol=1e-12)


def test_no_gradient_is_no_step():
    x = images()
    assert torch.equal(descend(x, lambda y: 0 * y.sum((1, 2, 3)), eps=0.1, step_size=0.1, steps=2), x)
    still = descend(x, lambda y: 0 * y.sum((1, 2, 3)), eps=0.1, step_size=0.1, steps=2, how=Steps(momentum=1.0))
    assert torch.equal(still, x)


def test_tanh_and_adam_written_out():
    x = images(5).double()
    p = torch.nn.Parameter(uniform_noise(x, 1.0, torch.Generator().manual_seed(2)))
    start = p.detach().clone()
    adam = torch.optim.Adam([p], lr=1.0)
    for _ in range(3):
        adam.zero_grad()
        wave((x + 0.03 * torch.tanh(p)).clamp(0, 1)).sum().backward()
        adam.step()
    expected = (x + 0.03 * torch.tanh(p)).clamp(0, 1)
    found = descend_tanh(x, wave, eps=0.03, lr=1.0, steps=3, init=start)
    assert torch.allclose(found, expected, atol=1e-12)


def test_smoothing_is_a_normal_density_and_ends_at_the_border():
    kernel = gaussian_kernel()
    density = [math.exp(-0.5 * (-3 + 6 * k / 14) ** 2) for k in range(15)]
    expected = torch.tensor([[a * b for a in density] for b in density], dtype=torch.float64)
    assert torch.allclose(kernel, expected / expected.sum(), atol=1e-12)
    spot = torch.zeros(1, 2, 20, 20, dtype=torch.float64)
    spot[0, 1, 0, 10] = 1
    spread = smoothed(spot, kernel)
    assert torch.equal(spread[0, 0], torch.zeros(20, 20, dtype=torch.float64))
    assert torch.allclose(spread[0, 1, :8, 3:18], kernel[7:])


def test_diversity_shrinks_and_pads():
    x = torch.ones(1, 1, 40, 60)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(50):
        found = diverse(x, generator)
        assert found.shape == x.shape
        rows, columns = (found[0, 0] > 0).any(1).sum(), (found[0, 0] > 0).any(0).sum()
        assert 36 <= rows <= 40
        assert 54 <= columns <= 60
        sizes.add((int(rows), int(columns)))
    assert len(sizes) > 3


def test_noise_depends_on_the_generator_alone():
    first = uniform_noise(torch.zeros(2, 3, 4, 4), 0.1, torch.Generator().manual_seed(7))
    again = uniform_noise(torch.zeros(2, 3, 4, 4, dtype=torch.float64), 0.1, torch.Generator().manual_seed(7))
    assert torch.allclose(first.double(), again, atol=1e-8)
    assert 0.08 < first.abs().max() <= 0.1


def test_inside_is_the_nearest_point():
    x = torch.tensor([[[[0.02, 0.5, 0.99]]]])
    assert torch.allclose(inside(x + torch.tensor([-1.0, 0.05, 1.0]), x, 0.1), torch.tensor([0.0, 0.55, 1.0]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: check_images(torch.randn(2, 3, 8, 8)), "before they are normalised"),
        (lambda: check_images(torch.full((1, 3, 4, 4), float("nan"))), "nan"),
        (lambda: check_images(torch.zeros(3, 4, 4)), r"\(B, C, H, W\)"),
        (lambda: check_images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "uint8"),
        (lambda: check_ball(0, 0.1, 1), "eps is 0"),
        (lambda: check_ball(8, 0.1, 1), "such as 8/255"),
        (lambda: check_ball(0.1, 0, 1), "step_size is 0"),
        (lambda: check_ball(0.1, 0.1, 0), "steps is 0"),
        (lambda: Steps(momentum=-1), "momentum is -1"),
        (lambda: Steps(diversity=2), "diversity is 2"),
    ],
)
def test_what_no_attack_can_do_is_refused(call, said):
    with pytest.raises(UsageError, match=said):
        call()
