"""Encoders of other kinds enter by their family alone: one of signals and one of volumes."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from families_for_tests import CASES, WholeGrid
from patchloom.encoders import (
    Encoder,
    depth,
    embed,
    embed_dim,
    feature_map,
    grid_size,
    has_tokens,
    in_chans,
    input_size,
    intermediate_layers,
    kind_of,
    layer_of_parameter,
    normalize,
    patch_shape,
    plane_size,
    pooled,
    run_blocks,
    set_image_size,
    tokens,
)
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.families import family_of
from patchloom.encoders.insertion import Insertion, insert, remove
from patchloom.encoders.mask_token import MaskTokenEncoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder, has_fixed_positions, initialize_as_mae
from patchloom.errors import UsageError


@pytest.fixture(params=CASES)
def case(request):
    module, size, patch, grid, other = CASES[request.param]
    encoder = module(size, patch).double().eval()
    inputs = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return encoder, request.param, size, patch, grid, other, inputs


def test_what_it_is(case):
    encoder, kind, size, patch, grid, _, _ = case
    assert has_tokens(encoder)
    assert kind_of(encoder) == kind
    assert (embed_dim(encoder), depth(encoder), in_chans(encoder)) == (24, 3, 2)
    assert (input_size(encoder), patch_shape(encoder), grid_size(encoder)) == (size, patch, grid)
    assert grid_size(encoder, patch) == (1,) * len(patch)
    with pytest.raises(UsageError, match=f"block masks are for grids of 2 axes.*has {len(size)}"):
        plane_size(encoder, "block masks")
    with pytest.raises(UsageError, match=f"the encoder takes {kind}s"):
        tokens(encoder, torch.zeros(1, 2, 8, 8, dtype=torch.float64))


def test_tokens_layers_features_and_maps(case):
    encoder, _, _, _, grid, _, raw = case
    inputs = normalize(raw, encoder)
    torch.testing.assert_close(inputs, (raw - 0.5) / 0.25)
    whole = encoder.forward_features(inputs)
    prefix, patches = tokens(encoder, inputs)
    assert torch.equal(torch.cat([prefix, patches], 1), whole)
    first, last = intermediate_layers(encoder, inputs, [0, -1])
    assert torch.equal(last.patches, patches)
    assert not torch.allclose(first.patches, patches)
    assert feature_map(encoder, inputs).shape == (3, 24, *grid)
    torch.testing.assert_close(feature_map(encoder, inputs).flatten(2).transpose(1, 2), patches)
    assert torch.equal(pooled(encoder, inputs), patches.mean(1))
    assert pooled(encoder, inputs, "cls+avg").shape == (3, 48)


def test_masks(case):
    encoder, _, _, patch, grid, _, inputs = case
    number = math.prod(grid)
    keep = torch.stack([torch.randperm(number)[: number // 2] for _ in range(3)])
    entered = embed(encoder, inputs, keep=keep).x
    rows = torch.cat([torch.arange(2).expand(3, -1), keep + 2], 1)
    torch.testing.assert_close(entered, embed(encoder, inputs).x.gather(1, rows.unsqueeze(-1).expand(-1, -1, 24)))
    model = MaskedAutoencoder(encoder, decoder_dim=24, decoder_depth=1, decoder_heads=2).double()
    noise = torch.rand(3, number)
    output = model(inputs, noise=noise)
    assert output.pred.shape == (3, number, 2 * math.prod(patch))
    torch.testing.assert_close(model.loss(inputs, noise=noise), output.loss)
    assert model.reconstruct(inputs, noise=noise).shape == inputs.shape
    hidden, mask = MaskTokenEncoder(encoder, torch.zeros(1, 1, 24)).double().hidden(inputs, 0.5, noise)
    assert hidden.shape == (3, 2 + number, 24)
    assert mask.sum(1).tolist() == [number // 2] * 3


def test_initialisation_knows_its_grid(case):
    encoder = case[0].float()
    assert not has_fixed_positions(encoder)
    initialize_as_mae(encoder)
    assert has_fixed_positions(encoder)
    kernel = encoder.patch_embed.proj.weight.flatten(1)
    assert float(kernel.detach().abs().max()) <= math.sqrt(6 / sum(kernel.shape))


def test_another_size(case):
    encoder, _, _, _, _, other, _ = case
    larger = torch.rand(1, 2, *other, dtype=torch.float64)
    last, _ = run_blocks(encoder, embed_any_size(encoder, larger))
    set_image_size(encoder, other)
    assert input_size(encoder) == other
    torch.testing.assert_close(last, run_blocks(encoder, embed(encoder, larger))[0], atol=1e-6, rtol=1e-6)


def test_an_adapter_is_put_in_and_taken_out(case):
    encoder, *_, inputs = case

    class Shift(Insertion):
        branches = range(3)

        def branch(self, number, x):
            return x.flip(-1)

        def features(self, encoder, x):
            return encoder.__class__.forward_head(encoder, x)

    before = encoder(inputs)
    insert(encoder, Shift())
    assert not torch.allclose(encoder(inputs), before)
    remove(encoder)
    assert torch.equal(encoder(inputs), before)


def test_every_parameter_has_a_layer(case):
    encoder = case[0]
    layers = {name: layer_of_parameter(encoder, name) for name, _ in encoder.named_parameters()}
    assert layers["registers"] == layers["patch_embed.proj.weight"] == 0
    assert layers["blocks.1.attn.qkv.weight"] == 2
    assert layers["norm.bias"] == 4
    with pytest.raises(UsageError, match="it is not known how far from the head 'other' is"):
        layer_of_parameter(encoder, "other")


def test_blocks_that_need_the_whole_grid_say_so():
    encoder = WholeGrid((4, 4, 4), (2, 2, 2)).eval()
    assert tokens(encoder, torch.zeros(1, 2, 4, 4, 4)).patches.shape == (1, 8, 24)
    with pytest.raises(UsageError, match="WholeGrid read a token's neighbours from the whole grid"):
        embed(encoder, torch.zeros(1, 2, 4, 4, 4), keep=torch.zeros(1, 3, dtype=torch.int64))


def test_a_class_that_is_derived_is_of_the_nearest_family():
    assert family_of(WholeGrid((4, 4, 4), (2, 2, 2))).drops_tokens is False
    assert isinstance(PatchEmbed(8, 4, 3, 8), nn.Module)
    assert not has_tokens(PatchEmbed(8, 4, 3, 8))
    plain = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1)
    assert isinstance(plain, Encoder)
    assert not isinstance(PatchEmbed(8, 4, 3, 8), Encoder)
