"""Training images that are not square: every method takes them, and so does what comes after training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

import patchloom as pl
from patchloom.encoders import create_encoder, grid_size, image_size
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle
from segment_support import paint_pairs
from small_images import write_images
from small_teachers import write_teacher

SIZE = (64, 32)
QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "num_workers": 0, "probe_every": 0, "accelerator": "cpu"}
QUICK |= {"precision": "32-true", "report": False, "health_every": 0}
ON_CPU: dict[str, Any] = {"num_workers": 0, "device": "cpu"}
LINEAR = {"method": "linear", "settings": {"max_steps": 2, "batch_size": 4, "probe_every": 0}}
SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MAE = {"encoder": "test_vit", "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "pretrain ccvit": {"encoder": "ccvit_tiny_patch8_64", "k": 16, "codebook_iters": 1},
    "pretrain beit": {"encoder": "ccvit_tiny_patch8_64", "k": 16, "codebook_iters": 1, "head_layers": 1},
    "pretrain mae": MAE,
    "pretrain dinov2": {"encoder": "test_vit", "local_crops": 1, "out_dim": 16, "head_hidden_dim": 16}
    | {"bottleneck_dim": 8, "head_layers": 2},
    "pretrain tov_vicreg": {"encoder": "vit_tiny_patch8_84", "projector": "16-8"},
    "adapt finetune": {},
    "adapt scratch": {"encoder": "test_vit"},
    "adapt linear": {},
    "adapt bitfit": {},
    "adapt lora": {},
    "adapt vpt": {},
    "adapt adaptformer": {},
    "adapt dvpt": {},
    "adapt prompt_cam": {},
    "adapt gcab": {"tasks": 2},
    "distill logits": {"encoder": "test_resnet"},
    "distill scalekd": {"encoder": "cifar_resnet20"},
    "distill deit_lt": {"encoder": "deit_micro_distilled_patch4_32"},
    "distill g2sd_generic": {**MAE, "decoder_dim": 16},
    "distill g2sd_specific": {"encoder": "test_vit"},
    "segment linear": {},
    "segment upernet": {"width": 16, "layers": [0, 0, 1, 1]},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("images") / "train", 8))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=SIZE, **SHAPE)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, **SHAPE)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture(scope="module")
def mae(images, tmp_path_factory):
    settings = {**QUICK, **MAE, "report": True, "probe_every": 1, "log_every": 1}
    return pl.pretrain("mae", data=images, out=str(tmp_path_factory.mktemp("mae") / "r"), image_size=SIZE, **settings)


def _data(name, images, folder):
    if name.startswith("segment"):
        return str(paint_pairs(folder / "pairs", 6))
    if name.endswith("tov_vicreg"):
        (folder / "game").mkdir(parents=True)
        np.save(folder / "game" / "a.npy", np.random.default_rng(0).integers(0, 255, (24, 40, 24), dtype=np.uint8))
        return f"frames:{folder}"
    return images


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_oblong_images(name, images, square, mae, tmp_path):
    verb, method = name.split()
    settings = {**QUICK, "encoder": square, "image_size": "64,32", **METHODS[name]}
    if name == "distill g2sd_generic":
        settings["teacher"] = str(mae.model)
    elif verb == "distill":
        settings["teacher"] = write_teacher(tmp_path / "teacher", image_size=32)
    run = getattr(pl, verb)(method, data=_data(name, images, tmp_path), out=str(tmp_path / "run"), **settings)
    assert yaml.safe_load((run.path / "config.yaml").read_text())["image_size"] == [64, 32]
    assert np.isfinite(run.summary["loss"])
    if verb != "adapt" or method in ("finetune", "scratch"):
        assert image_size(load(run.model)) == SIZE


def test_what_was_trained_opens_in_timm_and_elsewhere(images, mae, tmp_path):
    encoder = load(mae.model)
    assert (image_size(encoder), grid_size(encoder)) == (SIZE, (4, 2))
    assert "data:image/png" in (mae.path / "report.html").read_text()
    opened = timm.create_model(f"local-dir:{mae.model}", pretrained=True, num_classes=0)
    shown = torch.rand(1, 3, *SIZE)
    torch.testing.assert_close(opened.eval()(shown), encoder.eval()(shown))
    table = pl.embed(str(mae.model), data=images, out=str(tmp_path / "v.npz"), **ON_CPU)
    assert len(np.load(table)["vectors"]) == 24
    copy = pl.export(str(mae.model), out=str(tmp_path / "copy"), format="timm", image_size="32,64")
    assert image_size(load(copy)) == (32, 64)


@pytest.mark.parametrize(("protocol", "settings"), [("knn", {"k": 3}), ("health", {}), ("finetune", LINEAR)])
def test_what_was_trained_is_measured_at_its_size(protocol, settings, images, mae, tmp_path):
    test = str(write_images(tmp_path / "test", 4, seed=1))
    where = {"data": images} if protocol == "health" else {"train": images, "test": test}
    assert pl.evaluate(protocol, encoder=str(mae.model), **where, **ON_CPU, **settings)


@pytest.mark.parametrize("explanation", ["attention", "compare"])
def test_explanations_have_the_shape_of_the_images(explanation, images, tmp_path):
    model = write_teacher(tmp_path / "classifier", image_size=SIZE, patch_size=16)
    out = tmp_path / "gallery"
    gallery = pl.explain(explanation, model=model, images=images, out=str(out), limit=2, **ON_CPU)
    maps = [np.load(file) for file in (gallery.path / "maps").glob("*.npy")]
    assert maps
    assert all(one.shape[-2:] in (SIZE, (4, 2)) for one in maps)


def test_a_run_goes_on_where_it_stopped_at_its_size(images, tmp_path):
    out = str(tmp_path / "run")
    settings = {**QUICK, **MAE, "data": images, "out": out, "image_size": [64, 32]}
    pl.pretrain("mae", **settings)
    again = pl.pretrain("mae", **{**settings, "image_size": (64, 32)}, resume=True)
    assert again.summary["steps"] == 2
    with pytest.raises(UsageError, match=r"has image_size=\(64, 32\), not 64"):
        pl.pretrain("mae", **{**settings, "image_size": (64, 64)}, resume=True)
