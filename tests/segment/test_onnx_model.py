"""Segmentation models as ONNX files."""

from __future__ import annotations

import json

import pytest
import torch

import patchloom as pl
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.segment.build import build_parts
from patchloom.segment.commands import export
from patchloom.segment.saved import Segmenter, load_segmenter, save_segmenter


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, embed_dim=24, depth=2, num_heads=2)
    save_bundle(encoder, tmp_path / "model")
    model = Segmenter(build_parts(encoder, 3, "bn"), "bn", 8, 32, None, None, [(0, 0, 0)] * 3, ["a", "b", "c"])
    save_segmenter(model, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.slow
def test_a_file_gives_logits_of_the_images_size_and_names_the_classes(saved, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = export(saved, str(tmp_path / "m.onnx"), image_size=(48, 64), normalize=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.rand(2, 3, 48, 64)
    (found,) = session.run(None, {"images": images.numpy()})
    model = load_segmenter(saved)
    with torch.no_grad():
        logits = model(normalize(images, pl.load(saved).encoder))
    expected = torch.nn.functional.interpolate(logits, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["a", "b", "c"]


def test_a_place_that_is_taken_or_no_file_is_refused(saved, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "m.onnx").touch()
    with pytest.raises(UsageError, match="exists; choose another out"):
        export(saved, str(tmp_path / "m.onnx"))
    with pytest.raises(UsageError, match="is no name of a file"):
        export(saved, str(tmp_path / "m"))
