"""DINOv2 survives a power cut to the bit, teacher and centres included; two processes compute what one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.training.failure import NonFiniteLossError
from patchloom.training.metrics import read_metrics, series

TINY = {
    "data": "digits",
    "encoder": "vit_tiny_patch16_224",
    "image_size": 32,
    "local_size": 16,
    "local_crops": 2,
    "batch_size": 8,
    "max_steps": 6,
    "epochs": 1,
    "out_dim": 48,
    "head_hidden_dim": 32,
    "bottleneck_dim": 16,
    "separate_head": True,
    "checkpoint_every": 1,
    "log_every": 1,
    "probe_every": 0,
    "report": False,
    "num_workers": 0,
    "drop_path": 0.3,
    "lr": 1e-2,
    "lr_base_batch": None,
    "precision": "32-true",
    "accelerator": "cpu",
}
TRAIN = """
import json, os, sys
import patchloom as pl
from patchloom.systems.dinov2.method import Dinov2Method

if __name__ == "__main__":
    settings, step = json.loads(sys.argv[1]), int(sys.argv[2])
    original = Dinov2Method.training_step

    def training_step(self, batch, batch_idx):
        if self.step == step:
            os.kill(os.getpid(), 9)
        return original(self, batch, batch_idx)

    Dinov2Method.training_step = training_step
    pl.pretrain("dinov2", **settings)
"""


def in_another_process(folder: Path, settings: dict[str, Any], killed_at: int = -1) -> subprocess.CompletedProcess[str]:
    script = folder / "train.py"
    script.write_text(TRAIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), json.dumps(settings), str(killed_at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(tmp_path):
    whole = pl.pretrain("dinov2", **{**TINY, "out": str(tmp_path / "whole")})
    settings = {**TINY, "out": str(tmp_path / "killed"), "resume": True}
    done = in_another_process(tmp_path, settings, killed_at=4)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = pl.pretrain("dinov2", **settings)
    states = [
        torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, again)
    ]
    names = states[0].keys()
    assert any(".teacher.ibot_head." in name for name in names)
    assert any(name.endswith("dino_centering.center") for name in names)
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    assert states[0]["model.dino_centering.center"].abs().sum() > 0
    for name in ("loss", "teacher_momentum", "teacher_entropy", "lr"):
        curves = [series(read_metrics(run.path / "metrics.csv"), name) for run in (whole, again)]
        assert curves[0] == curves[1]
        assert len(curves[0][0]) == 6


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(tmp_path):
    # KoLeo, by publication, looks among the images of a process; drop path draws in each process by itself.
    settings = {**TINY, "koleo_weight": 0.0, "drop_path": 0.0, "max_steps": 4}
    one = pl.pretrain("dinov2", **{**settings, "out": str(tmp_path / "one")})
    two = {**settings, "out": str(tmp_path / "two"), "devices": 2, "batch_size": 4}
    done = in_another_process(tmp_path, two)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "dino_global_loss", "dino_local_loss", "ibot_loss"):
        curves = [series(read_metrics(path / "metrics.csv"), name)[1] for path in (one.path, tmp_path / "two")]
        assert len(curves[0]) == 4
        np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=2e-5)


def test_a_loss_that_is_not_finite_is_named_with_its_term(tmp_path, monkeypatch):
    from patchloom.systems.dinov2 import model as self_distillation

    monkeypatch.setattr(self_distillation, "koleo_loss", lambda x, **_: x.sum() * float("nan"))
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 0 from koleo_loss, published_koleo "):
        pl.pretrain("dinov2", **{**TINY, "out": str(tmp_path / "nan")})
