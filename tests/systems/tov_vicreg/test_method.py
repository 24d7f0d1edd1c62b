"""TOV-VICReg as a training method: the command, its files, resume, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models import register_model

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import frames as encoders
from patchloom.errors import UsageError
from patchloom.systems.tov_vicreg.method import TOVVICRegConfig, TOVVICRegMethod, auroc

SETTINGS = {
    "encoder": "frames_test_patch8_24",
    "batch_size": 8,
    "max_steps": 4,
    "projector": "16-8",
    "num_workers": 0,
    "precision": "32-true",
    "accelerator": "cpu",
    "probe_every": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "lr": 5.0,
    "drop_path": 0.1,
}


@register_model
def frames_test_patch8_24(pretrained=False, **kwargs):
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 24, **kwargs}
    return encoders.vit_tiny_patch8_84(pretrained, **shape)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """Two made-up games: a square that moves to the right, and one that falls."""
    root = tmp_path_factory.mktemp("frames")
    for name, axis in (("right", 2), ("down", 1)):
        pixels = np.zeros((40, 24, 24), np.uint8)
        for step in range(40):
            place = [3, 3]
            place[axis - 1] = step * 3 % 20
            pixels[step, place[0] : place[0] + 4, place[1] : place[1] + 4] = 220
        (root / name).mkdir()
        np.save(root / name / f"{name}.npy", pixels + 5)
    return root


@pytest.fixture(scope="module")
def run(frames, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return pl.pretrain("tov_vicreg", data=f"frames:{frames}", probe_data=f"frames:{frames}", out=str(out), **SETTINGS)


def test_a_run_leaves_a_model_figures_and_a_report(run, frames, tmp_path):
    summary = run.summary
    for name in ("loss", "invariance", "variance", "covariance", "order_loss", "order_accuracy", "effective_rank"):
        assert np.isfinite(summary[name]), name
    assert {"held_out_order_loss", "held_out_order_accuracy", "held_out_order_auroc_plain"} <= summary.keys()
    assert summary["triplets"] == 76
    report = (run.path / "report.html").read_text()
    for title in (
        "Frame triplets",
        "Temporal order verification",
        "Invariance, variance, covariance",
        "Representation",
    ):
        assert title in report
    model = pl.load(run.model)
    source = open_source(f"frames:{frames}")
    assert model(source.read(0).image[None].float() / 255).shape == (1, 32)
    assert tuple(model.pretrained_cfg["mean"]) == (0, 0, 0)
    for name in ("right", "down"):
        np.save(tmp_path / f"{name}.npy", np.load(frames / name / f"{name}.npy")[1:])
    train, test = f"frames:{frames}", f"frames:{tmp_path}"
    figures = pl.evaluate("knn", encoder=str(run.model), train=train, test=test, num_workers=0)
    assert figures["n"] == 74


def test_loss_is_the_weighted_sum(run):
    s, c = run.summary, TOVVICRegConfig(data="x", out="y")
    whole = c.sim * s["invariance"] + c.std * s["variance"] + c.cov * s["covariance"] + c.temporal * s["order_loss"]
    assert s["loss"] == pytest.approx(whole, rel=1e-4)


def test_other_numbers_of_frames_are_the_channels(frames, tmp_path):
    run = pl.pretrain(
        "tov_vicreg",
        data=f"frames:{frames}",
        out=str(tmp_path / "four"),
        frames=4,
        optimizer="adamw",
        **{**SETTINGS, "max_steps": 1, "lr": 1e-3},
    )
    assert pl.load(run.model).patch_embed.proj.weight.shape[1] == 4


def test_the_optimiser_is_lars_over_all_parameters(frames):
    config = TOVVICRegConfig(data="x", out="y", **SETTINGS)
    method = TOVVICRegMethod(config, open_source(f"frames:{frames}"))
    optimizer = method.configure_optimizers()
    assert type(optimizer).__name__ == "Lars"
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(method.parameters()))
    assert {p.ndim > 1 for group in optimizer.param_groups if group["decays"] for p in group["params"]} == {True}
    assert (config.sim, config.std, config.cov, config.temporal) == (10, 10, 10, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "photos"}, "frames in time order and photos are images"),
        ({"batch_size": 1}, "at least 2"),
        ({"frames": 4, "in_chans": 1}, "set frames only"),
        ({"temporal": -1.0}, "temporal is -1.0"),
        ({"projector": "a-b"}, "widths joined by dashes"),
        ({"respect_episodes": True}, "does not tell where episodes start"),
    ],
)
def test_what_cannot_be_is_refused_in_words(frames, tmp_path, changes, message):
    settings = {"data": f"frames:{frames}", "out": str(tmp_path / "x"), **SETTINGS, **changes}
    with pytest.raises(UsageError, match=message):
        pl.pretrain("tov_vicreg", **settings)
    assert not (tmp_path / "x").exists()


def test_area_under_the_curve_counts_pairs():
    scores, targets = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0.0, 0, 1, 1])
    assert auroc(scores, targets) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


DRIVER = """
import sys, os
sys.path[:0] = {paths!r}
import tests_support_tov
from patchloom.training.method import Method
step = int(sys.argv[1])
original = Method.training_step
def training_step(self, batch, batch_idx):
    if self.step == step:
        os.kill(os.getpid(), 9)
    return original(self, batch, batch_idx)
Method.training_step = training_step
from patchloom.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


def drive(tmp_path: Path, step: int, frames: Path, out: Path, **changes) -> subprocess.CompletedProcess:
    support = tmp_path / "tests_support_tov.py"
    support.write_text(
        "from timm.models import register_model\nfrom patchloom.encoders import frames as encoders\n\n@register_model\n"
        "def frames_test_patch8_24(pretrained=False, **kwargs):\n"
        "    shape = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'img_size': 24, **kwargs}\n"
        "    return encoders.vit_tiny_patch8_84(pretrained, **shape)\n"
    )
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(paths=[str(tmp_path)]))
    settings = {"data": f"frames:{frames}", "out": out, **SETTINGS, **changes}
    options = [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(script), str(step), "pretrain", "tov_vicreg", *options],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(run, frames, tmp_path):
    out = tmp_path / "killed"
    same = {"probe_data": f"frames:{frames}", "resume": "true"}
    killed = drive(tmp_path, 2, frames, out, **same)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = drive(tmp_path, -1, frames, out, **same)
    assert resumed.returncode == 0, resumed.stderr
    states = [
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (run.path, out)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_two_processes_compute_what_one_does(frames, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = {"drop_path": 0.0, "max_steps": 3}
    first = drive(tmp_path, -1, frames, one, **common)
    assert first.returncode == 0, first.stderr
    second = drive(tmp_path, -1, frames, two, **common, batch_size=4, devices=2, strategy="ddp")
    assert second.returncode == 0, second.stderr
    figures = [json.loads((path / "summary.json").read_text()) for path in (one, two)]
    for name in ("loss", "invariance", "variance", "covariance", "order_loss"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-3), name
    weights = [load_file(path / "model" / "model.safetensors") for path in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-4, rtol=1e-3)
