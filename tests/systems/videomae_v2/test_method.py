"""VideoMAE V2 as a method: what it refuses, its recipe, runs from clips to bundle, resume."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.videomae_v2.method import DualMasks, VideoMAEV2Config, VideoMAEV2Method, heads_of
from patchloom.systems.videomae_v2.model import numbers_of
from patchloom.training.config import config_from_mapping
from patchloom.training.metrics import read_metrics, series

SMALL = {
    "encoder": "videomae_tiny_patch16_224",
    "image_size": 64,
    "clip_frames": 4,
    "clip_stride": 1,
    "mask_ratio": 0.75,
    "batch_size": 2,
    "views_per_clip": 2,
    "max_steps": 3,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = root / "ab"[number % 2] / f"v{number}"
        folder.mkdir(parents=True)
        picture = rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)
        for time in range(6):
            Image.fromarray(np.roll(picture, 3 * time, 1)).save(folder / f"{time}.png")
    return f"clips:{root}"


def method(clips, **settings: Any) -> VideoMAEV2Method:
    config = config_from_mapping(VideoMAEV2Config, {"out": "unused", "data": clips, **SMALL, **settings})
    source, config = VideoMAEV2Method.open_data(config)
    return VideoMAEV2Method(config, source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_frames": 5}, "clip_frames is 5; tubes are 2 frames long"),
        ({"image_size": 72}, "72 is not divisible by patch size 16; use 64 or 80"),
        ({"image_size": 48}, "3x3 patches is odd"),
        ({"mask_ratio": 0.01}, "hides none of 16 places"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"decoder_mask_ratio": 0.1}, "leaves out 1, 2 or 3 of 4 tokens"),
        ({"decoder_heads": 3}, "not divisible by decoder_heads 3"),
        ({"encoder": "vit_tiny_patch16_224"}, "hides tubes of clips, and the encoder takes images; take one of clips"),
        ({"data": "photos"}, "photos holds images, and pretrain videomae_v2 takes clips.*named clips:F"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path, clips):
    if "data" in settings:
        settings = {**settings, "clip_frames": None, "clip_stride": None}
    with pytest.raises(UsageError, match=message):
        pl.pretrain("videomae_v2", **{**SMALL, "data": clips, "out": str(tmp_path / "run"), **settings})
    assert not (tmp_path / "run").exists()


def test_a_share_that_no_running_cell_has_is_told_what_it_comes_to(clips, capsys):
    assert method(clips, decoder_mask_ratio=0.6).decoded == method(clips).decoded
    assert "decoder_mask_ratio 0.6 is 0.5" in capsys.readouterr().err


def test_the_recipe_is_the_papers():
    config = VideoMAEV2Config(data="clips:x", out="x")
    assert (config.lr, config.lr_base_batch, config.min_lr, config.warmup_epochs) == (1e-3, 256, 1e-5, 20)
    assert (config.betas, config.weight_decay, config.clip_grad) == ((0.9, 0.95), 0.05, None)
    assert (config.mask_ratio, config.decoder_mask, config.decoder_mask_ratio) == (0.9, "running_cell", 0.5)
    assert (config.decoder_depth, config.normalize_target, config.views_per_clip, config.flip) == (4, True, 4, 0)
    giant = config_from_mapping(VideoMAEV2Config, {"data": "clips:x", "out": "x", "preset": "giant"})
    assert (giant.lr, giant.clip_grad, giant.warmup_epochs) == (6e-4, 0.02, 30)
    assert [heads_of(width) for width in (192, 384, 512, 96)] == [3, 6, 8, 1]


def test_counts_of_tokens_are_the_papers():
    for side, visible, decoded in ((14, 160, 784), (16, 208, 1024)):
        hidden, left_out = DualMasks((8, side, side), 0.9, 0.5)(torch.Generator().manual_seed(0))
        assert (int((~hidden).sum()), int((~left_out).sum())) == (visible, decoded)
        hidden, left_out = DualMasks((8, side, side), 0.9, None)(torch.Generator().manual_seed(0))
        assert torch.equal(hidden, ~left_out)


def test_rates_are_linear_in_the_clips_read_whose_views_do_not_count(clips):
    model = method(clips, batch_size=4, views_per_clip=3, max_steps=50, warmup_epochs=2.0, lr=2e-3, min_lr=1e-4)
    model.total_steps, model.steps_per_epoch = 50, 4
    model.spans = []
    scale, warmup = 4 / 256, 8
    expected = np.concatenate([
        np.linspace(0, 2e-3 * scale, warmup),
        [(1e-4 + 0.5 * (2e-3 - 1e-4) * (1 + np.cos(np.pi * i / (50 - warmup)))) * scale for i in range(50 - warmup)],
    ])  # fmt: skip
    assert [model.rates(step)[0] for step in range(50)] == pytest.approx(expected.tolist())


def test_weight_decay_spares_vectors_the_mask_token_and_scales(clips):
    model = method(clips, cos_attn=True, layer_scale=0.1)
    spared = {name for name, p in model.named_parameters() if not model.decays(name, p)}
    assert {"model.mask_token", "encoder.blocks.0.attn.scale", "encoder.blocks.0.ls1.gamma"} <= spared
    assert {name for name in spared if model.get_parameter(name).ndim > 1} == {
        name for name in spared if name.endswith(("mask_token", "attn.scale"))
    }
    assert "model.encoder_to_decoder.weight" not in spared


def test_every_view_has_a_crop_and_masks_of_its_own(clips):
    model = method(clips, views_per_clip=4)
    clip = open_source(clips, clip_frames=4, clip_stride=1).read(0).value
    views = model.transform()(clip, torch.Generator().manual_seed(0))
    assert views["clip"].shape == (4, 3, 4, 64, 64)
    assert views["clip"].dtype == torch.uint8
    assert views["hidden"].shape == views["left_out"].shape == (4, 32)
    assert len({tuple(row.tolist()) for row in views["hidden"]}) > 1
    assert not torch.equal(views["clip"][0], views["clip"][1])


def test_unequal_masks_are_refused():
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    with pytest.raises(UsageError, match="leave 2 to 3 tokens decoded; they must leave equally many"):
        numbers_of(mask, "decoded")
    with pytest.raises(UsageError, match="leaves no token visible"):
        numbers_of(torch.zeros(2, 4, dtype=torch.bool), "visible")


def test_a_run_from_clips_to_bundle_and_its_pictures(tmp_path, clips):
    run = pl.pretrain("videomae_v2", data=clips, out=tmp_path / "run", **{**SMALL, "report": True, "probe_every": 5})
    assert run.summary["visible_tokens"] == 8
    assert run.summary["decoded_tokens"] == 16
    assert "Hidden tubes and reconstruction" in run.report.read_text()
    encoder = pl.load(run.model)
    assert tuple(encoder.patch_embed.img_size) == (4, 64, 64)
    assert encoder(torch.rand(1, 3, 4, 64, 64)).shape == (1, 192)
    assert (run.model / "pretraining.safetensors").exists()
    reading = json.loads((run.model / "patchloom.json").read_text())["reading"]
    assert (reading["clip_frames"], reading["clip_stride"]) == (4, 1)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, clips, monkeypatch):
    whole = pl.pretrain("videomae_v2", data=clips, out=tmp_path / "whole", **{**SMALL, "max_steps": 4})
    part = {**SMALL, "max_steps": 4, "checkpoint_every": 2}

    class Stop(RuntimeError):
        pass

    original = VideoMAEV2Method.training_loss

    def failing(self, batch):
        if self.step == 2:
            raise Stop
        return original(self, batch)

    monkeypatch.setattr(VideoMAEV2Method, "training_loss", failing)
    with pytest.raises(Stop):
        pl.pretrain("videomae_v2", data=clips, out=tmp_path / "part", **part)
    monkeypatch.setattr(VideoMAEV2Method, "training_loss", original)
    again = pl.pretrain("videomae_v2", out=tmp_path / "part", resume=True)
    losses = [series(read_metrics(run.path / "metrics.csv"), "loss")[1] for run in (whole, again)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)
    assert len(losses[0]) == 4
