"""The masked autoencoder against its formulas, and the facts its speed rests on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mae_published import patches_hwc
from patchloom.encoders import create_encoder, grid_size, num_prefix_tokens
from patchloom.encoders.masked_autoencoder import (
    MaskedAutoencoder,
    has_fixed_positions,
    initialize_as_mae,
    mae_loss,
    random_masking,
    sincos_positions,
    visible_count,
)
from patchloom.errors import UsageError

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4},
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4},
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4},
    "ccvit_tiny_patch4_32": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "eva02_tiny_patch14_224": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4},
    "vit_small_patch16_rope_mixed_224": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4},
}


def autoencoder(name: str = "vit_tiny_patch16_224", size: Any = 16, **settings: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = create_encoder(name, image_size=size, **FAMILIES[name])
    model = MaskedAutoencoder(encoder, **{"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def inputs(model: MaskedAutoencoder, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    h, w = model.grid
    images = torch.randn(count, model.in_chans, h * model.patch_size, w * model.patch_size, generator=generator)
    return images, torch.rand(count, h * w, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_predicts_hidden_patches_from_visible_ones_alone(name):
    model = autoencoder(name)
    images, noise = inputs(model)
    before = model(images, noise=noise)
    assert before.latent.shape[1] == num_prefix_tokens(model.encoder) + 4
    hidden = before.mask.bool().unflatten(1, model.grid)
    pixels = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    after = model(torch.where(pixels, torch.randn_like(images), images), noise=noise)
    torch.testing.assert_close(after.pred, before.pred)  # what was hidden was not seen
    assert not torch.allclose(after.loss, before.loss)
    shown = model(torch.where(pixels, images, torch.randn_like(images)), noise=noise)
    assert not torch.allclose(shown.pred, before.pred)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_alone_and_its_gradient_are_those_of_the_whole(name):
    model = autoencoder(name)
    images, noise = inputs(model)
    gradients = []
    for compute in (lambda: model(images, noise=noise).loss, lambda: model.loss(images, noise=noise)):
        model.zero_grad()
        value = compute()
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1])
    for whole, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, whole, atol=1e-4, rtol=1e-3)


def test_blocks_run_on_visible_tokens_only():
    model = autoencoder()
    lengths: list[int] = []
    hooks = [b.register_forward_hook(lambda m, i, o: lengths.append(o.shape[1])) for b in model.encoder.blocks]
    model.loss(*inputs(model)[:1], mask_ratio=0.75)
    for hook in hooks:
        hook.remove()
    assert lengths == [1 + 4, 1 + 4]


def test_masks_follow_the_noise():
    x = torch.arange(12.0).view(1, 6, 2)
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7, 0.2]])
    kept, mask, restore = random_masking(x, 0.5, noise)
    assert kept[0, :, 0].tolist() == [2, 10, 6]  # patches 1, 5, 3, in ascending order of their noise
    assert mask.tolist() == [[1, 0, 1, 0, 1, 0]]
    assert restore.tolist() == [[3, 0, 5, 2, 4, 1]]


@given(patches=st.integers(2, 400), ratio=st.floats(0.01, 0.99))
def test_what_is_hidden_and_what_is_visible_make_up_the_image(patches, ratio):
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        with pytest.raises(UsageError):
            visible_count(patches, ratio)
        return
    kept, mask, restore = random_masking(torch.zeros(2, patches, 1), ratio)
    assert kept.shape[1] == visible
    assert mask.sum(1).tolist() == [patches - visible] * 2
    assert all(sorted(row) == list(range(patches)) for row in restore.tolist())


def test_counts_are_the_published_ones():
    assert [visible_count(n, 0.9) for n in (196, 64, 784)] == [19, 6, 78]
    assert visible_count(196, 0.75) == 49


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.0, "mask_ratio is 0.0; it must be above 0 and below 1"),
        (1.0, "mask_ratio is 1.0; it must be above 0"),
        (0.97, "mask_ratio 0.97 leaves none of 16 patches visible; at most 0.938 does"),
        (0.0, "above 0"),
    ],
)
def test_ratios_that_hide_nothing_or_all_are_refused(ratio, message):
    model = autoencoder()
    with pytest.raises(UsageError, match=message):
        model(inputs(model)[0], mask_ratio=ratio)


def test_noise_and_images_of_another_size_are_refused():
    model = autoencoder()
    images, _ = inputs(model)
    with pytest.raises(UsageError, match=r"the noise has shape \(2, 15\); one number per patch is \(2, 16\)"):
        model(images, noise=torch.rand(2, 15))
    with pytest.raises(UsageError, match="images of 32x32 pixels; the model was made for 16x16"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(UsageError, match="image size 30 is not divisible by patch size 4; use 28 or 32"):
        model(torch.randn(1, 3, 30, 32))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_is_its_formula(norm_pix):
    generator = torch.Generator().manual_seed(0)
    patches, pred = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 5, 12, generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    errors = []
    for b, n in mask.nonzero().tolist():
        target = patches[b, n].double()
        if norm_pix:
            spread = ((target - target.mean()) ** 2).sum() / 11
            target = (target - target.mean()) / (spread + 1e-6) ** 0.5
        errors.append(((pred[b, n].double() - target) ** 2).mean())
    torch.testing.assert_close(mae_loss(patches, pred, mask, norm_pix).double(), torch.stack(errors).mean())
    with pytest.raises(UsageError, match="no patch is hidden"):
        mae_loss(patches, pred, torch.zeros(2, 5), norm_pix)


def test_constant_patches_and_half_precision_give_finite_losses():
    flat = torch.full((1, 2, 12), 300.0)
    assert torch.isfinite(mae_loss(flat.half(), torch.zeros(1, 2, 12).half(), torch.ones(1, 2)))


def test_positions_are_sines_and_cosines_of_column_then_row():
    table = sincos_positions(8, (2, 3), prefix=2)
    assert table[:2].abs().sum() == 0
    for row in range(2):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (k / 2) for k in range(2)]
                expected += [torch.tensor(angles).sin(), torch.tensor(angles).cos()]
            torch.testing.assert_close(table[2 + row * 3 + column], torch.cat(expected))
    with pytest.raises(UsageError, match="divisible by 4, not 6"):
        sincos_positions(6, (2, 2))


def test_reconstructions_are_unnormalised_and_keep_what_was_visible():
    """A network that predicts the normalised target perfectly gives the original image back."""
    for norm_pix in (True, False):
        model = autoencoder(norm_pix_loss=norm_pix)
        images, noise = inputs(model)
        target = patches_hwc(images, 4)
        if norm_pix:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        model.decode = lambda latent, restore, target=target: target  # type: ignore[method-assign]
        torch.testing.assert_close(model.reconstruct(images, noise=noise), images, atol=1e-5, rtol=1e-5)
    plain = autoencoder()
    images, noise = inputs(plain)
    shown, mask = plain.reconstruct(images, noise=noise), plain(images, noise=noise).mask.bool()
    cells = patches_hwc(shown - images, 4).abs().amax(-1)
    assert (cells[~mask] == 0).all()
    assert (cells[mask] > 0).all()


def test_grids_that_are_not_square_and_one_channel_work():
    encoder = create_encoder("vit_tiny_patch16_224", image_size=(8, 20), in_chans=1, **FAMILIES["vit_tiny_patch16_224"])
    model = MaskedAutoencoder(encoder, 16, 1, 2)
    output = model(torch.randn(2, 1, 8, 20), mask_ratio=0.5)
    assert output.pred.shape == (2, 10, 16)
    assert model.reconstruct(torch.randn(2, 1, 8, 20), 0.5).shape == (2, 1, 8, 20)


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=4)
    initialize_as_mae(encoder)
    assert has_fixed_positions(encoder)
    assert not encoder.pos_embed.requires_grad
    torch.testing.assert_close(encoder.pos_embed[0], sincos_positions(192, grid_size(encoder)))
    weight = encoder.blocks[0].mlp.fc1.weight
    assert abs(weight.abs().max() - (6 / (192 + 768)) ** 0.5) < 1e-3
    kernel = encoder.patch_embed.proj.weight
    assert abs(kernel.abs().max() - (6 / (192 + 48)) ** 0.5) < 2e-3
    assert abs(encoder.cls_token.std() - 0.02) < 0.004
    learned = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=4)
    initialize_as_mae(learned, fixed_positions=False)
    assert learned.pos_embed.requires_grad
    assert not has_fixed_positions(learned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_depth": 0}, "decoder_depth is 0; it must be at least 1"),
        ({"decoder_heads": 3}, "decoder_dim 16 is not divisible by decoder_heads 3"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "divisible by 4, not 18"),
    ],
)
def test_impossible_decoders_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        autoencoder(**settings)
