"""Hyena ViTs of clips and volumes: their own forward pass, other grids, hybrids, bundles, and what cannot be done."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import patchloom as pl
from patchloom.encoders import (
    create_encoder,
    embed,
    embed_dim,
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
from patchloom.encoders.hyena import HyenaND
from patchloom.encoders.hyena_nd import MODELS
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.hi_end_mae.model import HiEndMAE
from patchloom.systems.videomae_v2.model import VideoMaskedAutoencoder
from patchloom.training.supervised import as_classifier

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "filter_width": 8}
NAMES = {"clip": "hyena_video_micro_patch8", "volume": "hyena_volume_micro_patch4"}
CASES = {
    "clip": ((4, 16, 24), (2, 2, 3), (8, 24, 16), 3),
    "volume": ((8, 8, 12), (2, 2, 3), (12, 4, 16), 1),
}
"""Size, its grid, another size, channels."""


def made(kind, suffix="", **options):
    """Return a small encoder in eval mode with every parameter moved."""
    size, channels = CASES[kind][0], CASES[kind][3]
    torch.manual_seed(0)
    encoder = create_encoder(NAMES[kind] + suffix, image_size=size, in_chans=channels, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder.eval()


def inputs(kind, size=None):
    return torch.randn(2, CASES[kind][3], *(size or CASES[kind][0]))


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("options", [{}, {"direction": "four_shared"}, {"mixer": "sequence"}, {"mixer": "alternate"}])
def test_tokens_are_those_of_its_own_forward_pass(kind, options):
    encoder, batch = made(kind, **options), inputs(kind)
    assert (kind_of(encoder), grid_size(encoder), embed_dim(encoder)) == (kind, CASES[kind][1], 24)
    found = tokens(encoder, batch)
    assert found.prefix.shape[1] == 0
    torch.testing.assert_close(found.patches, encoder.forward_features(batch))
    torch.testing.assert_close(pooled(encoder, batch), found.patches.mean(1))
    assert feature_map(encoder, batch).shape == (2, 24, *CASES[kind][1])


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
def test_the_operator_mixes_along_all_three_axes(kind):
    """A change of the last patch comes to the first one, and the other way round, in two blocks."""
    encoder, batch = made(kind, depth=2), inputs(kind)
    grid = CASES[kind][1]
    assert [block.attn.grid for block in encoder.blocks] == [grid, grid]
    before = feature_map(encoder, batch)
    for corner in ((0, 0, 0), (-1, -1, -1)):
        changed = batch.clone()
        changed[(..., *corner)] += 10.0
        assert (feature_map(encoder, changed) - before).abs().amax((0, 1)).min() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mixer", ["hyena", "hyena_then_attention", "sequence"])
def test_inputs_of_another_size_in_passing_and_for_good(kind, mixer):
    encoder, other = made(kind, mixer=mixer), CASES[kind][2]
    batch = inputs(kind, other)
    passing, _ = run_blocks(encoder, embed_any_size(encoder, batch))
    resized = set_image_size(copy.deepcopy(encoder), other)
    assert input_size(resized) == other
    torch.testing.assert_close(resized.norm(passing), resized.forward_features(batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(set_image_size(resized, CASES[kind][0])(inputs(kind)).shape, (2, 24))


@pytest.mark.parametrize("kind", NAMES)
def test_as_many_patches_of_another_grid_are_not_taken_for_its_own(kind):
    encoder, (down, across) = made(kind), CASES[kind][0][1:]
    turned = (CASES[kind][0][0], across, down)
    for enter in (pooled, tokens):
        with pytest.raises(UsageError, match="the encoder is set up for"):
            enter(encoder, inputs(kind, turned))


@pytest.mark.parametrize("kind", NAMES)
def test_filters_learn_from_inputs_of_another_size(kind):
    encoder = made(kind)
    x, _ = run_blocks(encoder, embed_any_size(encoder, inputs(kind, CASES[kind][2])))
    x.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.blocks[0].attn.filters.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("options", [{"filter_kind": "product", "window": "learned"}, {"global_pool": "first"}])
def test_a_bundle_gives_it_back_at_whatever_size_it_is_then(tmp_path, kind, options):
    other = CASES[kind][2]
    encoder, batch = set_image_size(made(kind, **options), other), inputs(kind, other)
    opened = pl.load(save_bundle(encoder, tmp_path / "bundle"))
    assert type(opened) is type(encoder)
    torch.testing.assert_close(opened(batch), encoder(batch))


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_classifier_of_it_reads_its_mean_or_its_first_patch(kind, pool):
    encoder, batch = made(kind), inputs(kind)
    model = as_classifier(encoder, 5, pool).eval()
    patches = tokens(encoder, batch).patches
    feature = patches.mean(1) if pool == "avg" else patches[:, 0]
    torch.testing.assert_close(model(batch), model.head(feature), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_size_is_made_for_its_inputs(name):
    kind = MODELS[name][0]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, depth=1)
        size, channels = input_size(model), model.pretrained_cfg["input_size"][0]
        assert model(torch.empty(1, channels, *size)).shape == (1, MODELS[name][1]["embed_dim"])
    side = int(name.rsplit("patch", 1)[1])
    assert patch_shape(model) == ((2, side, side) if kind == "video" else (side,) * 3)


def test_hybrids_have_names_of_their_own():
    for name in NAMES.values():
        with torch.device("meta"):
            blocks = {
                found.removeprefix(name): "".join(
                    "ah"[isinstance(block.attn, HyenaND)] for block in timm.create_model(found).blocks
                )
                for found in timm.list_models(f"{name}*")
            }
        assert blocks == {
            "": "hhhh",
            "_hyena_then_attention": "hhha",
            "_attention_then_hyena": "aaah",
            "_alternate": "haha",
            "_attention": "aaaa",
        }


@pytest.mark.parametrize("kind", NAMES)
def test_patches_are_left_out_where_there_is_attention_alone(kind):
    keep = torch.tensor([[0, 3], [5, 1]])
    with pytest.raises(UsageError, match="left out"):
        embed(made(kind, "_alternate"), inputs(kind), keep=keep)
    encoder, batch = made(kind, "_attention"), inputs(kind)
    whole = embed(encoder, batch).x
    torch.testing.assert_close(
        embed(encoder, batch, keep=keep).x, whole.gather(1, keep[..., None].expand(-1, -1, 24)), atol=1e-5, rtol=1e-5
    )


def test_masked_autoencoders_are_for_encoders_that_can_leave_patches_out():
    with pytest.raises(UsageError, match=r"VideoMAE V2 shows .* HyenaVideoTransformer need the whole grid; take"):
        VideoMaskedAutoencoder(made("clip"), 24, 1, 2)
    with pytest.raises(UsageError, match=r"Hi-End-MAE shows .* HyenaVolumeTransformer need the whole grid; take"):
        HiEndMAE(made("volume", "_hyena_then_attention"), 24, 2, 1, (0, 1))
    VideoMaskedAutoencoder(made("clip", "_attention"), 24, 1, 2)
    HiEndMAE(made("volume", "_attention"), 24, 2, 1, (0, 1))


@pytest.mark.parametrize("kind", NAMES)
def test_places_and_rates_do_not_decay_and_class_tokens_are_refused(kind):
    assert {"blocks.0.attn.filters.z.0", "blocks.0.attn.filters.freq"} <= made(kind).no_weight_decay()
    with pytest.raises(UsageError, match="class and register"):
        made(kind, class_token=True)
