"""PH-Reg of CLIP towers: what the last blocks compute, what trains, a run from open_clip's names to a bundle."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import load as load_bundle
from patchloom.systems.ph_reg.clip import (
    CLIPPHReg,
    CLIPTeacher,
    DenseCLIP,
    NeighbourhoodAttentionLastBlock,
    ValueOnlyLastBlock,
    neighbourhood,
)
from patchloom.systems.ph_reg.saved import load_dense
from patchloom.systems.ph_reg.towers import _theirs, open_tower
from small_images import write_images

QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "num_workers": 0, "accelerator": "cpu", "probe_every": 0}
QUICK |= {"health_every": 0, "registers": 2, "views": 3, "image_size": 40, "precision": "32-true"}
CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tower(seed: int = 0) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(seed)
    size = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
    encoder = create_encoder("vit_base_patch16_clip_quickgelu_224", image_size=40, **size)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return encoder.eval(), torch.randn(32, 12)


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> tuple[str, Any]:
    """A tiny CLIP that open_clip knows by name, and its weights in a file."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "Tiny-Test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "Tiny-Test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("Tiny-Test", pretrained=None).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"open_clip:Tiny-Test/{folder / 'weights.pt'}", model


def test_a_tower_of_open_clip_computes_the_same_in_timm(named):
    name, model = named
    encoder, projection = open_tower(name)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.visual(images)
        found = encoder(images) @ projection
    assert torch.allclose(found, expected, atol=1e-5)


def test_patches_nearby_count_for_more():
    found = neighbourhood((3, 4), 2.0)
    assert found.shape == (12, 12)
    assert found.diagonal().tolist() == [1.0] * 12
    assert float(found[0, 11]) == pytest.approx(np.exp(-(4 + 9) / 8))
    assert float(found[1, 6]) == pytest.approx(np.exp(-(1 + 1) / 8))


def test_values_alone_do_not_mix_tokens_and_neighbours_do():
    encoder, _ = tower()
    x = torch.randn(1, 26, 32)
    other = x.clone()
    other[:, 3] = torch.randn(32)
    alone, mixing = ValueOnlyLastBlock(encoder.blocks[-1]), NeighbourhoodAttentionLastBlock(encoder.blocks[-1], 1.0)
    changed = (alone(x, (5, 5)) != alone(other, (5, 5))).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3]
    assert bool((mixing(x, (5, 5)) != mixing(other, (5, 5))).any(-1).all())


def test_far_away_patches_count_for_nothing_where_keys_are_alike():
    encoder, _ = tower()
    attention = encoder.blocks[-1].attn
    with torch.no_grad():
        attention.qkv.weight[32:64] = 0  # all keys are the bias, so the neighbourhood alone decides
        attention.qkv.bias[32:64] = 0
    x = torch.randn(1, 26, 32)
    block = encoder.blocks[-1]
    values = torch.nn.functional.linear(block.norm1(x), attention.qkv.weight[64:], attention.qkv.bias[64:])
    bias = torch.zeros(26, 26)
    bias[1:, 1:] = neighbourhood((5, 5), 5.0)
    expected = attention.proj(bias.softmax(-1) @ values)
    assert torch.allclose(NeighbourhoodAttentionLastBlock(block)(x, (5, 5)), expected, atol=1e-5)


def test_the_last_two_blocks_train_and_what_is_not_read_does_not():
    encoder, projection = tower()
    model = CLIPPHReg(encoder, projection, num_registers=2, views=2, shift_fraction=0.3)
    assert {"reg_token", "pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.1.mlp.fc1.weight"} <= set(
        model.trained
    )
    assert not any(name.startswith(("blocks.0", "blocks.2.mlp", "blocks.2.norm2", "norm")) for name in model.trained)
    output = model(torch.randn(2, 3, 40, 40))
    assert output["target"].shape == output["student"].shape == (2, 5, 5, 12)
    output["loss"].backward()
    for name, parameter in model.student.named_parameters():
        assert (parameter.grad is not None) == (name in model.trained), name


def test_the_teacher_averages_what_neighbours_say():
    encoder, projection = tower()
    teacher = CLIPTeacher(encoder, projection, views=1, shift_fraction=0.3)
    images = torch.randn(2, 3, 40, 40)
    dense = DenseCLIP(encoder, projection, "neighbours")
    with torch.no_grad():
        expected = dense(images).unflatten(1, (5, 5))
    assert torch.allclose(teacher(images), expected, atol=1e-6)


