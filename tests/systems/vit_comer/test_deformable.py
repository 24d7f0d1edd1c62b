"""Multi-scale deformable attention against its formula, pixel by pixel in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from comer_formulas import attend
from patchloom.errors import UsageError
from patchloom.systems.vit_comer.deformable import MultiScaleDeformableAttention, ms_deform_attn, reference_points
from segment_support import randomised

SHAPES = [(4, 6), (2, 3), (1, 2)]


def by_hand(value: Tensor, shapes: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention as four nested loops and the four neighbours of a place."""
    batch, _, heads, dim = value.shape
    _, queries, _, levels, points, _ = places.shape
    out = value.new_zeros(batch, queries, heads, dim)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                start = 0
                for level in range(levels):
                    h, w = shapes[level]
                    for p in range(points):
                        x, y = places[b, q, m, level, p, 0] * w - 0.5, places[b, q, m, level, p, 1] * h - 0.5
                        left, top = math.floor(float(x.detach())), math.floor(float(y.detach()))
                        for i in (top, top + 1):
                            for j in (left, left + 1):
                                if 0 <= i < h and 0 <= j < w:
                                    share = (1 - (x - j).abs()) * (1 - (y - i).abs())
                                    pixel = value[b, start + i * w + j, m]
                                    out[b, q, m] = out[b, q, m] + weights[b, q, m, level, p] * share * pixel
                    start += h * w
    return out.flatten(2)


def drawn(batch: int = 2, queries: int = 3, heads: int = 2, dim: int = 3, points: int = 2):
    generator = torch.Generator().manual_seed(0)
    areas = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, areas, heads, dim, dtype=torch.float64, generator=generator)
    # From outside the maps on one side to outside on the other.
    places = torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=torch.float64, generator=generator)
    weights = torch.randn(batch, queries, heads, len(SHAPES), points, dtype=torch.float64, generator=generator)
    return value, places * 1.6 - 0.3, weights


def test_values_and_gradients_are_those_of_the_loop():
    tensors = [x.requires_grad_() for x in drawn()]
    value, places, weights = tensors
    expected = by_hand(value, SHAPES, places, weights)
    found = ms_deform_attn(value, SHAPES, places, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    along = torch.randn_like(expected)
    ours = torch.autograd.grad(found, tensors, along)
    for one, other in zip(ours, torch.autograd.grad(expected, tensors, along), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_module_is_its_formula_with_everything_drawn_at_random(ratio):
    torch.manual_seed(1)
    module = randomised(MultiScaleDeformableAttention(12, num_heads=3, num_points=2, value_ratio=ratio))
    tokens = torch.randn(2, 32, 12, dtype=torch.float64)
    value = torch.randn(2, 32, 12, dtype=torch.float64)
    points = reference_points(SHAPES, tokens)
    found = module(tokens, points, value, SHAPES)
    expected = attend(module.state_dict(), tokens, value, SHAPES, heads=3, points=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    spread = points.expand(2, -1, 3, -1)
    torch.testing.assert_close(module(tokens, spread, value, SHAPES), expected, rtol=0, atol=1e-12)


def test_reference_points_are_centres_of_cells_as_x_and_y():
    points = reference_points([(2, 4), (1, 1)])
    assert points.shape == (1, 9, 1, 2)
    assert points[0, 1, 0].tolist() == [0.375, 0.25]
    assert points[0, 4, 0].tolist() == [0.125, 0.75]
    assert points[0, 8, 0].tolist() == [0.5, 0.5]


def test_at_first_each_head_looks_in_its_own_direction_with_equal_weights():
    module = MultiScaleDeformableAttention(16, num_heads=4, num_levels=2, num_points=3)
    bias = module.sampling_offsets.bias.detach().view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(bias[:, 0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[:, 1, 2], 3 * expected, atol=1e-6, rtol=0)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()
    assert not module.attention_weights.bias.any()


def test_places_keep_their_digits_under_autocast():
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(12, num_heads=3)
    with torch.no_grad():
        module.sampling_offsets.weight.normal_()
    tokens = torch.randn(1, 32, 12)
    seen = []
    inner = torch.nn.functional.grid_sample
    torch.nn.functional.grid_sample = lambda maps, grid, **how: (seen.append(grid), inner(maps, grid, **how))[1]
    try:
        plain = module(tokens, reference_points(SHAPES), tokens, SHAPES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = module(tokens, reference_points(SHAPES), tokens, SHAPES)
    finally:
        torch.nn.functional.grid_sample = inner
    assert all(torch.equal(one, other) for one, other in zip(seen[:3], seen[3:], strict=True))
    torch.testing.assert_close(half.float(), plain, atol=0.03, rtol=0.03)


def test_it_compiles_as_one_graph():
    module = MultiScaleDeformableAttention(12, num_heads=3).eval()
    tokens = torch.randn(1, 32, 12)

    def attended(x: Tensor) -> Tensor:
        return module(x, reference_points(SHAPES), x, SHAPES)

    graph = torch.compile(attended, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(tokens), attended(tokens))


def test_what_does_not_fit_is_refused():
    value, places, weights = drawn()
    with pytest.raises(UsageError, match="hold 26 tokens, and there are 32"):
        ms_deform_attn(value, [(4, 5), (2, 3)], places[:, :, :, :2], weights[:, :, :, :2])
    with pytest.raises(UsageError, match="6 heads of deformable attention do not share a width of 64"):
        MultiScaleDeformableAttention(64)
    with pytest.raises(UsageError, match=r"values of 18 \(ratio 0.5\)"):
        MultiScaleDeformableAttention(36, num_heads=12, value_ratio=0.5)
    module = MultiScaleDeformableAttention(12, num_heads=3)
    tokens = torch.randn(1, 30, 12)
    with pytest.raises(UsageError, match="was made for 3 maps and gets 2"):
        module(tokens, reference_points(SHAPES[:2]), tokens, SHAPES[:2])


def test_the_core_is_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention as Theirs

    value, places, weights = (x.float() for x in drawn())
    expected = Theirs()(value, torch.tensor(SHAPES), SHAPES, torch.tensor([0, 24, 30]), places, weights, 64)
    torch.testing.assert_close(ms_deform_attn(value, SHAPES, places, weights), expected, rtol=0, atol=1e-5)
