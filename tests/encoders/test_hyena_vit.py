"""ViTs with the Hyena operator as encoders: which blocks have it, other sizes, bundles, and what cannot be done."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import patchloom as pl
from patchloom.encoders import (
    attends,
    class_attention,
    create_encoder,
    embed,
    feature_map,
    intermediate_layers,
    new_blocks,
    pooled,
    run_blocks,
    set_image_size,
    tokens,
)
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.hyena import HyenaND
from patchloom.encoders.hyena_vit import MIXERS, hyena_vit
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.dinov2.model import DINOv2
from patchloom.training.optim import parameter_groups

MICRO = "hyena_vit_micro_patch4_32"
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "filter_width": 8}


def shaken(encoder):
    """Return the encoder in eval mode with every parameter moved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder.eval()


def made(image_size=16, **options):
    return shaken(create_encoder(MICRO, image_size=image_size, **{**SMALL, **options}))


def blocks_with_it(encoder):
    return "".join("ah"[isinstance(block.attn, HyenaND)] for block in encoder.blocks)


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        ("hyena", "hhhhhhhhhhhh"),
        ("hyena_then_attention", "hhhhhhhaaaaa"),
        ("attention_then_hyena", "aaaaaaahhhhh"),
        ("alternate", "hahahahahaha"),
        ("sequence", "hhhhhhhhhhhh"),
        ("attention", "aaaaaaaaaaaa"),
    ],
)
def test_which_blocks_have_the_operator(mixer, expected):
    shape = {"embed_dim": 12, "num_heads": 2, "filter_width": 4, "depth": 12}
    assert blocks_with_it(create_encoder(MICRO, mixer=mixer, **shape)) == expected
    for published, ours in MIXERS.items():
        if ours == mixer:
            assert blocks_with_it(create_encoder(MICRO, mixer=published, **shape)) == expected


def test_hybrids_have_names_of_their_own():
    names = timm.list_models("hyena_vit_micro_patch4_32*")
    with torch.device("meta"):
        blocks = {name.removeprefix(MICRO): blocks_with_it(timm.create_model(name)) for name in names}
    assert blocks == {
        "": "hhhh",
        "_hyena_then_attention": "hhha",
        "_attention_then_hyena": "aaah",
        "_alternate": "haha",
        "_attention": "aaaa",
    }


def test_even_blocks_begin_at_the_last_corner_and_odd_ones_at_the_first():
    directions = [block.attn.direction for block in create_encoder(MICRO).blocks]
    assert directions == ["reverse_first", "forward", "reverse_first", "forward"]
    assert {block.attn.direction for block in create_encoder(MICRO, direction="4dir").blocks} == {"four_shared"}


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({"mixer": "attention"}, 5.53),
        ({}, 5.86),
        ({"filter_kind": "product"}, 6.11),
        ({"direction": "4dir"}, 5.86),
        ({"direction": "4dirp"}, 7.63),
        ({"direction": "parallel"}, 7.39),
        ({"mixer": "hyena_then_attention"}, 5.72),
    ],
)
def test_the_tiny_size_has_as_many_parameters_as_published(options, millions):
    with torch.device("meta"):
        model = timm.create_model("hyena_vit_tiny_patch16", num_classes=40, **options)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize(("patch", "side"), [(4, 32), (8, 64), (16, 224)])
def test_every_size_is_made_for_its_images(size, patch, side):
    with torch.device("meta"):
        model = timm.create_model(f"hyena_vit_{size}_patch{patch}", num_classes=0)
        assert model(torch.empty(1, 3, side, side)).shape == (1, {"tiny": 192, "small": 384, "base": 768}[size])


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["hyena", "hyena_then_attention", "sequence"])
def test_tokens_are_those_of_its_own_forward_pass(mixer):
    encoder, images = made(mixer=mixer), torch.randn(2, 3, 16, 16)
    found = tokens(encoder, images)
    torch.testing.assert_close(found.patches, encoder.forward_features(images))
    torch.testing.assert_close(pooled(encoder, images), found.patches.mean(1))
    torch.testing.assert_close(encoder(images), found.patches.mean(1))
    assert feature_map(encoder, images).shape == (2, 24, 4, 4)
    assert len(intermediate_layers(encoder, images, [0, -1])) == 2


@torch.no_grad()
def test_the_published_classifier_reads_the_first_patch():
    encoder, images = made(global_pool="first"), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(images), encoder.forward_features(images)[:, 0])
    encoder.reset_classifier(5, "avg")
    assert encoder(images).shape == (2, 5)
    torch.testing.assert_close(
        encoder.forward_head(encoder.forward_features(images), pre_logits=True), pooled(encoder, images, "avg")
    )
    encoder.reset_classifier(5, "first")
    assert encoder.global_pool == "token"


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["hyena", "alternate", "sequence"])
@pytest.mark.parametrize("size", [(24, 24), (24, 12)])
def test_images_of_another_size(mixer, size):
    encoder, images = made(mixer=mixer), torch.randn(2, 3, *size)
    x, _ = run_blocks(encoder, embed_any_size(encoder, images))
    resized = set_image_size(copy.deepcopy(encoder), size)
    torch.testing.assert_close(encoder.norm(x), resized.forward_features(images))
    grids = {block.attn.grid for block in resized.blocks if isinstance(block.attn, HyenaND)}
    down, across = size[0] // 4, size[1] // 4
    assert grids == {(down * across,) if mixer == "sequence" else (down, across)}


