"""Export: the same numbers in onnxruntime and timm, at any batch size, or nothing is written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import timm
import torch

import patchloom as pl
from patchloom.encoders import create_encoder, input_size, kind_of
from patchloom.errors import MissingExtraError, UsageError
from patchloom.models import onnx_file as module
from patchloom.models.bundle import bundle_fingerprint, read_lineage, save_bundle
from patchloom.training.supervised import as_classifier

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
ENCODERS = {
    "ccvit": ("ccvit_tiny_patch4_32", {"image_size": 16, **SMALL}),
    "vit": ("vit_tiny_patch16_224", {"image_size": 32, **SMALL}),
    "eva": ("eva02_tiny_patch14_224", {"image_size": 28, **SMALL}),
    "clip": ("videomae_tiny_patch16_224", {"image_size": (4, 16, 32), **SMALL}),
}


def make(kind: str = "ccvit", **options):
    torch.manual_seed(0)
    name, known = ENCODERS[kind]
    encoder = create_encoder(name, **known, **options).eval()
    with torch.no_grad():  # tables of positions start at zero and would hide a fault
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder


def run_onnx(path: str, images: torch.Tensor) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


@pytest.mark.extra("onnx")
@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_onnx_gives_the_same_features_at_any_batch_size(onnx, kind, tmp_path):
    encoder = make(kind)
    save_bundle(encoder, tmp_path / "b")
    out = pl.export(str(tmp_path / "b"), out=str(tmp_path / "deep" / "m.onnx"))
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, *input_size(encoder))
        np.testing.assert_allclose(run_onnx(out, images), encoder(images).numpy(), rtol=1e-3, atol=1e-4)
    model = onnx.load(out)
    assert [value.name for value in model.graph.input] == [f"{kind_of(encoder)}s"]
    assert [value.name for value in model.graph.output] == ["features"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.onnx"]


@pytest.mark.extra("onnx")
@torch.no_grad()
def test_a_fine_tuned_classifier_gives_logits(onnx, tmp_path):
    classifier = as_classifier(make(), 3, init_scale=1.0).eval()
    save_bundle(classifier, tmp_path / "b")
    out = pl.export(str(tmp_path / "b"), out=str(tmp_path / "m.onnx"))
    images = torch.randn(3, 3, 16, 16)
    np.testing.assert_allclose(run_onnx(out, images), classifier(images).numpy(), rtol=1e-3, atol=1e-4)
    assert [value.name for value in onnx.load(out).graph.output] == ["logits"]


@pytest.mark.slow
@pytest.mark.extra("onnx")
@torch.no_grad()
def test_normalisation_may_be_part_of_the_model(onnx, tmp_path):
    encoder = make(in_chans=1)
    save_bundle(encoder, tmp_path / "b")
    out = pl.export(str(tmp_path / "b"), out=str(tmp_path / "m.onnx"), normalize=True)
    images = torch.rand(2, 1, 16, 16)
    mean, std = np.mean(timm.data.IMAGENET_DEFAULT_MEAN), np.mean(timm.data.IMAGENET_DEFAULT_STD)
    expected = encoder(((images - mean) / std).float()).numpy()
    np.testing.assert_allclose(run_onnx(out, images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.extra("onnx")
def test_the_file_says_how_images_are_read(onnx, tmp_path, capsys):
    encoder = make("vit", in_chans=2)
    statistics = {"mean": (0.1, 0.2), "std": (0.3, 0.4)}
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **statistics, "reading": {"value_range": "uint16=0,4095"}}
    save_bundle(encoder, tmp_path / "b")
    out = pl.export(str(tmp_path / "b"), out=str(tmp_path / "m.onnx"))
    notes = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert notes == {"mean": "[0.1, 0.2]", "std": "[0.3, 0.4]", "value_range": "uint16=0,4095"}
    assert "value_range=uint16=0,4095" in capsys.readouterr().err


@pytest.mark.extra("onnx")
def test_numbers_that_differ_are_not_written(onnx, tmp_path, monkeypatch):
    save_bundle(make(), tmp_path / "b")
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(module.ExportMismatchError, match="nothing was written"):
        pl.export(str(tmp_path / "b"), out=str(tmp_path / "m.onnx"))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@torch.no_grad()
def test_timm_is_a_clean_copy(tmp_path):
    encoder = make()
    save_bundle(encoder, tmp_path / "run" / "model", lineage={"made_by": "pretrain ccvit"})
    out = pl.export(str(tmp_path / "run"), out=str(tmp_path / "copy"), format="timm")
    assert bundle_fingerprint(out) == bundle_fingerprint(tmp_path / "run")
    assert read_lineage(out) == {"made_by": "pretrain ccvit"}
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images), encoder(images))


@torch.no_grad()
def test_another_size_goes_into_the_copy(tmp_path):
    save_bundle(make(), tmp_path / "b")
    out = pl.export(str(tmp_path / "b"), out=str(tmp_path / "copy"), format="timm", image_size=24)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model_args"]["img_size"] == [24, 24]
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 48)
    with pytest.raises(UsageError, match="not divisible by patch size 4"):
        pl.export(str(tmp_path / "b"), out=str(tmp_path / "other"), format="timm", image_size=18)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onx"}, "unknown format 'onx'; did you mean onnx"),
        ({"bundle": "no/such/run"}, "there is no bundle at no/such/run"),
        ({"out": "taken.onnx"}, "exists; choose another place, or set overwrite"),
        ({"out": "folder", "overwrite": True}, "is no name of a file"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.onnx").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    save_bundle(make(), tmp_path / "b")
    with pytest.raises(UsageError, match=message):
        pl.export(**({"bundle": "b", "out": "m.onnx"} | settings))
    assert (tmp_path / "taken.onnx").read_bytes() == b"precious"
    assert not (tmp_path / "m.onnx").exists()


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r'pip install "patchloom\[onnx\]"'):
        pl.export("b", out=str(tmp_path / "m.onnx"))
