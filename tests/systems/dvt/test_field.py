"""The neural field: both encodings against loops in float64."""

import math

import numpy as np
import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.dvt.field import FeatureField, GridEncoding, HashEncoding, fitting_resolution, growth


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def hashed(params, coords, levels, features, base, finest, log2):
    """tiny-cuda-nn's hash grid with linear interpolation, point by point, in float64."""
    factor = math.exp((math.log(finest) - math.log(base)) / (levels - 1))
    out, first = np.zeros((len(coords), levels * features)), 0
    for level in range(levels):
        scale = base * factor**level - 1
        side = math.ceil(scale - 1e-9) + 1
        size = min(math.ceil(side**2 / 8) * 8, 2**log2)
        table = params[first * features : (first + size) * features].reshape(size, features)
        first += size
        for n, (x, y) in enumerate(coords):
            px, py = x * scale + 0.5, y * scale + 0.5
            cx, cy = math.floor(px), math.floor(py)
            for dx in (0, 1):
                for dy in (0, 1):
                    weight = (px - cx if dx else 1 - px + cx) * (py - cy if dy else 1 - py + cy)
                    gx, gy = cx + dx, cy + dy
                    index = gx + gy * side if side**2 <= size else gx ^ (gy * 2654435761 % 2**32)
                    out[n, level * features : (level + 1) * features] += weight * table[index % size]
    assert first * features == len(params)
    return out


@pytest.mark.parametrize("log2", [20, 6])
def test_the_hash_encoding_is_that_of_tiny_cuda_nn(log2):
    encoding = randomised(HashEncoding(4, 2, 4, 40, log2)).double()
    coords = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coords[:3] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    expected = hashed(encoding.params[0].detach().numpy(), coords.numpy(), 4, 2, 4, 40, log2)
    np.testing.assert_allclose(encoding(coords[None])[0].detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_published_sizes_of_the_hash_grid_never_hash():
    encoding = HashEncoding(16, 8, 16, 1024, 20)
    assert encoding.resolutions[0] == 16
    assert encoding.resolutions[-1] == 1024
    assert encoding.sizes[-1] == 2**20
    assert all(side**2 <= size for side, size in zip(encoding.resolutions, encoding.sizes, strict=True))


def test_the_grid_encoding_reads_between_entries_whose_corners_are_the_images():
    encoding = randomised(GridEncoding(3, 2, 4, 9)).double()
    coords = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coords[:2] = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    rows = []
    for x, y in coords.tolist():
        row = []
        for level in encoding.levels:
            table = level[0].detach().numpy()
            side = table.shape[-1]
            px, py = x * (side - 1), y * (side - 1)
            cx, cy = min(int(px), side - 2), min(int(py), side - 2)
            ax, ay = px - cx, py - cy
            row.append(
                table[:, cy, cx] * (1 - ax) * (1 - ay)
                + table[:, cy, cx + 1] * ax * (1 - ay)
                + table[:, cy + 1, cx] * (1 - ax) * ay
                + table[:, cy + 1, cx + 1] * ax * ay
            )
        rows.append(np.concatenate(row))
    assert [level.shape[-1] for level in encoding.levels] == [4, 6, 9]
    np.testing.assert_allclose(encoding(coords[None])[0].detach().numpy(), np.stack(rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoder", ["grid", "hash"])
def test_the_field_is_two_layers_on_the_encoding_of_any_shape_of_coordinates(encoder):
    field = randomised(FeatureField(6, encoder=encoder, n_levels=2, base_resolution=4, max_resolution=8)).double()
    coords = torch.rand(3, 4, 2, dtype=torch.float64)
    x = field.encoding(coords.reshape(1, -1, 2))[0].detach().numpy()
    first, last = field.mlp[0], field.mlp[2]
    assert first.weight.shape == (1, 3, 16)
    hidden = np.maximum(x @ first.weight[0].detach().numpy().T + first.bias[0].detach().numpy(), 0)
    expected = hidden @ last.weight[0].detach().numpy().T + last.bias[0].detach().numpy()
    np.testing.assert_allclose(field(coords).reshape(12, 6).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_fields_side_by_side_are_those_of_each():
    both = randomised(FeatureField(6, n_levels=2, base_resolution=4, max_resolution=8, images=2))
    coords = torch.rand(2, 5, 2)
    for number in (0, 1):
        one = FeatureField(6, n_levels=2, base_resolution=4, max_resolution=8)
        one.load_state_dict({name: value[number : number + 1] for name, value in both.state_dict().items()})
        torch.testing.assert_close(both(coords)[number], one(coords[number]))


def test_coordinates_outside_of_the_image_and_levels_that_grow_coarser_are_refused():
    field = FeatureField(4, max_resolution=16)
    for bad in (-0.01, 1.01, float("nan")):
        with pytest.raises(UsageError, match="from 0 to 1"):
            field(torch.tensor([[0.5, bad]]))
    with pytest.raises(UsageError, match="max_resolution 8 is below base_resolution 16"):
        FeatureField(4, max_resolution=8)


def test_tables_start_near_nothing_and_resolutions_follow_what_crops_can_resolve():
    assert all(
        float(level.detach().abs().max()) <= 1e-4 for level in FeatureField(4, max_resolution=64).encoding.levels
    )
    assert growth(1, 16, 1024) == 1
    assert [fitting_resolution(tokens) for tokens in (8, 14, 32, 37, 1000)] == [32, 64, 128, 128, 1024]