def test_crops_of_another_size_teach_the_filters():
    encoder = made()
    x, _ = run_blocks(encoder, embed_any_size(encoder, torch.randn(1, 3, 8, 8)))
    x.sum().backward()
    filters = encoder.blocks[0].attn.filters
    assert all(parameter.grad.abs().sum() > 0 for parameter in filters.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"mixer": "hyena_then_attention", "direction": "4dirp", "global_pool": "first"},
        {"filter_kind": "product", "window": "learned", "in_chans": 5},
        {"filter_kind": "explicit", "conv_scale": 1.0},
        {"mixer": "sequence"},
        {"mixer": "attention"},
    ],
)
def test_a_bundle_gives_it_back_at_whatever_size_it_is_then(tmp_path, options):
    encoder = set_image_size(made(**options), (24, 16))
    images = torch.randn(2, options.get("in_chans", 3), 24, 16)
    opened = pl.load(save_bundle(encoder, tmp_path / "bundle"))
    torch.testing.assert_close(opened(images), encoder(images))
    assert type(opened) is type(encoder)


@torch.no_grad()
def test_by_the_function_of_the_paper(tmp_path):
    model = shaken(hyena_vit(16, 4, 24, 3, 2, "attention_then_hyena", "first", num_classes=7, filter_width=8))
    images = torch.randn(1, 3, 16, 16)
    assert blocks_with_it(model) == "aah"
    torch.testing.assert_close(pl.load(save_bundle(model, tmp_path / "bundle"))(images), model(images))


def test_patches_are_left_out_where_there_is_attention_alone():
    keep = torch.tensor([[0, 3]])
    with pytest.raises(UsageError, match="left out"):
        embed(made(mixer="hyena_then_attention"), torch.zeros(1, 3, 16, 16), keep=keep)
    encoder = made(mixer="attention")
    x, _ = run_blocks(encoder, embed(encoder, torch.zeros(1, 3, 16, 16), keep=keep))
    assert x.shape == (1, 2, 24)


def test_places_frequencies_and_rates_decay_in_the_published_training_only():
    for paper, expected in ((False, False), (True, True)):
        encoder = made(window="learned", paper_optim=paper)
        kept = encoder.no_weight_decay()
        groups = parameter_groups(encoder, decay=lambda name, p, kept=kept: p.ndim > 1 and name not in kept)
        decay = {name: group["decays"] for group in groups for name in group["names"]}
        for name in ("z.0", "freq", "deltas"):
            assert decay[f"blocks.0.attn.filters.{name}"] is expected
        assert decay["blocks.0.attn.filters.networks.0.0.weight"] is True
        assert decay["blocks.0.attn.skip"] is False


def test_fresh_blocks_are_of_the_same_kind():
    encoder = made(mixer="attention_then_hyena")
    (block,) = new_blocks(encoder, 1)
    assert isinstance(block.attn, HyenaND)
    assert block.attn.filters.freq.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": True}, "class and register"),
        ({"reg_tokens": 2}, "class and register"),
        ({"mixer": "mlp"}, "hyena_then_attention"),
        ({"patch_drop_rate": 0.5}, "whole grid"),
        ({"dynamic_img_size": True}, "image_size"),
        ({"order": 1}, "order=1"),
        ({"window": "symettric", "filter_kind": "product"}, "symmetric"),
    ],
)
def test_what_does_not_go_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_encoder(MICRO, **options)


def test_a_mask_of_attention_is_refused():
    with pytest.raises(UsageError, match="no attention to mask"):
        made().blocks[0](torch.zeros(1, 16, 24), attn_mask=torch.zeros(16, 16))


def test_a_masked_autoencoder_is_for_encoders_that_can_leave_patches_out():
    with pytest.raises(UsageError, match="whole grid"):
        MaskedAutoencoder(made(), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    MaskedAutoencoder(made(mixer="attention"), decoder_dim=8, decoder_depth=1, decoder_heads=2)


def test_where_the_operator_is_there_is_no_attention_to_look_at():
    encoder = made(mixer="hyena_then_attention")
    assert [attends(encoder, number) for number in range(3)] == [False, False, True]
    assert class_attention(encoder, torch.zeros(1, 3, 16, 16)).shape == (1, 2, 16)
    with pytest.raises(UsageError, match="without attention"):
        class_attention(encoder, torch.zeros(1, 3, 16, 16), layer=0)


@pytest.mark.parametrize("pool", ["avg", "first"])
def test_self_distillation_takes_what_stands_for_the_class_token(pool):
    encoder, images = made(global_pool=pool), torch.randn(4, 3, 16, 16)
    student = DINOv2(encoder, out_dim=8, hidden_dim=8, bottleneck_dim=4).student
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[:, 3] = True
    with torch.no_grad():
        found = student.crops(images, masks)
        torch.testing.assert_close(found.classes, encoder(images))
        torch.testing.assert_close(found.patches, tokens(encoder, images).patches[:, 3])
        smaller = student.crops(images[..., :8, :8], masks[:, :4], hide=True)
    assert smaller.classes.shape == (4, 24)
