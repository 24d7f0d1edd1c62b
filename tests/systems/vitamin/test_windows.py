"""Sliding windows over images larger than the trunk's own."""

import pytest
import timm
import torch

import patchloom  # noqa: F401 - names the small ViTamins
from patchloom.errors import UsageError
from patchloom.systems.vitamin.model import SlidingWindowFeatures, stage_maps


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return timm.create_model("vitamin_tiny_64", num_classes=0).eval()


@torch.no_grad()
def test_one_window_is_the_whole_forward_pass(trunk):
    images = torch.randn(2, 3, 64, 64)
    maps = SlidingWindowFeatures(trunk)(images)
    torch.testing.assert_close(trunk.fc_norm(maps["dense"].mean((2, 3))), trunk(images), atol=1e-5, rtol=0)
    assert maps["res5"].shape == (2, 96, 2, 2)
    torch.testing.assert_close(maps["res5"], maps["tokens"][:, :, ::2, ::2])


@torch.no_grad()
def test_where_windows_do_not_overlap_each_stands_for_itself(trunk):
    images = torch.randn(1, 3, 128, 64)
    maps = SlidingWindowFeatures(trunk)(images)
    for name, value in stage_maps(trunk, images[:, :, 64:]).items():
        torch.testing.assert_close(maps[name][:, :, maps[name].shape[2] // 2 :], value, atol=1e-5, rtol=0)


@torch.no_grad()
def test_overlaps_are_means_in_any_order_and_the_last_window_is_shifted_back(trunk):
    images = torch.randn(1, 3, 64, 112)
    maps = SlidingWindowFeatures(trunk, stride=32)(images)
    total, count = torch.zeros(1, 96, 4, 7), torch.zeros(4, 7)
    for left in (48, 32, 0):  # 0, 32, and what would begin at 64 begins at 48
        total[..., left // 16 : left // 16 + 4] += stage_maps(trunk, images[..., left : left + 64])["tokens"]
        count[:, left // 16 : left // 16 + 4] += 1
    assert count.min() > 0
    torch.testing.assert_close(maps["tokens"], total / count, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_published_pass_leaves_positions_out(trunk):
    images = torch.randn(1, 3, 64, 64)
    with_positions = SlidingWindowFeatures(trunk)(images)["dense"]
    without = SlidingWindowFeatures(trunk, add_pos_embed=False)(images)["dense"]
    assert not torch.allclose(with_positions, without, atol=1e-4)
    bare = timm.create_model("vitamin_tiny_64", num_classes=0, pos_embed="none").eval()
    bare.load_state_dict({name: value for name, value in trunk.state_dict().items() if name != "pos_embed"})
    torch.testing.assert_close(bare.fc_norm(without.mean((2, 3))), bare(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_does_not_fill_a_window_is_padded_with_black_and_cut_off_again(trunk):
    mean, std = (torch.tensor(trunk.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    pixels = torch.rand(1, 3, 40, 70)
    black = torch.zeros(1, 3, 64, 80)
    black[..., :40, :70] = pixels
    found = SlidingWindowFeatures(trunk, stride=32)((pixels - mean) / std)
    whole = SlidingWindowFeatures(trunk, stride=32)((black - mean) / std)
    assert found["tokens"].shape[-2:] == (3, 5)
    for name in ("stem", "stage1", "stage2", "tokens"):
        height, width = found[name].shape[-2:]
        torch.testing.assert_close(found[name], whole[name][..., :height, :width], atol=1e-4, rtol=0)


def test_windows_that_cannot_be_are_refused(trunk):
    with pytest.raises(UsageError, match="window is 60; it must be a multiple of 16"):
        SlidingWindowFeatures(trunk, window=60)
    with pytest.raises(UsageError, match="stride 80 is larger than window 64"):
        SlidingWindowFeatures(trunk, stride=80)
    with pytest.raises(UsageError, match="not the stages of ViTamin"):
        SlidingWindowFeatures(timm.create_model("vit_tiny_patch16_224", num_classes=0))
