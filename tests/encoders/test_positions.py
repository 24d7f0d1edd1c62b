"""Positions on grids of one, two and three axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchloom.encoders.positions import DINOV2_RULE, TIMM_RULE, resample_positions, sincos_positions
from patchloom.errors import UsageError


@pytest.mark.parametrize(("grid", "axes"), [((5,), (0,)), ((2, 3), (1, 0)), ((2, 3, 4), (2, 1, 0))])
def test_sines_and_cosines_are_the_formula(grid, axes):
    quarter = 3
    dim = 2 * quarter * len(grid)
    table = sincos_positions(dim, grid, prefix=1).double().numpy()
    assert not table[0].any()
    for row, place in enumerate(itertools.product(*map(range, grid)), start=1):
        wanted = []
        for axis in axes:  # the last one first
            angles = [place[axis] * 10000.0 ** (-k / quarter) for k in range(quarter)]
            wanted += [*np.sin(angles), *np.cos(angles)]
        np.testing.assert_allclose(table[row], wanted, atol=1e-7)


def test_the_first_axis_may_come_first():
    """Hi-End-MAE's order: (h, w, d), each with its sines then cosines."""
    table = sincos_positions(12, (2, 3, 4), prefix=0, axes=(0, 1, 2)).view(2, 3, 4, 12)
    place = torch.tensor([1.0, 2.0, 3.0])
    for axis in range(3):
        angles = place[axis] * torch.tensor([1.0, 10000**-0.5])
        torch.testing.assert_close(table[1, 2, 3, 4 * axis : 4 * axis + 4], torch.cat([angles.sin(), angles.cos()]))


def test_a_width_that_axes_do_not_share_out_is_refused():
    with pytest.raises(UsageError, match="divisible by 6, not 64"):
        sincos_positions(64, (2, 2, 2))


@pytest.mark.parametrize("rule", [TIMM_RULE, DINOV2_RULE])
def test_resampling_along_each_axis_is_that_of_images_along_two(rule):
    """A volume that is constant along one axis is resampled as the image it repeats; and so is a signal."""
    images = torch.randn(1, 30, 8)
    wanted = resample_positions(images, (5, 6), (7, 4), 0, rule)
    volume = images.view(1, 5, 1, 6, 8).expand(1, 5, 3, 6, 8).reshape(1, 90, 8)
    found = resample_positions(volume, (5, 3, 6), (7, 2, 4), 0, rule).view(1, 7, 2, 4, 8)
    for slice_of in found.unbind(2):
        torch.testing.assert_close(slice_of.flatten(1, 2), wanted, atol=1e-5, rtol=1e-5)
    line = torch.randn(1, 1 + 9, 8)
    found = resample_positions(line, (9,), (4,), 1, TIMM_RULE)
    assert torch.equal(found[:, 0], line[:, 0])
    row = line[:, 1:].transpose(1, 2).unsqueeze(2)
    wanted = F.interpolate(row, size=(1, 4), mode="bicubic", antialias=True)[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(found[:, 1:], wanted)


def test_grids_of_other_axes_are_no_target():
    with pytest.raises(UsageError, match="grid of 2x2 are not resampled to 2x2x1"):
        resample_positions(torch.zeros(1, 4, 8), (2, 2), (2, 2, 1), 0)
