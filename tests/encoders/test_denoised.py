"""A denoiser behind an encoder: the formula, positions, layers, bundles."""

import copy
import math

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from patchloom.encoders import create_encoder, grid_size, image_size, intermediate_layers, set_image_size, tokens
from patchloom.encoders.denoised import Denoiser, denoised, denoising_loss, encoder_features
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def small_encoder(name="vit_tiny_patch16_224", **arguments):
    size = {"embed_dim": 64, "depth": 3, "num_heads": 2, "image_size": 32, **arguments}
    return randomised(create_encoder(name, patch_size=8, **size))


def block_in_float64(state, x, prefix, heads):
    """The pre-norm transformer block of Dosovitskiy et al. 2021, in numpy."""
    get = lambda name: state[f"{prefix}{name}"].double().numpy()  # noqa: E731
    erf = np.vectorize(math.erf)

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * get(f"{name}.weight") + get(f"{name}.bias")

    width = x.shape[-1]
    qkv = norm(x, "norm1") @ get("attn.qkv.weight").T + get("attn.qkv.bias")
    out = np.zeros_like(x)
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        q, k, v = (qkv[:, i * width : (i + 1) * width][:, part] for i in range(3))
        scores = q @ k.T / np.sqrt(width / heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, part] = weights / weights.sum(-1, keepdims=True) @ v
    x = x + out @ get("attn.proj.weight").T + get("attn.proj.bias")
    hidden = norm(x, "norm2") @ get("mlp.fc1.weight").T + get("mlp.fc1.bias")
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    return x + hidden @ get("mlp.fc2.weight").T + get("mlp.fc2.bias")


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_denoiser_is_positions_and_pre_norm_blocks(blocks):
    model = randomised(Denoiser(128, (3, 4), num_blocks=blocks))
    x = torch.randn(2, 3, 4, 128, generator=torch.Generator().manual_seed(1))
    expected = x.flatten(1, 2).double().numpy() + model.pos_embed.detach().double().numpy()
    for number in range(blocks):
        expected = np.stack([block_in_float64(model.state_dict(), one, f"blocks.{number}.", 2) for one in expected])
    found = model(x)
    assert found.shape == (2, 3, 4, 128)
    np.testing.assert_allclose(found.detach().flatten(1, 2).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_positions_are_resampled_for_another_grid_and_can_be_left_out():
    model = randomised(Denoiser(64, (4, 4)))
    without = Denoiser(64, (4, 4), pos_embed=False).eval()
    without.blocks.load_state_dict(model.blocks.state_dict())
    x = torch.randn(1, 5, 3, 64)
    positions = resample_abs_pos_embed(model.pos_embed, [5, 3], [4, 4], num_prefix_tokens=0).unflatten(1, (5, 3))
    torch.testing.assert_close(model(x), without(x + positions))
    assert "pos_embed" not in without.state_dict()


def test_an_encoder_in_front_is_frozen_and_gives_features_and_class_token():
    encoder = small_encoder()
    model = Denoiser(64, (4, 4), encoder=encoder).train()
    images = torch.randn(2, 3, 32, 32)
    features, prefix = encoder_features(encoder, images)
    found = model(images, return_dict=True)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(found["original_feats"], features)
    torch.testing.assert_close(found["class_tokens"], prefix[:, 0])
    maps, token = model(images, return_class_token=True, channels_first=True)
    torch.testing.assert_close(maps, found["denoised_feats"].permute(0, 3, 1, 2))
    torch.testing.assert_close(token, prefix[:, 0])
    found["denoised_feats"].sum().backward()
    assert model.pos_embed.grad is not None


def test_features_are_those_of_timms_forward_intermediates():
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):
        encoder = create_encoder(name, embed_dim=64, depth=2, num_heads=2, image_size=56, patch_size=14).eval()
        images = torch.randn(1, 3, 56, 56)
        for layer in (0, 1):
            (expected,) = encoder.forward_intermediates(images, indices=[layer], norm=True, intermediates_only=True)
            found, _ = encoder_features(encoder, images, layer)
            torch.testing.assert_close(found.permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_squared_error_and_one_minus_the_cosine():
    generator = torch.Generator().manual_seed(0)
    made, target = torch.randn(2, 5, 3, 8, generator=generator), torch.randn(2, 5, 3, 8, generator=generator)
    a, b = made.double().numpy(), target.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    found = denoising_loss(made, target)
    assert float(found["l2"]) == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert float(found["cosine"]) == pytest.approx(1 - cosine.mean(), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(((a - b) ** 2).mean() + 1 - cosine.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "beit_base_patch16_224"])
def test_a_denoised_encoder_gives_the_denoisers_features_and_the_encoders_prefix(name, tmp_path):
    encoder = small_encoder(name)
    denoiser = randomised(Denoiser(64, grid_size(encoder)), 3)
    images = torch.randn(2, 3, *image_size(encoder))
    features, prefix = encoder_features(encoder, images)
    before = intermediate_layers(encoder, images, [0, 1])
    model = denoised(copy.deepcopy(encoder), denoiser).eval()
    found = tokens(model, images)
    torch.testing.assert_close(found.patches, denoiser(features).flatten(1, 2))
    torch.testing.assert_close(found.prefix, prefix)
    # Other layers have the encoder's own norm.
    for own, other in zip(before, intermediate_layers(model, images, [0, 1]), strict=True):
        torch.testing.assert_close(own.patches, other.patches)
    save_bundle(model, tmp_path / "b")
    loaded = load(tmp_path / "b")
    torch.testing.assert_close(tokens(loaded, images).patches, found.patches)
    assert "opened_by" in (tmp_path / "b" / "patchloom.json").read_text()
    # Of another size, in a copy that is then set up for it.
    larger = set_image_size(copy.deepcopy(loaded), tuple(2 * side for side in image_size(encoder)))
    wide = torch.randn(1, 3, *image_size(larger))
    plain = set_image_size(copy.deepcopy(encoder), image_size(larger))
    torch.testing.assert_close(
        tokens(larger, wide).patches, denoiser(encoder_features(plain, wide)[0]).flatten(1, 2), atol=1e-5, rtol=1e-5
    )


def test_a_denoiser_of_an_earlier_block_cuts_off_those_behind(tmp_path):
    encoder = small_encoder()
    denoiser = randomised(Denoiser(64, (4, 4)), 3)
    images = torch.randn(1, 3, 32, 32)
    features, _ = encoder_features(encoder, images, layer=1)
    model = denoised(copy.deepcopy(encoder), denoiser, layer=1)
    save_bundle(model, tmp_path / "b")
    torch.testing.assert_close(tokens(load(tmp_path / "b"), images).patches, denoiser(features).flatten(1, 2))


def test_what_does_not_fit_is_refused():
    encoder = small_encoder()
    with pytest.raises(UsageError, match="width 128, and these are 64"):
        denoised(encoder, Denoiser(128, (4, 4)))
    with pytest.raises(UsageError, match="no block 9"):
        denoised(encoder, Denoiser(64, (4, 4)), layer=9)
    with pytest.raises(UsageError, match=r"\(B, H, W, 64\)"):
        Denoiser(64, (4, 4))(torch.randn(1, 16, 64))
    with pytest.raises(UsageError, match="no class token"):
        Denoiser(64, (4, 4))(torch.randn(1, 4, 4, 64), return_class_token=True)
    model = denoised(encoder, Denoiser(64, (4, 4)))
    with pytest.raises(UsageError, match="denoised already"):
        denoised(model, Denoiser(64, (4, 4)))
    with pytest.raises(UsageError, match="needs them all"):
        model.norm(torch.randn(1, 9, 64))
