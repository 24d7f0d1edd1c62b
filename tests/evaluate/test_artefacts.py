"""`clean diagnose`: figures, picture and page of an encoder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import patchloom as pl
from encoders_for_tests import tiny
from patchloom.encoders import create_backbone
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from small_images import write_images

QUICK = {"num_workers": 0, "device": "cpu", "images": 8}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 4)


def test_a_planted_pattern_is_found_and_drawn(images, tmp_path):
    encoder = tiny("vit")
    with torch.no_grad():
        encoder.pos_embed.mul_(10)
    save_bundle(encoder, tmp_path / "b")
    out = {name: tmp_path / f"d.{name}" for name in ("json", "html", "png")}
    figures = pl.clean(
        "diagnose",
        encoder=tmp_path / "b",
        data=images,
        out=out["json"],
        report=out["html"],
        picture=out["png"],
        **QUICK,
    )
    assert figures["position_explained_variance"] > 0.5
    assert "cleaning is worth trying" in figures["verdict"]
    assert (figures["n"], figures["dim"], figures["grid"]) == (8, 32, [4, 4])
    assert json.loads(out["json"].read_text())["verdict"] == figures["verdict"]
    page = out["html"].read_text()
    assert "Artefacts of patch features" in page
    assert f"--images {QUICK['images']}" in page  # the command that repeats it
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"d.json exists; choose another out"):
        pl.clean("diagnose", encoder=encoder, data=images, out=out["json"])


def test_without_the_pattern_place_explains_less(images):
    encoder = tiny("vit")
    with torch.no_grad():
        encoder.pos_embed.zero_()
    figures = pl.clean("diagnose", encoder=encoder, data=images, **QUICK)
    assert figures["position_explained_variance"] < 0.1
    assert figures["constant_image_pattern"] < 1e-5


def test_image_models_without_tokens_and_other_sizes_are_looked_at(images):
    network = create_backbone("resnet18", image_size=96)
    figures = pl.clean("diagnose", encoder=network, data=images, **{**QUICK, "images": 4})
    assert figures["grid"] == [3, 3]
    figures = pl.clean("diagnose", encoder=tiny("vit"), data=images, image_size=24, **QUICK)
    assert figures["grid"] == [6, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 18}, "18x18|18 .*divisible"),
        ({"untrained": True}, "untrained is for names of timm models"),
        ({"images": 3}, "images is 3; it must be at least 4"),
        ({"shift": 0}, "shift is 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, images):
    with pytest.raises(UsageError, match=message):
        pl.clean("diagnose", encoder=tiny("vit"), data=images, **{**QUICK, **settings})


def test_too_few_images_are_told_of(tmp_path):
    few = write_images(tmp_path / "few", 1)
    with pytest.raises(UsageError, match="3 images are too few"):
        pl.clean("diagnose", encoder=tiny("vit"), data=few, **QUICK)
