"""Encoders of volumes: any grid, patches of three sides, several channels, other sizes, weights of 2-D encoders."""

from __future__ import annotations

import math

import pytest
import torch

from patchloom.encoders import (
    create_encoder,
    embed,
    feature_map,
    grid_size,
    input_size,
    kind_of,
    patch_shape,
    pooled,
    run_blocks,
    set_image_size,
    tokens,
)
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.inflation import inflate
from patchloom.encoders.volume import volume_positions
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle
from patchloom.models.start import start_encoder

NAME = "volume_vit_micro_patch4_32"


def small(**arguments):
    settings = {"image_size": (4, 8, 12), "patch_size": (2, 4, 3), "in_chans": 2, "embed_dim": 24, "depth": 2}
    return create_encoder(NAME, **{**settings, "num_heads": 2, **arguments}).eval()


def test_a_grid_of_three_sides_and_several_channels():
    encoder = small()
    assert (kind_of(encoder), input_size(encoder), patch_shape(encoder)) == ("volume", (4, 8, 12), (2, 4, 3))
    assert grid_size(encoder) == (2, 2, 4)
    volumes = torch.rand(2, 2, 4, 8, 12)
    assert feature_map(encoder, volumes).shape == (2, 24, 2, 2, 4)
    prefix, patches = tokens(encoder, volumes)
    torch.testing.assert_close(torch.cat([prefix, patches], 1), encoder.forward_features(volumes))


def test_positions_are_sines_and_cosines_of_each_axis_in_turn():
    table = volume_positions(12, (2, 3, 4))[0].double()
    for number, place in enumerate((h, w, d) for h in range(2) for w in range(3) for d in range(4)):
        row = []
        for coordinate in place:
            angles = [coordinate * 10000 ** (-k / 2) for k in range(2)]
            row += [*map(math.sin, angles), *map(math.cos, angles)]
        torch.testing.assert_close(table[number], torch.tensor(row, dtype=torch.float64), atol=1e-6, rtol=0)
    changed = (table[1] != table[0]).nonzero().flatten()
    assert changed.min() >= 8  # one step along the last axis shows in the last third alone


def test_the_class_token_has_no_position_and_the_table_does_not_train():
    encoder = small()
    assert encoder.pos_embed.shape == (1, 16, 24)
    assert not encoder.pos_embed.requires_grad
    embedded = embed(encoder, torch.zeros(1, 2, 4, 8, 12)).x
    torch.testing.assert_close(embedded[:, :1], encoder.cls_token)
    assert small(positions="learned").pos_embed.requires_grad


def test_visible_patches_alone_are_embedded_and_stay_in_the_order_given():
    encoder, volumes = small(), torch.rand(2, 2, 4, 8, 12)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    whole, kept = embed(encoder, volumes).x, embed(encoder, volumes, keep=keep).x
    torch.testing.assert_close(kept[:, 1:], whole[:, 1:].gather(1, keep[..., None].expand(-1, -1, 24)))


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_another_size_keeps_positions_where_they_were(positions):
    encoder = small(positions=positions)
    volumes = torch.rand(1, 2, 6, 8, 12)
    passing, _ = run_blocks(encoder, embed_any_size(encoder, volumes))
    assert pooled(set_image_size(encoder, (6, 8, 12)), volumes).shape == (1, 24)
    assert grid_size(encoder) == (3, 2, 4)
    torch.testing.assert_close(run_blocks(encoder, embed(encoder, volumes))[0], passing, atol=1e-5, rtol=1e-5)
    if positions == "sincos":
        assert torch.equal(encoder.pos_embed[0, :16], volume_positions(24, (2, 2, 4))[0])


def test_a_bundle_opens_as_it_was_and_at_another_size(tmp_path):
    encoder, volumes = (
        small(positions="learned", norm_eps=1e-5, class_token=False, global_pool="avg", fc_norm=False),
        torch.rand(1, 2, 4, 8, 12),
    )
    save_bundle(encoder, tmp_path / "b")
    again = load(tmp_path / "b")
    assert torch.equal(pooled(again, volumes), pooled(encoder, volumes))
    assert again.norm.eps == 1e-5
    assert input_size(start_encoder(str(tmp_path / "b"), in_chans=2, image_size=(6, 8, 12))) == (6, 8, 12)


def test_weights_of_a_timm_vit_give_its_tokens_where_slices_are_alike():
    """Learnt positions are repeated along the new axis, and a kernel's slices add up to it."""
    images = create_encoder("vit_tiny_patch16_224", image_size=32, embed_dim=24, depth=2, num_heads=2).eval()
    volumes = create_encoder(
        NAME, image_size=(8, 32, 32), patch_size=(4, 16, 16), in_chans=3, embed_dim=24, depth=2, num_heads=2,
        positions="learned",
    ).eval()  # fmt: skip
    inflate(images, volumes)
    picture = torch.rand(1, 3, 32, 32)
    embedded = embed(volumes, picture[:, :, None].expand(-1, -1, 8, -1, -1)).x
    expected = embed(images, picture).x
    torch.testing.assert_close(embedded[:, :5], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embedded[:, 5:], expected[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": (4, 8, 13)}, "13 is not divisible by patch size 3; use 12 or 15"),
        ({"patch_size": (2, 4, 5), "image_size": (4, 8, 12)}, "12 is not divisible by patch size 5; use 10 or 15"),
        ({"embed_dim": 20}, "need a width divisible by 6, not 20"),
        ({"num_heads": 5}, "embed_dim 24 is not divisible by num_heads 5"),
        ({"patch_size": (2, 4)}, "patch_size is 2x4; give one side of the patches of volumes, or all three"),
        ({"image_size": (8, 12)}, "a size of 8x12 has 2 sides; this encoder takes volumes of 3"),
        ({"positions": "rotary"}, "unknown positions 'rotary'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        small(**arguments)


def test_volumes_of_another_size_are_refused_in_every_way_in():
    encoder, volumes = small(), torch.rand(1, 2, 6, 8, 12)
    for enter in (pooled, tokens, feature_map):
        with pytest.raises(UsageError, match=r"volumes of 6x8x12.*; the encoder is set up for 4x8x12"):
            enter(encoder, volumes)


def test_images_are_refused():
    with pytest.raises(UsageError, match=r"takes volumes \(B, C, D, H, W\), and was given shape"):
        embed(small(), torch.rand(1, 2, 8, 12))
