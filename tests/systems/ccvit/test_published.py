"""Published checkpoints: both layouts go in, all tensors counted."""

from __future__ import annotations

import argparse
import warnings

import pytest
import torch
from torch import Tensor

import patchloom as pl
from patchloom.encoders import resize_relative_table
from patchloom.errors import UsageError
from tests_support import finetuned_layout, pretraining_layout

RELATIVE = "rel_pos_bias.relative_position_bias_table"


def test_pretraining_layout_gives_a_model_of_its_shapes():
    state = pretraining_layout(depth=3, width=24, heads=3, grid=4, patch=4, vocab=11, condenser=2)
    model = pl.load_reference("ccvit", {"model": {f"module.{k}": v for k, v in state.items()}}, early_layers=2)
    assert not model.training
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 3:7] = True
    output = model(torch.randn(2, 3, 16, 16), masked)
    assert output.token_logits.shape == (8, 11)
    assert output.pixels.shape == (8, 48)
    assert model.early_layers == 2
    torch.testing.assert_close(model.condenser[1].mlp.fc1.weight, state["cls_pt_layers.1.mlp.fc1.weight"])
    torch.testing.assert_close(model.condenser_head.weight, state["cls_pt_lm_head.weight"])


def test_shared_head_is_told_by_its_missing_tensors():
    state = pretraining_layout(depth=3, width=24, heads=3, grid=4, patch=4, vocab=11, condenser=1)
    state = {k: v for k, v in state.items() if not k.startswith(("cls_pt_norm", "cls_pt_lm_head"))}
    output = pl.load_reference("ccvit", state, early_layers=1)(
        torch.randn(1, 3, 16, 16), torch.ones(1, 16, dtype=torch.bool)
    )
    assert output.pixels is None
    assert output.condenser_logits.shape == (16, 11)


def test_finetuned_layout_pools_as_written_out():
    state = finetuned_layout(depth=2, width=24, heads=3, grid=3, patch=4, classes=7)
    model = pl.load_reference("ccvit", {"model": state})
    images = torch.randn(2, 3, 12, 12)
    patches = model.forward_features(images)[:, 1:]
    pooled = torch.nn.functional.layer_norm(
        patches.mean(1), (24,), state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6
    )
    expected = pooled @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_grids_that_are_not_square_need_the_image_size():
    state = pretraining_layout(depth=2, width=24, heads=3, grid=(2, 4), patch=4, vocab=5, condenser=1)
    with pytest.raises(UsageError, match="image_size"):
        pl.load_reference("ccvit", state)
    model = pl.load_reference("ccvit", state, image_size=(8, 16), early_layers=1)
    assert model(torch.randn(1, 3, 8, 16), torch.ones(1, 8, dtype=torch.bool)).pixels.shape == (8, 48)


def test_a_model_without_layer_scale_has_none():
    state = pretraining_layout(depth=2, width=24, heads=3, grid=3, patch=4, vocab=5, condenser=1)
    state = {name: value for name, value in state.items() if ".gamma_" not in name and not name.startswith("gamma_")}
    model = pl.load_reference("ccvit", state, early_layers=1)
    assert model.encoder.blocks[0].gamma_1 is None
    assert torch.isfinite(model(torch.randn(1, 3, 12, 12)).token_logits).all()


def test_without_masks_nothing_is_hidden_and_every_patch_predicted():
    state = pretraining_layout(depth=2, width=24, heads=3, grid=3, patch=4, vocab=5, condenser=1)
    model = pl.load_reference("ccvit", state, early_layers=1)
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(model(images), model(images, return_all_tokens=True))
    assert model(images).token_logits.shape == (18, 5)


@pytest.mark.parametrize("size", [20, (12, 20)])
def test_another_size_resamples_tables_and_positions(size):
    state = finetuned_layout(depth=2, width=24, heads=3, grid=4, patch=4, classes=7)
    table = "rel_pos_bias.relative_position_bias_table"
    name = table if table in state else "blocks.0.attn.relative_position_bias_table"
    state["pos_embed"] = torch.randn(1, 17, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grids that are not square are resampled another way, and it is said
        model = pl.load_reference("ccvit", state, img_size=size)
        grid = (5, 5) if size == 20 else (3, 5)
        expected = resize_relative_table(state[name], (4, 4), grid)
    torch.testing.assert_close(model.state_dict()[name], expected)
    maps = state["pos_embed"][:, 1:].view(1, 4, 4, 24).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)
    maps = torch.nn.functional.interpolate(maps, scale_factor=scale, mode="bicubic")
    torch.testing.assert_close(model.pos_embed[:, 1:], maps.flatten(2).transpose(1, 2))
    assert model(torch.randn(1, 3, grid[0] * 4, grid[1] * 4)).shape == (1, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda s: s.pop("lm_head.bias"), "missing: lm_head.bias"),
        (lambda s: s.pop("cls_pt_lm_head.weight"), "missing: cls_pt_lm_head.weight"),
        (lambda s: s.pop("cls_pt_norm.bias"), "missing: cls_pt_norm.bias"),
        (lambda s: s.pop("blocks.0.attn.q_bias"), "missing: blocks.0.attn.q_bias"),
        (
            lambda s: s.update({"rel_pos_bias.relative_position_index": s.pop(RELATIVE).long()}),
            f"missing: {RELATIVE}",
        ),
        (lambda s: s.pop("blocks.1.attn.q_bias"), "missing: blocks.1.attn.q_bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected: surprise"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias \(3,\) instead of \(24,\)"),
    ],
)
def test_tensors_missing_left_over_or_misshapen_are_named(change, message):
    state: dict[str, Tensor] = pretraining_layout(depth=2, width=24, heads=3, grid=3, patch=4, vocab=5, condenser=1)
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("ccvit", state, early_layers=1)


def test_unknown_settings_and_systems_are_refused():
    state = pretraining_layout(depth=2, width=24, heads=3, grid=3, patch=4, vocab=5, condenser=1)
    with pytest.raises(UsageError, match="did you mean early_layers"):
        pl.load_reference("ccvit", state, early_layer=1)
    assert pl.load_reference("ccvit", state, early_layers=1, depth=2, vocab_size=5, shared_lm_head=False)
    assert pl.load_reference("ccvit", state, early_layers=1, shared_head=False, patch_size=(4, 4))
    with pytest.raises(UsageError, match="depth=3, but the checkpoint's tensors say 2"):
        pl.load_reference("ccvit", state, early_layers=1, depth=3)
    with pytest.raises(UsageError, match="did you mean ccvit"):
        pl.load_reference("cvit", state)
    with pytest.raises(UsageError, match="no tensors"):
        pl.load_reference("ccvit", {"epoch": 3})


def test_a_file_with_its_command_line_in_it_is_read_without_unpickling(tmp_path):
    state = pretraining_layout(depth=2, width=24, heads=3, grid=3, patch=4, vocab=5, condenser=1)
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 7}, tmp_path / "checkpoint.pth")
    assert pl.load_reference("ccvit", tmp_path / "checkpoint.pth", early_layers=1).vocab_size == 5
    with pytest.raises(UsageError, match="there is no checkpoint file"):
        pl.load_reference("ccvit", tmp_path / "none.pth")
