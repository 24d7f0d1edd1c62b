"""Published settings: one rule for all loaders."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import patchloom as pl
from mae_published import autoencode, decoder_layout, norm_layout, vit_layout
from patchloom.errors import UsageError
from patchloom.models.published_settings import Hidden, OneOf, Settings, epsilon_of, name_of, set_epsilon
from tests_support import finetuned_layout, pretraining_layout

KNOWN = Settings(
    obeyed=("num_heads", "layer_norm_eps"),
    idle=("drop_rate",),
    fixed={"act": ("gelu",)},
    other_names={"heads": "num_heads", "norm_layer": "layer_norm_eps", "act_layer": "act"},
    sections={"student": {"width": "embed_dim"}, "optim": None},
    read={"layer_norm_eps": epsilon_of, "act": name_of},
)
TOLD = {
    "embed_dim": 24,
    "patch_size": 4,
    "mlp_ratio": Hidden(24, 50),
    "num_classes": None,
    "ffn": OneOf(("mlp", "plain")),
}


def test_what_is_told_is_checked_what_is_not_is_obeyed_the_rest_passed_over():
    config = {
        "heads": 3,
        "norm_layer": partial(nn.LayerNorm, eps=1e-3),
        "act_layer": nn.GELU,
        "drop_rate": 0.5,
        "student": {"width": 24, "patch_size": (4, 4)},
        "optim": {"anything": 1},
        "lr": 1e-3,
        "num_classes": 1000,
        "mlp_ratio": 2.1,
        "ffn": "plain",
        "model_type": "vit",
        "layer_norm_eps": 1e-3,
    }
    assert KNOWN.settle(config, TOLD) == {"num_heads": 3, "layer_norm_eps": 1e-3}
    assert KNOWN.settle({"num_heads": None, "norm_layer": "LayerNorm"}, TOLD) == {}
    # A side and a square are the same size.
    assert KNOWN.settle({"patch_size": 4, "student": {"patch_size": [4, 4]}}, TOLD) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_head": 3}, "unknown setting 'num_head'; did you mean num_heads"),
        ({"embed_dim": 48}, "embed_dim=48, but the checkpoint's tensors say 24"),
        ({"student": {"width": 48}}, "embed_dim=48, but the checkpoint's tensors say 24"),
        ({"student": {"wide": 48}}, "unknown setting 'wide'"),
        ({"mlp_ratio": 4}, "mlp_ratio=4, but the checkpoint's tensors say 2.08"),
        ({"ffn": "swiglu"}, "ffn=swiglu, but the checkpoint's tensors say mlp or plain"),
        ({"act": "relu"}, "act=relu is not computed here: in published models it is gelu"),
        ({"heads": 3, "num_heads": 4}, "heads=3 and num_heads=4 are one setting here and differ"),
        ({"patch_size": (4, 8)}, r"patch_size=\(4, 8\), but"),
    ],
)
def test_what_contradicts_or_is_unknown_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        KNOWN.settle(config, TOLD)


@pytest.mark.parametrize(("ratio", "gated", "hidden"), [(2.7, False, 64), (4.0, True, 64), (6.0, True, 96)])
def test_a_ratio_is_held_against_the_width_it_gives(ratio, gated, hidden):
    found = Hidden(24, hidden, gated)
    assert found.admits(ratio)
    assert not found.admits(ratio + 0.2)
    if not gated:
        assert int(24 * found.ratio) == hidden


def test_an_epsilon_is_set_and_what_a_bundle_loses_is_said():
    model = nn.Sequential(nn.LayerNorm(4, eps=1e-6), nn.LayerNorm(4, eps=1e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_epsilon(model, None)
        set_epsilon(model, 1e-6)
    with pytest.warns(UserWarning, match="a bundle of it would lose it"):
        set_epsilon(model, 1e-5)
    assert {norm.eps for norm in model} == {1e-5}


def test_maes_configurations_are_taken_whole_and_their_epsilon_obeyed():
    width, patch, grid = 24, 4, (4, 4)
    state = vit_layout(2, width, patch, grid) | norm_layout("norm", width) | decoder_layout(2, 16, width, patch, 16)
    constructor = {
        "img_size": 16,
        "patch_size": patch,
        "in_chans": 3,
        "embed_dim": width,
        "depth": 2,
        "num_heads": 3,
        "decoder_embed_dim": 16,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
        "mlp_ratio": 4.0,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "norm_pix_loss": False,
        "blr": 1.5e-4,
        "warmup_epochs": 40,
    }
    hidden = len(state["blocks.0.mlp.fc1.weight"])
    transformers = {
        "model_type": "vit_mae",
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": 16,
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
        "decoder_num_attention_heads": 2,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2,
        "mask_ratio": 0.75,
        "norm_pix_loss": False,
        "decoder_intermediate_size": len(state["decoder_blocks.0.mlp.fc1.weight"]),
    }
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    expected = autoencode(state, images, noise, 0.75, heads=3, decoder_heads=2, norm_pix=False)
    for config in (constructor, transformers):
        found = pl.load_reference("mae", state, **config)(images, noise=noise)
        torch.testing.assert_close(found.pred.double(), expected["pred"].double(), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="epsilon 0.001"):
        model = pl.load_reference("mae", state, **{**transformers, "layer_norm_eps": 1e-3})
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-3}
    with pytest.raises(UsageError, match="decoder_depth=8, but the checkpoint's tensors say 2"):
        pl.load_reference("mae", state, **{**transformers, "decoder_num_hidden_layers": 8})


def test_ccvits_scripts_settings_are_taken_whole():
    state = pretraining_layout(depth=3, width=24, heads=3, grid=4, patch=4, vocab=11, condenser=2)
    script = {
        "model": "ccvit_base_patch16_224_8k_vocab_cls_pt",
        "rel_pos_bias": True,
        "abs_pos_emb": False,
        "layer_scale_init_value": 0.1,
        "use_dual_loss": True,
        "num_mask_patches": 75,
        "num_replaced_patches": 20,
        "input_size": 16,
        "second_input_size": 224,
        "drop_path": 0.0,
        "early_layers": 2,
        "head_layers": 2,
        "shared_lm_head": False,
        "codebook_size": 11,
        "opt_betas": None,
        "centroids_path": "",
        "kmeans_index": "",
    }
    model = pl.load_reference("ccvit", state, **script)
    assert model.early_layers == 2
    with pytest.raises(UsageError, match="head_layers=1, but the checkpoint's tensors say 2"):
        pl.load_reference("ccvit", state, **{**script, "head_layers": 1})
    tuned = finetuned_layout(depth=2, width=24, heads=3, grid=4, patch=4, classes=7)
    settings = {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 7,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "qk_scale": None,
        "init_values": 0.1,
        "use_rel_pos_bias": True,
        "use_abs_pos_emb": False,
        "use_shared_rel_pos_bias": False,
        "use_mean_pooling": True,
        "init_scale": 0.001,
    }
    assert pl.load_reference("ccvit", tuned, **settings)(torch.zeros(1, 3, 16, 16)).shape == (1, 7)


def test_g2sds_scripts_settings_are_taken_whole():
    vit = vit_layout(2, 24, 4, (4, 4)) | norm_layout("norm", 24)
    generator = torch.Generator().manual_seed(0)
    heads = {"dist_token": (1, 1, 24), "head.weight": (7, 24), "head.bias": (7,)}
    heads |= {"head_dist.weight": (7, 24), "head_dist.bias": (7,)}
    state = vit | {name: torch.randn(shape, generator=generator) for name, shape in heads.items()}
    script = {
        "model": "vit_small_patch16",
        "input_size": 16,
        "drop_path": 0.0,
        "global_pool": False,
        "nb_classes": 7,
        "teacher_path": "",
        "teacher_model": "vit_base_patch16",
        "enable_nkd": False,
        "layer_decay": 0.75,
        "reprob": 0.25,
    }
    model = pl.load_reference("g2sd", state, num_heads=3, **script)
    assert model.eval_head == "mean"
    assert pl.load_reference("g2sd", state, num_heads=3, **{**script, "enable_nkd": True}).eval_head == "cls"
    with pytest.raises(UsageError, match="num_classes=1000, but the checkpoint's tensors say 7"):
        pl.load_reference("g2sd", state, num_heads=3, **{**script, "nb_classes": 1000})
