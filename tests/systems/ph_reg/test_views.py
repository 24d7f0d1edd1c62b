"""Shifted and mirrored views, and the mean over them, against loops."""

from __future__ import annotations

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.ph_reg.views import aggregate_views, make_views, sample_offsets

GRID, PATCH = 7, 4


def drawn(batch: int = 3, views: int = 6, grid: int = GRID, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pairs = [sample_offsets(grid, views, 0.3, generator) for _ in range(batch)]
    return torch.stack([offsets for offsets, _ in pairs]), torch.stack([flips for _, flips in pairs])


@pytest.mark.parametrize(("grid", "most"), [(37, 6), (28, 4), (4, 1), (8, 1)])
def test_offsets_are_whole_patches_of_up_to_a_share_of_the_grid_and_the_first_is_none(grid, most):
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([sample_offsets(grid, 10, generator=generator)[0] for _ in range(50)])
    assert seen.dtype == torch.int64
    assert (seen.min(), seen.max()) == (-most, most)
    offsets, flips = sample_offsets(grid, 10, generator=generator)
    assert offsets.shape == (10, 2)
    assert flips.dtype == torch.bool
    assert offsets[0].tolist() == [0, 0]
    assert not flips[0]


def test_offsets_are_the_farthest_of_the_pool():
    generator = torch.Generator().manual_seed(3)
    offsets, flips = sample_offsets(37, 10, generator=generator)
    generator.manual_seed(3)
    pool = torch.randint(-6, 7, (100, 2), generator=generator).tolist()
    taken = [pool[int(torch.randint(100, (), generator=generator))]]
    for _ in range(9):
        nearest = [min((a - c) ** 2 + (b - d) ** 2 for c, d in taken) for a, b in pool]
        taken.append(pool[nearest.index(max(nearest))])
    assert offsets[1:].tolist() == taken[1:]
    assert flips[1:].tolist() == (torch.rand(10, generator=generator) < 0.5)[1:].tolist()


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_a_grid_without_a_whole_patch_to_shift_by_is_refused(grid):
    with pytest.raises(UsageError, match=f"grid of {grid}x{grid} patches is too small"):
        sample_offsets(grid)


def test_views_are_what_the_image_has_there_and_white_elsewhere():
    offsets, flips = drawn()
    images, fill = torch.randn(3, 2, GRID * PATCH, GRID * PATCH), torch.tensor([2.5, -1.0])
    views, index = make_views(images, offsets, flips, PATCH, fill)
    side = GRID * PATCH
    for b in range(3):
        for v in range(6):
            dh, dw = (offsets[b, v] * PATCH).tolist()
            wanted = fill.view(2, 1, 1).expand(2, side, side).clone()
            for y in range(side):
                for x in range(side):
                    if 0 <= y + dh < side and 0 <= x + dw < side:
                        wanted[:, y, x] = images[b, :, y + dh, x + dw]
            assert torch.equal(views[b, v], wanted.flip(-1) if flips[b, v] else wanted)
            for i in range(GRID):
                for j in range(GRID):
                    column = GRID - 1 - j if flips[b, v] else j
                    r, c = i + int(offsets[b, v, 0]), column + int(offsets[b, v, 1])
                    inside = 0 <= r < GRID and 0 <= c < GRID
                    assert index[b, v, :, i, j].tolist() == ([r, c] if inside else [-1, -1])


def test_the_first_view_is_the_image_to_the_bit():
    offsets, flips = drawn()
    images = torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    views, _ = make_views(images, offsets, flips, PATCH, torch.ones(3))
    assert torch.equal(views[:, 0], images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_over_views_is_that_of_a_loop(dtype):
    offsets, flips = drawn()
    images = torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    _, index = make_views(images, offsets, flips, PATCH, torch.ones(3))
    features = torch.randn(3, 6, GRID, GRID, 5, dtype=dtype)
    target, count = aggregate_views(features, index)
    assert target.dtype == dtype
    for b in range(3):
        total = torch.zeros(GRID, GRID, 5, dtype=dtype)
        times = torch.zeros(GRID, GRID, 1, dtype=dtype)
        for v in range(6):
            for i in range(GRID):
                for j in range(GRID):
                    r, c = index[b, v, :, i, j].tolist()
                    if r >= 0:
                        total[r, c] += features[b, v, i, j]
                        times[r, c] += 1
        assert torch.equal(target[b], total / times)
        assert torch.equal(count[b], times[..., 0].long())


def test_what_shifts_and_mirrors_along_is_given_back_exactly():
    # Features that are the pixels of a patch's middle: no view says anything else of a patch than the image does.
    offsets, flips = drawn()
    images = torch.rand(3, 3, GRID, GRID)
    views, index = make_views(images, offsets, flips, 1, torch.ones(3))
    target, count = aggregate_views(views.movedim(2, -1).double(), index)
    assert torch.allclose(target, images.movedim(1, -1).double(), atol=1e-12)
    assert (count >= 1).all()
    assert count.float().mean() > 3


def test_half_precision_is_summed_in_float32():
    _, index = make_views(torch.zeros(1, 3, GRID, GRID), *drawn(1), 1, torch.ones(3))
    target, _ = aggregate_views(torch.ones(1, 6, GRID, GRID, 2, dtype=torch.bfloat16), index)
    assert target.dtype == torch.float32


def test_a_patch_no_view_shows_is_told_of():
    offsets, flips = torch.full((1, 2, 2), 2), torch.zeros(1, 2, dtype=torch.bool)
    _, index = make_views(torch.zeros(1, 3, GRID, GRID), offsets, flips, 1, torch.ones(3))
    with pytest.raises(UsageError, match=r"24 of 49 patches are in none of the views; .* \(0, 0\)"):
        aggregate_views(torch.ones(1, 2, GRID, GRID, 2), index)


def test_shifts_beyond_the_image_show_nothing():
    offsets, flips = torch.tensor([[[0, 0], [-99, 3]]]), torch.zeros(1, 2, dtype=torch.bool)
    views, index = make_views(torch.zeros(1, 1, GRID, GRID), offsets, flips, 1, torch.ones(1))
    assert bool((views[0, 1] == 1).all())
    assert bool((index[0, 1] == -1).all())


@pytest.mark.parametrize("shape", [(28, 24), (30, 30)])
def test_images_that_patches_do_not_fill_are_refused_with_both_sizes(shape):
    offsets, flips = drawn(1)
    with pytest.raises(UsageError, match=f"{shape[0]}x{shape[1]} pixels.*patch size 4"):
        make_views(torch.zeros(1, 3, *shape), offsets, flips, 4, torch.ones(3))


def test_no_view_at_all_is_refused():
    with pytest.raises(UsageError, match="views is 0"):
        sample_offsets(8, 0)
