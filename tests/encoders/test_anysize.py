"""Crops of another size: positions against timm and against DINOv2's own rule."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from patchloom.encoders import create_encoder, run_blocks, set_image_size
from patchloom.encoders.anysize import DINOV2_RULE, embed_any_size, resample_positions
from patchloom.errors import UsageError

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def randomised(name: str, **settings: object) -> object:
    encoder = create_encoder(name, image_size=48, **{**SMALL, **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return encoder.eval()


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "eva02_tiny_patch14_224",
        "vit_base_patch16_clip_224",
        "ccvit_tiny_patch4_32",
    ],
)
def test_another_size_gives_what_the_resized_encoder_gives(name):
    encoder = randomised(name)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found, _ = run_blocks(encoder, embed_any_size(encoder, images))
    own, _ = run_blocks(encoder, embed_any_size(encoder, F.interpolate(images, 48)))
    resized = set_image_size(encoder, 32)
    torch.testing.assert_close(encoder.norm(found), resized.forward_features(images), atol=1e-4, rtol=1e-4)
    assert own.shape[1] == found.shape[1] + 36 - 16


def test_timm_agrees_where_it_takes_any_size_itself():
    encoder = randomised("vit_tiny_patch16_224")
    dynamic = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48, dynamic_img_size=True, **SMALL)
    dynamic.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 64)
    found, _ = run_blocks(encoder, embed_any_size(encoder, images))
    torch.testing.assert_close(encoder.norm(found), dynamic.eval().forward_features(images), atol=1e-5, rtol=1e-5)


def test_the_rule_of_dinov2_without_registers_has_an_offset_and_no_antialiasing():
    positions = torch.randn(1, 1 + 36, 8)
    maps = positions[:, 1:].reshape(1, 6, 6, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, scale_factor=(4.1 / 6, 3.1 / 6), mode="bicubic")
    found = resample_positions(positions, (6, 6), (4, 3), 1, DINOV2_RULE)
    assert found.shape == (1, 1 + 12, 8)
    torch.testing.assert_close(found[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(found[:, 0], positions[:, 0])
    assert resample_positions(positions, (6, 6), (6, 6), 1, DINOV2_RULE) is positions


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ccvit_tiny_patch4_32"])
def test_positions_learn_through_the_resampling(name):
    encoder = randomised(name)
    last, _ = run_blocks(encoder, embed_any_size(encoder, torch.randn(2, 3, 32, 32)))
    last.square().sum().backward()
    table = encoder.rel_pos_bias.relative_position_bias_table if name.startswith("ccvit") else encoder.pos_embed
    assert (table.grad.abs().sum(-1) > 0).float().mean() > 0.3


def test_masked_patches_are_those_of_the_small_grid():
    encoder = randomised("vit_tiny_patch16_224")
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, 5] = True
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[..., 8:16, 8:16] = 0
    token = torch.ones(1, 1, 32)
    torch.testing.assert_close(
        embed_any_size(encoder, images, masked, token).x, embed_any_size(encoder, other, masked, token).x
    )


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="image size 30 is not divisible by patch size 8"):
        embed_any_size(randomised("vit_tiny_patch16_224"), torch.randn(1, 3, 30, 32))
    tables = create_encoder("beit_base_patch16_224", image_size=48, **SMALL)
    with pytest.raises(UsageError, match="relative-position table in every block takes images of its own size only"):
        embed_any_size(tables, torch.randn(1, 3, 32, 32))
