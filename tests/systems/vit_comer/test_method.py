"""Segmentation with ViT-CoMer as a run: it learns, resumes exactly, and what it leaves behind segments images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.cli import main
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.segment.build import build_parts
from patchloom.segment.commands import export
from patchloom.segment.saved import Segmenter, load_segmenter, save_segmenter
from patchloom.systems.vit_comer.method import ViTCoMerMethod
from patchloom.systems.vit_comer.parts import CoMerBackbone, add_layer_scale, build, takes_any_size
from patchloom.training.run import resolve
from segment_support import paint_pairs

FAST = {"batch_size": 4, "num_workers": 0, "accelerator": "cpu", "width": 16, "image_size": 64, "probe_every": 0}
FAST |= {"conv_width": 4, "num_points": 2, "num_extra": 1}
SMALL = {"image_size": 32, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", patch_size=8, **SMALL)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(paint_pairs(root / "train", 8, (70, 90))), str(paint_pairs(root / "test", 2, (50, 66), seed=1))


def weights(run):
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"], checkpoint["step"]


@pytest.mark.slow
def test_a_run_learns_measures_and_predicts(bundle, folders, tmp_path):
    train, test = folders
    settings = {**FAST, "data": train, "encoder": bundle, "max_steps": 50, "lr": 1e-2, "layer_decay": 1.0}
    settings |= {"conv_width": 16, "drop_path": 0.0}
    run = pl.segment("vit_comer", out=tmp_path / "run", probe_data=test, colours=False, scale=(1.0, 1.0), **settings)
    assert run.summary["miou"] > 0.4  # all background: 0.27
    assert main(["segment", "predict", str(run.path), "--images", f"{test}/images", "--out", str(tmp_path / "p")]) == 0
    model = load_segmenter(run.path)
    assert isinstance(model.backbone, CoMerBackbone)
    for number in range(2):
        said = np.asarray(Image.open(tmp_path / "p" / f"{number}.png"))
        pixels = np.array(Image.open(f"{test}/images/{number}.png"))
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        assert said.shape == (50, 66)
        assert np.array_equal(said, model.segment(image).numpy())
    # The encoder is a bundle like any other, with the factors that were trained.
    assert pl.load(str(run.path)).encoder.blocks[0].ls1.gamma.shape == (32,)


@pytest.mark.slow
def test_a_model_goes_into_onnx_at_another_size_than_it_was_trained_at(bundle, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    encoder = pl.load(bundle)
    save_bundle(encoder, tmp_path / "model")
    settings = {"conv_width": 4, "num_points": 2, "num_extra": 0, "mrfp_ratio": 1.5}
    parts = build_parts(encoder, 3, "vit_comer", width=16, blocks="spread", settings=settings)
    model = Segmenter(parts, "vit_comer", 16, 64, None, None, [(0, 0, 0)] * 3, ["a", "b", "c"], settings).eval()
    save_segmenter(model, tmp_path / "model")
    file = export(str(tmp_path / "model"), str(tmp_path / "96.onnx"), image_size=96)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 96, 96)
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = torch.nn.functional.interpolate(model(images), size=(96, 96), mode="bilinear")
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_ends_where_one_in_a_piece_does(bundle, folders, tmp_path, monkeypatch):
    settings = {**FAST, "data": folders[0], "encoder": bundle, "max_steps": 4, "checkpoint_every": 1}
    whole = pl.segment("vit_comer", out=tmp_path / "whole", **settings)
    loss = ViTCoMerMethod.training_loss

    def failing(self, batch):
        if self.step == 2:
            raise RuntimeError("the machine went away")
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ViTCoMerMethod, "training_loss", failing)
        with pytest.raises(RuntimeError, match="went away"):
            pl.segment("vit_comer", out=tmp_path / "cut", **settings)
    cut = pl.segment("vit_comer", out=tmp_path / "cut", resume=True)
    (expected, steps), (found, steps_found) = weights(whole), weights(cut)
    assert (steps, steps_found) == (4, 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(name.startswith("adapter.interactions.") for name in expected)
    assert not any(name.startswith("backbone.") for name in expected)


def test_a_frozen_encoder_stays_as_it_is_while_the_exchanges_learn(bundle, folders, tmp_path):
    settings = {**FAST, "data": folders[0], "encoder": bundle, "max_steps": 2, "train_encoder": False, "lr": 1e-2}
    run = pl.segment("vit_comer", out=tmp_path / "run", **settings)
    before, after = pl.load(bundle).state_dict(), pl.load(str(run.model)).encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_segmenter(run.path).backbone.adapter.interactions[0].cti_tov.gamma.any()
    about = json.loads((run.model / "decoder.json").read_text())
    assert (about["head"], about["layers"]) == ("vit_comer", [0, 1, 2, 3])
    assert about["settings"]["num_extra"] == 1


def test_images_of_any_size_are_shown_at_multiples_of_32():
    torch.manual_seed(0)
    parts = build(create_encoder("vit_tiny_patch16_224", **SMALL), 3, layers=(0, 1, 2, 3), width=16, conv_width=4)
    maps = parts.backbone.eval()(torch.randn(1, 3, 50, 66))
    assert [tuple(x.shape[-2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_an_encoder_tied_to_one_size_is_shown_that_size():
    torch.manual_seed(0)
    encoder = create_encoder("beit_base_patch16_224", **{**SMALL, "image_size": 64})
    assert not takes_any_size(encoder)
    assert takes_any_size(create_encoder("vit_tiny_patch16_224", **SMALL))
    parts = build(encoder, 3, layers=(0, 1, 2, 3), width=16, conv_width=4)
    maps = parts.backbone.eval()(torch.randn(1, 3, 50, 66))
    assert [tuple(x.shape[-2:]) for x in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_windows_are_of_all_blocks_but_the_last_of_each_stage():
    encoder = create_encoder("vit_tiny_patch16_224", **{**SMALL, "depth": 6})
    parts = build(encoder, 3, layers=(1, 2, 4, -1), width=16, conv_width=4, window_size=7)
    assert parts.backbone.windows == [7, None, None, 7, None, None]


def test_layer_scale_changes_nothing_at_first_and_stays_in_the_bundle(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", **SMALL).eval()
    images = torch.randn(1, 3, 32, 32)
    before = encoder.forward_features(images)
    add_layer_scale(encoder)
    assert torch.equal(encoder.eval().forward_features(images), before)
    with torch.no_grad():
        encoder.blocks[2].ls2.gamma.fill_(0.5)
    again = pl.load(str(save_bundle(encoder, tmp_path / "model")))
    assert torch.equal(again.forward_features(images), encoder.forward_features(images))


def test_rates_fall_along_a_straight_line_as_published():
    method = object.__new__(ViTCoMerMethod)
    torch.nn.Module.__init__(method)
    base = {"data": "d", "out": "o", "encoder": "vit_tiny_patch16_224"}
    method.config = resolve("segment vit_comer", ViTCoMerMethod, {**base, "lr": 1.0, "warmup_epochs": 2.0})
    method.spans, method.stage, method.total_steps, method.steps_per_epoch, method._trainer = [], 0, 100, 5, None
    assert [round(method.rates(step)[0], 3) for step in (0, 5, 10, 50, 100)] == [0.0, 0.475, 0.9, 0.5, 0.0]


def test_the_published_recipes():
    base = {"data": "d", "out": "o"}
    config = resolve("segment vit_comer", ViTCoMerMethod, {**base, "preset": "upernet_t"})
    assert (config.encoder, config.lr, config.mrfp_ratio) == ("deit_tiny_patch16_224", 1.2e-4, 6.0)
    assert (config.max_steps, config.batch_size, config.layer_decay) == (160_000, 16, 0.95)
    config = resolve("segment vit_comer", ViTCoMerMethod, {**base, "preset": "upernet_s"})
    assert (config.lr, config.mrfp_ratio, config.drop_path, config.weight_decay) == (6e-5, 1.5, 0.2, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 80}, "image_size is 80; ViT-CoMer takes multiples of 32, such as 64"),
        ({"image_size": (64, 100)}, "such as 64,96"),
        ({"layers": (0, 1, 2)}, "from block 0 to block 3"),
        ({"layers": (0, 1, 1, 3)}, "must follow on one another"),
        ({"apply_norm": True}, "apply_norm is about maps of single blocks"),
        ({"deform_heads": 5}, "choose deform_heads"),
        ({"mrfp_ratio": 0.1}, "is 3 wide, and must be even"),
    ],
)
def test_what_cannot_be_trained_is_refused(bundle, folders, tmp_path, change, message):
    settings = {"data": folders[0], "encoder": bundle, **FAST, **change}
    with pytest.raises(UsageError, match=message):
        pl.segment("vit_comer", out=tmp_path / "run", **settings)
