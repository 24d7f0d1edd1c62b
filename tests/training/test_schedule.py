"""Schedules against the published arrays."""

from __future__ import annotations

import numpy as np
import pytest

from patchloom.training.schedule import cosine, warmup_cosine, warmup_drops, warmup_steps


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (50, 0), (7, 2), (12, 1)])
def test_equals_the_array_of_the_published_code(total, warmup):
    peak, end = 1.5e-3, 1e-5
    rising = np.linspace(0, peak, warmup)
    t = np.arange(total - warmup)
    falling = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * t / (total - warmup)))
    expected = np.concatenate([rising, falling])
    assert np.allclose([warmup_cosine(step, total, warmup, peak, end) for step in range(total)], expected, atol=1e-15)


def test_constant_weight_decay_is_constant():
    assert {cosine(step, 30, 0.05, 0.05) for step in range(30)} == {0.05}


def test_warmup_takes_at_most_a_fifth_of_a_short_run():
    assert warmup_steps(10, 100, 30_000) == 1000
    assert warmup_steps(10, 10, 100) == 20


def test_drops_come_at_shares_of_the_run():
    values = [warmup_drops(step, 20, 2, 1.0, (0.5, 0.75), 0.1) for step in range(20)]
    assert values[:3] == [0.0, 1.0, 1.0]
    assert values[9:11] == [1.0, pytest.approx(0.1)]
    assert values[14:16] == [pytest.approx(0.1), pytest.approx(0.01)]
