"""Pictures of maps: colours at the ends, constant maps, sizes."""

from __future__ import annotations

import io

import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from patchloom.errors import UsageError
from patchloom.explain.render import grid, overlay, render_traits


def test_half_the_image_and_half_the_colours():
    image = torch.rand(3, 224, 224)
    saliency = torch.linspace(1, 0, 14)[:, None].expand(14, 14)
    painted = overlay(image, saliency)
    jet = colormaps["jet"]
    for row in (56, 112, 168):  # a ramp stays one, enlarged and smoothed
        value = 1 - (row + 0.5 - 8) / 208
        expected = torch.tensor(jet(value)[:3]).float()
        torch.testing.assert_close(painted[:, row, 100] * 2 - image[:, row, 100], expected, atol=0.1, rtol=0)


def test_a_constant_map_is_flat_and_not_finite_ones_are_drawn():
    image = torch.zeros(1, 32, 32)
    flat = overlay(image, torch.full((4, 4), 0.3))
    assert flat.shape == (3, 32, 32)
    assert len({tuple(pixel) for pixel in flat.flatten(1).T.tolist()}) == 1
    assert bool(torch.isfinite(overlay(image, torch.full((4, 4), float("nan")))).all())
    assert overlay(image, torch.rand(4, 4), side=128).shape == (3, 128, 128)


def test_a_strip_holds_the_image_and_the_first_heads():
    figure = render_traits(torch.rand(3, 64, 64), torch.rand(5, 8, 8), torch.tensor([4, 0, 2, 1, 3]), top=3)
    assert "4, 0, 2" in figure.alt
    width, height = Image.open(io.BytesIO(figure.png)).size
    assert 3.5 < width / height < 4.2
    with pytest.raises(UsageError, match="no map of head 7"):
        render_traits(torch.rand(3, 64, 64), torch.rand(5, 8, 8), [7])
    with pytest.raises(UsageError, match="at least one head"):
        render_traits(torch.rand(3, 64, 64), torch.rand(5, 8, 8), [0], top=0)
    with pytest.raises(UsageError, match="nothing to draw"):
        grid([], alt="")
