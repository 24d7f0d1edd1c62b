"""Encoders of clips are measured on clips by the verbs that measure encoders of images, which know of neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.data import open_source
from patchloom.data.clip_views import ClipView
from patchloom.encoders import create_encoder, normalize, pooled
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle

CPU = {"num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return create_encoder("videomae_tiny_patch16_224", image_size=(4, 16, 16), **size).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Squares that go right or down, of frames in their number's order."""
    root = tmp_path_factory.mktemp("videos")
    draws = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, (down, right) in {"right": (0, 2), "down": (2, 0)}.items():
            for video in range(4):
                folder = root / part / name / str(video)
                folder.mkdir(parents=True)
                top, left = draws.integers(0, 4, 2)
                for frame in range(8):
                    picture = np.full((20, 20, 3), 30, np.uint8)
                    y, x = top + down * frame // 2, left + right * frame // 2
                    picture[y : y + 6, x : x + 6] = 220
                    Image.fromarray(picture).save(folder / f"{frame}.png")
    return root


def test_embed_writes_a_vector_for_each_clip(encoder, videos, tmp_path):
    bundle = save_bundle(encoder, tmp_path / "model")
    out = pl.embed(model=str(bundle), data=f"clips:{videos}/test", out=str(tmp_path / "v.npz"), clip_stride=2, **CPU)
    found = np.load(out)
    assert found["files"].tolist() == [f"{name}/{n}" for name in ("down", "right") for n in range(4)]
    assert found["labels"].tolist() == [0] * 4 + [1] * 4
    # As many frames as the encoder is made for.
    source = open_source(f"clips:{videos}/test", clip_frames=4, clip_stride=2)
    clips = torch.stack([ClipView("crop", 16)(source.read(n).value)["clip"] for n in range(8)]).float() / 255
    with torch.no_grad():
        expected = pooled(encoder, normalize(clips, encoder))
    np.testing.assert_allclose(found["vectors"], expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("protocol", ["knn", "logistic"])
def test_evaluations_take_clips_by_an_encoder_of_clips(encoder, videos, protocol):
    figures = pl.evaluate(
        protocol,
        encoder=encoder,
        train=f"clips:{videos}/train",
        test=f"clips:{videos}/test",
        clip_stride=2,
        cache="none",
        **CPU,
    )
    assert figures["n"] == 8
    assert figures["dim"] == 24


def test_an_encoder_and_a_source_of_two_kinds_are_refused(encoder, videos, tmp_path):
    with pytest.raises(UsageError, match="digits holds images, and the encoder takes clips; pretrain ccvit"):
        pl.evaluate("knn", encoder=encoder, train="digits", test="digits:test", **CPU)
    images = create_encoder("vit_micro_patch4_32")
    clips = f"clips:{videos}/test"
    with pytest.raises(UsageError, match="holds clips, and the encoder takes images"):
        pl.embed(model=images, data=clips, out=str(tmp_path / "v.npz"), **CPU)
    with pytest.raises(UsageError, match="holds clips, and the encoder takes images"):
        pl.explain("attention", model=images, images=clips, out=str(tmp_path / "e"), **CPU)
    assert not list(tmp_path.iterdir())