@pytest.fixture(scope="module")
def run(named, tmp_path_factory):
    images = write_images(tmp_path_factory.mktemp("images") / "train", 4)
    out = tmp_path_factory.mktemp("run") / "r"
    return pl.clean("ph_reg", encoder=named[0], data=images, out=out, **QUICK)


def test_a_run_leaves_the_tower_as_a_bundle_and_as_a_dense_one(run, tmp_path):
    dense = pl.load(run.path)
    assert isinstance(dense, DenseCLIP)
    assert dense.readout == "values"
    images = torch.rand(2, 3, 40, 40)
    assert dense(images).shape == (2, 25, 12)
    assert dense(torch.rand(1, 3, 56, 48)).shape == (1, 42, 12)
    alone = timm.create_model(f"local-dir:{run.model}", pretrained=True, num_classes=0).eval()
    assert torch.equal(alone.forward_features(images), dense.encoder.forward_features(images))
    assert alone.reg_token.shape == (1, 2, 32)
    assert run.summary["distance_after"] != run.summary["distance_before"]
    with pytest.raises(UsageError, match="CLIP tower that was cleaned already"):
        pl.clean("ph_reg", encoder=run.path, data="photos", out=tmp_path / "again", **QUICK)


def test_a_dense_tower_is_diagnosed_in_the_space_of_texts(run, tmp_path, capsys):
    images = write_images(tmp_path / "images", 2)
    quick = {"num_workers": 0, "device": "cpu", "images": 6}
    figures = pl.clean("diagnose", encoder=run.path, data=images, **quick)
    assert figures["dim"] == 12
    assert "space of texts" in capsys.readouterr().err
    assert pl.clean("diagnose", encoder=load_bundle(run.path), data=images, **quick)["dim"] == 32


def test_a_projection_beside_another_vit_is_refused(run, tmp_path):
    import shutil

    shutil.copytree(run.model, tmp_path / "m")
    about = json.loads((tmp_path / "m" / "dense_clip.json").read_text())
    (tmp_path / "m" / "dense_clip.json").write_text(json.dumps(about | {"encoder": "0"}))
    with pytest.raises(UsageError, match="belongs to another ViT"):
        load_dense(tmp_path / "m")
    (tmp_path / "m" / "dense_clip.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        pl.load(tmp_path / "m")
    assert load_bundle(tmp_path / "m").reg_token.shape == (1, 2, 32)


def test_a_published_tower_is_imported_as_a_dense_one(tmp_path):
    encoder, projection = tower()
    state = {f"vit.{_theirs(name)}": value for name, value in encoder.state_dict().items()}
    state["vit.class_embedding"] = encoder.cls_token.detach().flatten()
    state["vit.positional_embedding"] = encoder.pos_embed.detach()[0]
    state |= {"vit.proj": projection, "register_tokens": torch.randn(2, 32)}
    torch.save(state, tmp_path / "s.pth")
    out = pl.import_reference("ph_reg", str(tmp_path / "s.pth"), str(tmp_path / "b"), {"num_heads": 2})
    images = torch.randn(1, 3, 40, 40)
    expected = pl.load_reference("ph_reg", state, num_heads=2)(images)
    assert torch.equal(pl.load(out)(images), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-Z-1/openai", "open_clip knows no model 'ViT-Z-1'"),
        ("open_clip:ViT-B-16", "give the weights behind a slash, open_clip:ViT-B-16/WEIGHTS: openai"),
        ("open_clip:ViT-B-16/nothing", "give the weights behind a slash"),
    ],
)
def test_towers_that_are_not_there_are_refused(name, message):
    pytest.importorskip("open_clip")
    with pytest.raises(UsageError, match=message):
        open_tower(name)


def test_other_channels_and_a_wrong_projection_are_refused(named, tmp_path):
    with pytest.raises(UsageError, match=r"takes 3 channels, not 1; set in_chans=3"):
        pl.clean("ph_reg", encoder=named[0], data="digits", out=tmp_path / "r", in_chans=1, **QUICK)
    with pytest.raises(UsageError, match=r"projection .* \(16, 12\), and the tower is 32 wide"):
        DenseCLIP(tower()[0], torch.zeros(16, 12))
    with pytest.raises(UsageError, match="neighbour_std is 0"):
        NeighbourhoodAttentionLastBlock(tower()[0].blocks[-1], 0)
