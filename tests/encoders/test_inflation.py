"""Kernels and positions of images with an axis more, and what the encoders then compute."""

from __future__ import annotations

import pytest
import torch

from encoders_for_tests import pictures, tiny
from patchloom.encoders import create_encoder
from patchloom.encoders.inflation import inflate, inflate_kernel, inflate_positions
from patchloom.encoders.positions import running_positions
from patchloom.encoders.stages import embed
from patchloom.errors import UsageError


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_kernels_are_the_formula():
    kernel = draw(5, 3, 4, 4)
    mean, centre = inflate_kernel(kernel, 3, "mean"), inflate_kernel(kernel, 3, "centre")
    for time in range(3):
        torch.testing.assert_close(mean[:, :, time], kernel / 3)
        assert torch.equal(centre[:, :, time], kernel if time == 1 else torch.zeros_like(kernel))
    assert torch.equal(inflate_kernel(kernel, 2, "centre")[:, :, 1], kernel)
    signal = draw(5, 3, 4)
    found = inflate_kernel(signal, (2, 3))
    assert found.shape == (5, 3, 2, 3, 4)
    torch.testing.assert_close(found.sum((2, 3)), signal)
    with pytest.raises(UsageError, match="inflation 'max'"):
        inflate_kernel(kernel, 2, "max")
    with pytest.raises(UsageError, match="an axis of 0 slices"):
        inflate_kernel(kernel, 0)


def test_positions_repeat_along_the_new_axis():
    positions = draw(1, 1 + 6, 8)
    found = inflate_positions(positions, (2, 3), (4, 2, 3))
    assert torch.equal(found[:, :1], positions[:, :1])
    for time in found[:, 1:].unflatten(1, (4, 6)).unbind(1):
        assert torch.equal(time, positions[:, 1:])
    assert inflate_positions(positions, (2, 3), (4, 3, 3)).shape == (1, 1 + 36, 8)


@pytest.mark.parametrize("how", ["mean", "centre"])
def test_tokens_of_a_clip_are_those_of_the_image(how):
    """Of a still clip by the mean, and of the middle frame of any clip by the centre."""
    images = tiny("vit", double=True)
    clips = create_encoder(
        "videomae_tiny_patch16_224", image_size=(4, 16, 16), patch_size=4, embed_dim=32, depth=3, num_heads=4
    ).double()
    told = inflate(images, clips, how)
    assert told.left_out == ["cls_token", "pos_embed", "norm.weight", "norm.bias"]
    assert told.fresh == ["fc_norm.weight", "fc_norm.bias"]
    frames = torch.stack([pictures(double=True, seed=seed) for seed in range(4)], 2)
    if how == "mean":
        frames = frames[:, :, :1].expand_as(frames)
    found = embed(clips, frames).x - running_positions(32, 32)
    for tube in range(2):
        torch.testing.assert_close(found[:, 16 * tube : 16 * tube + 16], images.patch_embed(frames[:, :, 2 * tube + 1]))
    x = draw(2, 7, 32)
    torch.testing.assert_close(clips.blocks[2](x), images.blocks[2](x))


def test_what_does_not_fit_is_refused():
    clips = create_encoder("videomae_tiny_patch16_224", image_size=(4, 16, 16), patch_size=4, embed_dim=48, depth=3)
    with pytest.raises(UsageError, match="make both of the same width, depth"):
        inflate(tiny("vit"), clips)
    with pytest.raises(UsageError, match="has no axis more than 4x4"):
        inflate(tiny("vit"), tiny("vit"))
