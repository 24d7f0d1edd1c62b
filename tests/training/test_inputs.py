"""The images of a run: range and statistics settled once, kept by run and bundle, taken up by what follows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import in_chans
from patchloom.errors import UsageError
from patchloom.models.bundle import load

TINY: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 32, "warmup_epochs": 0, "lr": 1e-3}
MAE: dict[str, Any] = {"encoder": "vit_micro_patch4_32", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two classes of five-channel 12-bit images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.random((5, 36, 36)) * np.arange(1, 6)[:, None, None] * (400 + 400 * (number % 2))
        (folder / f"c{number % 2}").mkdir(exist_ok=True)
        tifffile.imwrite(folder / f"c{number % 2}" / f"{number}.tif", pixels.astype(np.uint16))
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mae"
    return pl.pretrain("mae", data=str(images), out=str(out), in_chans=5, max_steps=2, **MAE, **TINY)


def test_what_was_settled_stands_in_config_summary_and_bundle(images, run):
    settled = yaml.safe_load((run.path / "config.yaml").read_text())
    assert settled["value_range"] == "uint16=0,4095"
    pixels = np.stack([tifffile.imread(file) for file in sorted(images.rglob("*.tif"))]) / 4095
    np.testing.assert_allclose(settled["channel_mean"], pixels.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(settled["channel_std"], pixels.std((0, 2, 3)), atol=1e-4)
    assert run.summary["data"]["value_range"] == "uint16=0,4095"
    assert json.loads((run.model / "patchloom.json").read_text())["reading"] == {"value_range": "uint16=0,4095"}
    assert json.loads((run.model / "config.json").read_text())["pretrained_cfg"]["mean"] == settled["channel_mean"]
    assert load(run.model).pretrained_cfg["reading"] == {"value_range": "uint16=0,4095"}


def test_a_model_s_range_is_taken_up_by_what_follows(images, run, tmp_path, capsys):
    dark = tmp_path / "dark"
    for file in images.rglob("*.tif"):
        (dark / file.parent.name).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(dark / file.parent.name / file.name, tifffile.imread(file) // 16)
    assert str(open_source(str(dark), in_chans=5).values) == "uint16=0,255"
    capsys.readouterr()
    pl.embed(str(run.model), data=str(dark), out=str(tmp_path / "dark.npz"), num_workers=0)
    assert "value_range=uint16=0,4095" in capsys.readouterr().err
    pl.embed(str(run.model), data=str(dark), out=str(tmp_path / "own.npz"), num_workers=0, value_range="bits:8")
    vectors = [np.load(tmp_path / name)["vectors"] for name in ("dark.npz", "own.npz")]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_a_resumed_run_keeps_its_range_whatever_the_images_would_say_now(images, tmp_path):
    out = tmp_path / "mae"
    given = {"data": str(images), "out": str(out), "in_chans": 5, "value_range": "uint16=0,9000", **MAE, **TINY}
    pl.pretrain("mae", max_steps=1, **given)
    capped = yaml.safe_load((out / "config.yaml").read_text())
    assert capped["value_range"] == "uint16=0,9000"
    again = pl.pretrain("mae", out=str(out), resume=True)
    assert again.summary["data"]["value_range"] == "uint16=0,9000"


def test_adapters_on_a_widened_encoder_open_again(images, tmp_path):
    grey = tmp_path / "grey"
    grey.mkdir()
    tifffile.imwrite(grey / "a.tif", np.arange(1600, dtype=np.uint16).reshape(40, 40))
    rgb = pl.pretrain("mae", data=str(grey), out=str(tmp_path / "rgb"), max_steps=1, **MAE, **TINY)
    adapted = pl.adapt(
        "linear",
        data=str(images),
        encoder=str(rgb.model),
        in_chans=5,
        out=str(tmp_path / "linear"),
        max_steps=1,
        **TINY,
    )
    opened = pl.load(adapted.path)
    assert in_chans(opened) == 5
    # The range of what training starts from holds on.
    assert opened.pretrained_cfg["reading"] == {"value_range": "uint16=0,4095"}
    assert opened(torch.zeros(1, 5, 32, 32)).shape == (1, 2)


def test_the_number_of_channels_is_the_model_s_where_none_is_asked_for(images, run, tmp_path, capsys):
    adapted = pl.adapt("linear", data=str(images), encoder=str(run.model), out=str(tmp_path / "l"), max_steps=1, **TINY)
    assert "takes 5 channels, so images are read as 5" in capsys.readouterr().err
    assert yaml.safe_load((adapted.path / "config.yaml").read_text())["in_chans"] == 5


def test_a_remembered_range_is_no_matter_to_sources_without_files():
    remembered = {"value_range": "0,4000"}
    assert len(open_source("digits", model=remembered)) > 0
    with pytest.raises(UsageError, match="value_range is 0,4000, which the source digits cannot obey"):
        open_source("digits", value_range="0,4000")


@pytest.mark.parametrize("method", ["mae", "ccvit", "dinov2"])
def test_an_encoder_of_clips_is_refused_by_methods_of_images(method, tmp_path):
    settings = {**TINY, "encoder": "videomae_tiny_patch16_224", "max_steps": 1}
    with pytest.raises(UsageError, match="the encoder takes clips, and this method is for images"):
        pl.pretrain(method, data="photos", out=str(tmp_path / "run"), **settings)
