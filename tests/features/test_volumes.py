"""Encoders of volumes are measured on volumes by the verbs that measure encoders of images."""

from __future__ import annotations

import pytest
import torch

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import normalize, pooled, register
from patchloom.encoders.video import VideoTransformer, VideoTransformers
from patchloom.features.extract import extract
from volume_support import class_volumes

pytest.importorskip("nibabel")
pytestmark = pytest.mark.extra("medical")


class VolumeTransformer(VideoTransformer):
    """Tubes of voxels."""


@register(VolumeTransformer)
class VolumeTransformers(VideoTransformers):
    """The same, told that its inputs are volumes."""

    kind = "volume"


def test_evaluations_take_volumes_by_an_encoder_of_volumes(tmp_path):
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 24, "depth": 1, "num_heads": 2}
    encoder = VolumeTransformer(num_frames=4, class_token=False, global_pool="avg", num_classes=0, **size).eval()
    encoder.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (1, 16, 16)}
    encoder.patchloom_args = {"architecture": "volumes", "model_args": {"num_frames": 4, **size}}
    for part, seed in (("train", 0), ("test", 1)):
        class_volumes(tmp_path / part, 3, seed)
    train, test = f"volumes:{tmp_path}/train", f"volumes:{tmp_path}/test"
    options = {"train": train, "test": test, "cache": "none", "num_workers": 0, "device": "cpu"}
    figures = pl.evaluate("knn", encoder=encoder, **options)
    assert (figures["n"], figures["dim"]) == (6, 24)
    source = open_source(test, in_chans=1, value_range="0,500")
    sample = source.read(0)
    shown = source.kind.eval_view("crop", (4, 16, 16))(sample.value, spacing=sample.named["spacing"])["volume"]
    with torch.no_grad():
        expected = pooled(encoder, normalize(shown[None], encoder))
    found = extract(encoder, source, num_workers=0, device="cpu", progress=False)
    torch.testing.assert_close(found.vectors[:1], expected)
    assert found.keys[0] == sample.key
