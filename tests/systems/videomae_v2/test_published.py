"""Published VideoMAE V2 layouts, every tensor randomised, against the paper's arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import patchloom as pl
import videomae_formulas as formulas
from patchloom.encoders import normalize
from patchloom.encoders.masking import draw_running_cell_mask, draw_tube_mask
from patchloom.errors import UsageError
from patchloom.systems.videomae_v2.model import VideoMaskedAutoencoder, dual_mask_loss, video_targets
from patchloom.systems.videomae_v2.published import select_head_rows

WIDTH, DEPTH, HEADS, PATCH, DECODER = 24, 2, 3, 8, 16
GRID = (4, 4, 6)
SETTINGS = {"num_heads": HEADS, "decoder_num_heads": 2, "img_size": (32, 48), "num_frames": 8}
VARIANTS = [{}, {"cos_attn": True}, {"gamma": True}, {"hidden": 50}, {"bias": False}]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pretraining(**variant):
    return formulas.pretraining_layout(WIDTH, DEPTH, HEADS, PATCH, DECODER, 2, 2, seeded(), **variant)


def classifier(norm="fc_norm", **variant):
    generator = seeded(1)
    state = formulas.encoder_layout(WIDTH, DEPTH, HEADS, PATCH, generator, **variant)
    head = {"head.weight": torch.randn(5, WIDTH, generator=generator), "head.bias": torch.randn(5, generator=generator)}
    return state | formulas.norm_layout(norm, WIDTH, generator) | head


def clips(count=2, size=(8, 32, 48)):
    return torch.rand(count, 3, *size, generator=seeded(2))


def masks(count=2, decoded=True):
    generator = seeded(3)
    hidden = torch.stack([draw_tube_mask(GRID, 0.75, generator).flatten() for _ in range(count)])
    if not decoded:
        return hidden, ~hidden
    return hidden, torch.stack([draw_running_cell_mask(GRID, 0.5, generator).flatten() for _ in range(count)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dual", [True, False])
def test_pretraining_predicts_as_the_formula(variant, dual):
    state = pretraining(**variant)
    model = pl.load_reference("videomae_v2", {"model": state}, **SETTINGS)
    assert isinstance(model, VideoMaskedAutoencoder)
    hidden, left_out = masks(decoded=dual)
    inputs = clips() * 2 - 1
    expected = formulas.predictions(state, inputs, hidden, left_out, PATCH, HEADS, 2)
    told = model(inputs, hidden, left_out)
    torch.testing.assert_close(told.double(), expected, atol=1e-5, rtol=1e-5)
    if not dual:
        torch.testing.assert_close(model(inputs, hidden), told)


@pytest.mark.parametrize("variant", [{}, {"cos_attn": True}])
def test_the_loss_is_of_what_is_decoded_and_hidden(variant):
    state = pretraining(**variant)
    model = pl.load_reference("videomae_v2", state, **SETTINGS)
    hidden, left_out = masks()
    pixels = clips()
    inputs = normalize(pixels, model.encoder)
    wanted = formulas.targets(pixels, PATCH)
    expected = formulas.loss(
        formulas.predictions(state, inputs, hidden, left_out, PATCH, HEADS, 2), wanted, hidden, left_out
    )
    torch.testing.assert_close(video_targets(pixels, (2, PATCH, PATCH)).double(), wanted, atol=1e-4, rtol=1e-4)
    told = dual_mask_loss(model(inputs, hidden, left_out), model.targets(inputs), hidden, left_out)
    for loss in (told, model.loss(inputs, hidden, left_out), model.loss(inputs, hidden, left_out, pixels)):
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    every = model.loss(inputs, hidden, left_out, loss_on="decoded").detach()
    assert float(every) == pytest.approx(float(formulas.loss(
        formulas.predictions(state, inputs, hidden, left_out, PATCH, HEADS, 2), wanted,
        torch.ones_like(hidden), left_out)), rel=1e-5)  # fmt: skip


@pytest.mark.parametrize("norm", ["fc_norm", "norm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_classifiers_of_both_poolings_answer_as_the_formula(norm, variant):
    state = classifier(norm, **variant)
    model = pl.load_reference("videomae_v2", {"module": state}, **SETTINGS, use_mean_pooling=norm == "fc_norm")
    torch.testing.assert_close(
        model(clips()).double(), formulas.logits(state, clips(), PATCH, HEADS), atol=1e-5, rtol=1e-5
    )
    other = clips(1, (4, 16, 16))  # another size than it was set up for
    torch.testing.assert_close(model(other).double(), formulas.logits(state, other, PATCH, HEADS), atol=1e-5, rtol=1e-5)


def test_positions_are_interpolated_as_published_finetuning_does_where_that_is_asked_for():
    state = classifier()
    model = pl.load_reference("videomae_v2", state, **SETTINGS, positions="interpolated")
    table = formulas.table(8 * 28 * 28, WIDTH).float().view(8, 28, 28, WIDTH)
    space = F.interpolate(table.permute(0, 3, 1, 2), size=(4, 6), mode="bicubic", align_corners=False)
    lines = space.permute(2, 3, 1, 0).flatten(0, 1)
    both = F.interpolate(lines, size=4, mode="linear", align_corners=False).view(4, 6, WIDTH, 4).permute(3, 0, 1, 2)
    expected = formulas.logits(state, clips(), PATCH, HEADS, both.reshape(-1, WIDTH).double())
    torch.testing.assert_close(model(clips()).double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, formulas.logits(state, clips(), PATCH, HEADS))


@pytest.mark.parametrize("prefix", ["encoder.", "backbone.", "module.encoder.", "_orig_mod.encoder."])
def test_an_encoder_alone_pools_the_mean_of_its_normed_tokens(prefix):
    generator = seeded(4)
    state = formulas.encoder_layout(WIDTH, DEPTH, HEADS, PATCH, generator) | formulas.norm_layout(
        "norm", WIDTH, generator
    )
    model = pl.load_reference("videomae_v2", {f"{prefix}{n}": v for n, v in state.items()}, **SETTINGS)
    doubled = {name: value.double() for name, value in state.items()}
    tokens = formulas.embedded(doubled, clips()[0].double(), PATCH)
    tokens = formulas.encoded(doubled, tokens + formulas.table(*tokens.shape), HEADS)
    expected = formulas.normed(doubled, "norm", tokens).mean(0)
    torch.testing.assert_close(model(clips())[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_what_contradicts_the_tensors_is_refused():
    with pytest.raises(UsageError, match=r"use_mean_pooling|global_pool"):
        pl.load_reference("videomae_v2", classifier("norm"), **SETTINGS, use_mean_pooling=True)
    with pytest.raises(UsageError, match="num_heads=5 does not divide"):
        pl.load_reference("videomae_v2", classifier(), num_heads=5)
    with pytest.raises(UsageError, match="missing: mask_token"):
        pl.load_reference("videomae_v2", {n: v for n, v in pretraining().items() if n != "mask_token"}, **SETTINGS)
    with pytest.raises(UsageError, match=r"missing: .*blocks\.1\.norm1\.weight"):
        pl.load_reference(
            "videomae_v2", {n: v for n, v in classifier().items() if n != "blocks.1.norm1.weight"}, **SETTINGS
        )
    with pytest.raises(UsageError, match="unknown setting"):
        pl.load_reference("videomae_v2", classifier(), **SETTINGS, colour="red")


def test_a_published_configuration_is_understood_whole():
    given = {
        "img_size": (32, 48), "patch_size": PATCH, "encoder_in_chans": 3, "encoder_num_classes": 0,
        "encoder_embed_dim": WIDTH, "encoder_depth": DEPTH, "encoder_num_heads": HEADS, "decoder_num_classes": 384,
        "decoder_embed_dim": DECODER, "decoder_depth": 2, "decoder_num_heads": 2, "mlp_ratio": 4, "qkv_bias": True,
        "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.1, "init_values": 0.0,
        "use_learnable_pos_emb": False, "tubelet_size": 2, "num_classes": 0, "in_chans": 3, "with_cp": False,
        "all_frames": 8, "cos_attn": False, "mask_ratio": 0.9, "normlize_target": True,
    }  # fmt: skip
    model = pl.load_reference("videomae_v2", pretraining(), **given)
    assert model.grid == GRID
    assert model.encoder.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)


def test_rows_of_a_head_are_selected():
    state = classifier()
    some = select_head_rows(state, [3, 0])
    assert torch.equal(some["head.weight"], state["head.weight"][[3, 0]])
    assert torch.equal(some["head.bias"], state["head.bias"][[3, 0]])
    assert pl.load_reference("videomae_v2", some, **SETTINGS)(clips()).shape == (2, 2)
    with pytest.raises(UsageError, match="no class 5"):
        select_head_rows(state, [5])
