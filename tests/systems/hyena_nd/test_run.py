"""From images to a bundle and on: self-distillation, k-NN, feature health, ONNX; what cannot train it says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.data import embedded, shapes3d
from patchloom.encoders import create_encoder
from patchloom.encoders.hyena_vit import HyenaTransformer
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle

SMALL: dict[str, Any] = {
    "data": "digits",
    "encoder": "hyena_vit_micro_patch4_32",
    "image_size": 16,
    "batch_size": 8,
    "max_steps": 2,
    "num_workers": 0,
    "probe_every": 0,
    "precision": "32-true",
    "accelerator": "cpu",
}
HEADS = {"local_size": 8, "local_crops": 2, "out_dim": 32, "head_hidden_dim": 24, "bottleneck_dim": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "digits"
    return pl.pretrain("dinov2", **{**SMALL, **HEADS, "out": str(out), "report": True})


@pytest.mark.slow
def test_self_distillation_trains_it(run):
    assert run.summary["steps"] == 2
    assert run.summary["image_token"] == "mean over patches"
    assert run.summary["registers"] == 0
    page = run.report.read_text()
    assert "Prototypes" in page
    assert "class token looks" not in page
    encoder = pl.load(run.path)
    assert isinstance(encoder, HyenaTransformer)
    assert encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 96)


@pytest.mark.slow
def test_its_features_are_judged(run):
    figures = pl.evaluate("knn", encoder=str(run.path), train="digits", test="digits:test", num_workers=0)
    assert 0 <= figures["accuracy"] <= 1
    health = pl.evaluate("health", encoder=str(run.path), data="digits", images=40, num_workers=0)
    assert health["attention_entropy"] == [None] * 4


@pytest.mark.slow
@pytest.mark.extra("onnx")
def test_it_goes_into_onnx_as_sums(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = pl.export(str(run.path), str(tmp_path / "encoder.onnx"))
    images = torch.randn(3, 3, 16, 16)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, pl.load(run.path)(images).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "message"), [("mae", "whole grid"), ("ccvit", "class token")])
def test_methods_it_does_not_fit_say_so_before_anything_is_written(tmp_path, method, message):
    with pytest.raises(UsageError, match=message):
        pl.pretrain(method, **{**SMALL, "out": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "channels", "data", "words"),
    [
        ("hyena_video_micro_patch8", (4, 16, 16), 3, "moving", {"clip_frames": 4}),
        ("hyena_volume_micro_patch4", (8, 8, 8), 1, "shapes3d", {}),
    ],
)
def test_clips_and_volumes_are_embedded_judged_and_learnt(tmp_path, monkeypatch, name, size, channels, data, words):
    for counts in (embedded.DEFAULT_CROPS, shapes3d.DEFAULT_VOLUMES):
        monkeypatch.setitem(counts, "train", 24)
        monkeypatch.setitem(counts, "test", 12)
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "filter_width": 8}
    bundle = save_bundle(create_encoder(name, image_size=size, in_chans=channels, **shape), tmp_path / "bundle")
    test = f"{data}:test"
    figures = pl.evaluate("knn", encoder=str(bundle), train=data, test=test, num_workers=0, draws=10, cache="none")
    assert 0 <= figures["accuracy"] <= 1
    pl.embed(str(bundle), data=test, out=str(tmp_path / "features.npz"), num_workers=0)
    settings = {key: SMALL[key] for key in ("batch_size", "max_steps", "num_workers", "precision", "accelerator")}
    run = pl.adapt("linear", data=data, encoder=str(bundle), out=tmp_path / "linear", report=False, **settings, **words)
    sample = torch.zeros(1, channels, *size)
    assert pl.load(run.path)(sample).shape == (1, len(run.summary["class_names"]))


@pytest.mark.parametrize(
    ("method", "data", "encoder"),
    [
        ("videomae_v2", "moving", "hyena_video_micro_patch8"),
        ("hi_end_mae", "shapes3d", "hyena_volume_micro_patch4_alternate"),
    ],
)
def test_masked_pretraining_of_clips_and_volumes_is_refused_in_a_sentence(tmp_path, method, data, encoder):
    with pytest.raises(UsageError, match="need the whole grid; take an encoder with attention alone"):
        pl.pretrain(method, data=data, encoder=encoder, max_steps=1, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
