"""The eye on the encoder: a collapse that is forced is named within 200 steps, a healthy run is left in peace."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import patchloom as pl
from patchloom.features.health import has_collapsed, verdict
from patchloom.systems.dinov2.losses import SoftmaxCentering
from patchloom.training.metrics import read_metrics, series

SETTINGS = {
    "data": "digits",
    "encoder": "vit_health_test_patch4_16",
    "local_size": 8,
    "local_crops": 2,
    "batch_size": 8,
    "max_steps": 60,
    "out_dim": 32,
    "head_hidden_dim": 24,
    "bottleneck_dim": 16,
    "layer_scale": None,
    "drop_path": 0.0,
    "lr_base_batch": None,
    "lr": 1e-3,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 20,
    "report": False,
    "precision": "32-true",
    "accelerator": "cpu",
}


@timm.models.register_model
def vit_health_test_patch4_16(pretrained: bool = False, **kwargs: Any) -> Any:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.models.vision_transformer.vit_tiny_patch16_224(pretrained, **{**shape, **kwargs})


@pytest.mark.slow
def test_a_forced_collapse_is_named_within_200_steps(tmp_path, monkeypatch, capsys):
    # Without centring, a spread of features and a slow teacher, agreeing on one prototype is the easiest way out.
    monkeypatch.setattr(SoftmaxCentering, "update", lambda self, logits: None)
    forced = {"koleo_weight": 0.0, "teacher_momentum": 0.5, "lr": 1e-2, "max_steps": 20, "probe_every": 1000}
    # An encoder whose features are far from alike when it begins.
    forced |= {"encoder": "vit_tiny_patch16_224", "image_size": 32, "local_size": 16, "batch_size": 16}
    forced |= {"health_every": 10}
    run = pl.pretrain("dinov2", **{**SETTINGS, **forced, "out": str(tmp_path / "run")})
    said = [line for line in capsys.readouterr().err.splitlines() if "health of the encoder" in line]
    assert said
    assert "The features have collapsed: all images look the same to the encoder." in said[0]
    assert int(said[0].split()[1].rstrip(":")) < 200
    steps, cosines = series(read_metrics(run.path / "metrics.csv"), "encoder_mean_cosine")
    assert steps == [10, 20]
    assert cosines[-1] > 0.99
    assert "collapsed" in run.summary["verdict"]
    figures = read_metrics(run.path / "metrics.csv")
    assert figures[0]["mean_cosine"] < 0.9


def test_a_healthy_run_is_left_in_peace(tmp_path, capsys):
    run = pl.pretrain("dinov2", **{**SETTINGS, "max_steps": 40, "out": str(tmp_path / "run")})
    assert "health of the encoder" not in capsys.readouterr().err
    assert len(series(read_metrics(run.path / "metrics.csv"), "encoder_rankme")[0]) == 2


def test_an_encoder_that_began_with_constant_features_is_told_apart(tmp_path, capsys):
    settings = {**SETTINGS, "layer_scale": 1e-5, "lr": 1e-12, "max_steps": 20}
    pl.pretrain("dinov2", **{**settings, "out": str(tmp_path / "run")})
    said = [line for line in capsys.readouterr().err.splitlines() if "health of the encoder" in line]
    assert "training has not got them apart yet" in said[0]


def test_looking_changes_nothing_of_the_run(tmp_path):
    states = []
    for every in (0, 2):
        settings = {**SETTINGS, "max_steps": 6, "health_every": every, "out": str(tmp_path / f"{every}")}
        run = pl.pretrain("dinov2", **settings)
        states.append(pl.load(run.path).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_collapse_is_what_the_verdict_calls_one():
    for rank, cosine in ((1.0, 0.5), (5.0, 0.9995), (5.0, 0.9), (1.9, 0.1)):
        assert has_collapsed(rank, cosine, 64) == ("have collapsed" in verdict(rank, cosine, 64))


def test_a_negative_interval_is_refused(tmp_path):
    with pytest.raises(pl.UsageError, match="health_every is -1; it must be at least 0"):
        pl.pretrain("dinov2", **{**SETTINGS, "health_every": -1, "out": str(tmp_path / "run")})
