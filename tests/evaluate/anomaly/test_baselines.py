"""What EAR is compared with: the nearest good patch, and random masks."""

from __future__ import annotations

import pytest
import timm
import torch

from patchloom.errors import UsageError
from patchloom.evaluate.anomaly.patchcore import PatchCore, PatchFeatures, fit_patchcore, k_centres, nearest_of
from patchloom.evaluate.anomaly.random_masks import RandomMasks
from patchloom.systems.ear.excision import random_sets
from patchloom.systems.ear.model import RecoveryUNet, recovery_map


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_centre_is_the_farthest_from_those_before():
    points = drawn(60, 5).double()
    chosen = k_centres(points, 10, seed=3)
    assert len(set(chosen.tolist())) == 10
    for place in range(1, 10):
        distances = torch.cdist(points, points[chosen[:place]]).min(1).values
        assert float(distances[chosen[place]]) == pytest.approx(float(distances.max()), rel=1e-5)


def test_centres_reach_every_cluster_also_through_a_projection():
    clusters = 50 * drawn(7, 300)
    points = clusters.repeat_interleave(20, 0) + drawn(140, 300, seed=1)
    assert sorted((k_centres(points, 7) // 20).tolist()) == list(range(7))
    assert sorted(k_centres(points[:5], 5).tolist()) == list(range(5))
    with pytest.raises(UsageError, match="1 to 5 can be chosen"):
        k_centres(points[:5], 6)


def test_points_of_the_memory_are_not_chosen_twice_where_many_are_equal():
    assert sorted(k_centres(torch.ones(6, 4), 6).tolist()) == list(range(6))


def test_distances_are_those_to_the_nearest():
    points, memory = drawn(9000, 4), drawn(7, 4, seed=1)
    distances, numbers = nearest_of(points, memory)
    expected = (points[:, None] - memory).norm(dim=-1)
    torch.testing.assert_close(distances, expected.min(1).values, atol=1e-4, rtol=1e-4)
    assert torch.equal(numbers, expected.argmin(1))


def test_the_memory_is_bounded_and_what_is_in_it_is_near():
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0
    )
    good = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = PatchFeatures(encoder)
    model = fit_patchcore(features, good.split(2), 5, memory_patches=12)
    assert model.memory.shape == (12, 48)
    assert fit_patchcore(features, good.split(2), 5, most_patches=10).memory.shape == (10, 48)
    whole = fit_patchcore(features, good.split(2), 5)
    assert float(whole(good)["pred_score"].max()) < 1e-2
    strange = good[:1].clone()
    strange[..., 8:16, 8:16] = 5.0
    found = whole(strange)
    assert float(found["pred_score"]) > 10 * float(whole(good)["pred_score"].max())


def test_the_map_shows_where_a_patch_is_strange():
    good = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    strange = good[:1].clone()
    strange[..., 24:32, 40:48] = 5.0
    found = fit_patchcore(PatchFeatures(None), good.split(2), 5)(strange)
    row, column = divmod(int(found["anomaly_map"][0, 0].argmax()), 64)
    assert 20 <= row < 36
    assert 36 <= column < 52


def test_without_an_encoder_patches_are_pixels():
    found = PatchFeatures(None)(torch.rand(2, 3, 40, 33))
    assert found.shape == (2, 192, 5, 4)
    model = PatchCore(PatchFeatures(None), found.flatten(2).transpose(1, 2).reshape(-1, 192))
    assert model(torch.rand(1, 3, 40, 33))["anomaly_map"].shape == (1, 1, 40, 33)


@pytest.mark.parametrize(("size", "cell", "sets"), [((16, 16), 4, 3), ((17, 23), 5, 4), ((8, 8), 16, 3)])
def test_random_sets_cover_every_pixel_once(size, cell, sets):
    masks = random_sets(size, cell, sets, torch.Generator().manual_seed(0))
    assert masks.shape == (sets, 1, *size)
    assert bool((masks.sum(0) == 1).all())
    for top in range(0, size[0], cell):
        for left in range(0, size[1], cell):
            assert len(masks[:, 0, top : top + cell, left : left + cell].flatten(1).unique(dim=1).T) == 1


def test_random_masks_repair_each_cell_from_the_others():
    class Emptied(torch.nn.Module):
        """What is empty becomes 0.5: only emptied pixels are changed."""

        def forward(self, x):
            return torch.where(x == 0, 0.5, x)

    images = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)) + 0.01
    found = RandomMasks(Emptied(), cells=(4, 8), smoothing=5)(images)
    assert bool((found["recovered"] == 0.5).all())
    torch.testing.assert_close(found["anomaly_map"], recovery_map(images, torch.full_like(images, 0.5), 5))


def test_random_masks_differ_from_run_to_run_unless_they_are_seeded():
    torch.manual_seed(0)
    network = RecoveryUNet(widths=(4, 6, 8)).eval()
    images = torch.rand(1, 3, 32, 32)
    scores = {float(RandomMasks(network, seed=None)(images)["pred_score"]) for _ in range(3)}
    assert len(scores) > 1
    seeded = [float(RandomMasks(network)(images)["pred_score"]) for _ in range(2)]
    assert seeded[0] == seeded[1]
