"""Faults survived: kills at any moment, a full disk, NaN, Ctrl-C; two processes equal one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import patchloom as pl
from patchloom.base.stored import read_pickle
from patchloom.training.checkpoint import CheckpointWriteError
from patchloom.training.failure import NonFiniteLossError
from patchloom.training.metrics import read_metrics, series
from patchloom.training.run import read_run

TINY = {
    "encoder": "ccvit_tiny_patch8_64",
    "image_size": 32,
    "batch_size": 8,
    "accumulate": 2,
    "max_steps": 8,
    "k": 16,
    "codebook_images": 20,
    "codebook_iters": 2,
    "checkpoint_every": 1,
    "log_every": 1,
    "probe_every": 0,
    "num_workers": 0,
    "min_block": 2,
    "drop_path": 0.2,
    "ema": 0.9,
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 grey images of odd sizes, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(48):
        height, width = generator.integers(33, 50, 2)
        ramp = np.linspace(0, 255, width) + generator.normal(0, 30, (height, width))
        Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return folder


def command(images: Path | str, out: Path, **changes: Any) -> list[str]:
    settings = {**TINY, "data": images, "out": out, **changes}
    options = [f"--{name}={'null' if value is None else value}" for name, value in settings.items()]
    return [sys.executable, "-m", "patchloom.cli", "pretrain", "ccvit", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(images, out), check=True, env=environment(), capture_output=True)
    return out


# Kills the process the way a power cut would, at a chosen moment of the run.
KILLER = """
import os, sys
import torch
from patchloom.training import checkpoint
from patchloom.training.method import Method

moment, step = sys.argv[1], int(sys.argv[2])

if moment == "step":
    original = Method.training_step
    def training_step(self, batch, batch_idx):
        if self.step == step:
            os.kill(os.getpid(), 9)
        return original(self, batch, batch_idx)
    Method.training_step = training_step
else:
    saved = torch.save
    writes = 0
    def save(value, file, *rest, **named):
        global writes
        writes += 1
        if writes == step:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), 9)
        return saved(value, file, *rest, **named)
    checkpoint.torch.save = save

from patchloom.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(images, uninterrupted, tmp_path):
    out = tmp_path / "killed"
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    arguments = command(images, out)[3:]
    # In the first step, inside the writing of a checkpoint, and in a later step.
    for moment, step in (("step", 0), ("write", 3), ("step", 6)):
        done = subprocess.run(
            [sys.executable, str(script), moment, str(step), *arguments, "--resume=true"],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    subprocess.run([*command(images, out), "--resume=true"], check=True, env=environment(), capture_output=True)
    whole, resumed = (load_file(run / "model" / "model.safetensors") for run in (uninterrupted, out))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (uninterrupted, out)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    curves = [series(read_metrics(run / "metrics.csv"), "loss") for run in (uninterrupted, out)]
    assert curves[0] == curves[1]
    assert "broken.png" in (out / "skipped.csv").read_text()
    assert len(curves[0][0]) == 8


@pytest.mark.slow
def test_a_run_from_shards_goes_on_with_other_workers(images, tmp_path):
    pytest.importorskip("webdataset")
    for shard, part in enumerate((slice(0, 20), slice(20, 24), slice(24, 48))):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for image in sorted(images.glob("[0-9]*.png"))[part]:
                archive.add(image, image.name)
    data = f"{tmp_path}/{{0..2}}.tar"
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    runs = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(data, runs[0], num_workers=3), check=True, env=environment(), capture_output=True)
    killer = [sys.executable, str(script), "step", "4", *command(data, runs[1], num_workers=3)[3:], "--resume=true"]
    assert subprocess.run(killer, env=environment(), capture_output=True).returncode == -signal.SIGKILL
    going_on = [*command(data, runs[1], num_workers=0), "--resume=true"]
    subprocess.run(going_on, check=True, env=environment(), capture_output=True)
    whole, resumed = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_run_folder_holds_what_it_should(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["data"]["images"] == 49
    assert summary["interrupted"] is False
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.yaml", "metrics.csv", "tensorboard", "checkpoints", "model", "report.html", "skipped.csv"} <= names
    assert "broken.png" in (uninterrupted / "skipped.csv").read_text()
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    steps = [
        read_pickle(uninterrupted / "checkpoints" / name)["global_step"] for name in ("previous.ckpt", "last.ckpt")
    ]
    assert steps == [7, 8]


def test_a_complete_run_is_left_alone(images, uninterrupted, capsys):
    before = (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns
    run = pl.pretrain("ccvit", out=str(uninterrupted), resume=True)
    assert run.summary["steps"] == 8
    assert "nothing to resume" in capsys.readouterr().err
    assert (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def damaged(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of a run, to be damaged."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "damaged"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(damaged, uninterrupted, capsys):
    last = damaged / "checkpoints" / "last.ckpt"
    held = last.read_bytes()
    last.write_bytes(held[: len(held) // 2])
    run = pl.pretrain("ccvit", out=str(damaged), resume=True)
    said = capsys.readouterr().err
    assert "last.ckpt is damaged (" in said
    assert "it is kept as damaged.ckpt, and the run goes on from" in said
    assert "going on after step 7 of 8" in said
    assert run.summary["steps"] == 8
    whole, again = (load_file(path / "model" / "model.safetensors") for path in (uninterrupted, damaged))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_of_another_method_is_named(uninterrupted):
    with pytest.raises(
        pl.UsageError, match="is one of pretrain ccvit, not of pretrain mae; go on with it by patchloom"
    ):
        pl.pretrain("mae", out=str(uninterrupted), resume=True)


def test_damaged_settings_and_summary_are_written_anew(damaged):
    text = (damaged / "config.yaml").read_text()
    (damaged / "config.yaml").write_bytes(b"\xff\x00")
    (damaged / "summary.json").write_text('{"steps": 8, "tot')
    with pytest.raises(pl.UsageError, match="resume writes it anew"):
        read_run(damaged)
    assert pl.pretrain("ccvit", out=str(damaged), resume=True).summary["steps"] == 8
    assert len((damaged / "config.yaml").read_text().splitlines()) == len(text.splitlines())


def test_a_damaged_codebook_is_named(damaged):
    (damaged / "codebook.safetensors").write_bytes(b"short")
    (damaged / "summary.json").unlink()
    with pytest.raises(pl.UsageError, match=r"codebook\.safetensors is damaged .*delete it and resume"):
        pl.pretrain("ccvit", out=str(damaged), resume=True)


def test_an_existing_run_is_not_overwritten_unasked(images, uninterrupted):
    with pytest.raises(pl.UsageError, match=r"is not empty; resume goes on with it, overwrite deletes it"):
        pl.pretrain("ccvit", **{**TINY, "data": str(images), "out": str(uninterrupted)})


def test_a_request_that_fails_at_the_start_leaves_no_folder(images, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(pl.UsageError, match=r"accumulate=1000 needs 1000 batches per epoch, and .* gives 6"):
        pl.pretrain("ccvit", **{**TINY, "data": str(images), "out": str(out), "accumulate": 1000})
    assert not out.exists()


def test_overwrite_deletes_runs_only(images, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(pl.UsageError, match="holds no run, so overwrite will not delete it"):
        pl.pretrain("ccvit", **{**TINY, "data": str(images), "out": str(tmp_path), "overwrite": True})
    assert (tmp_path / "thesis.txt").exists()


def test_resuming_with_other_settings_is_refused(images, uninterrupted):
    with pytest.raises(pl.UsageError, match=r"has lr=0\.0015, not 0\.1"):
        pl.pretrain("ccvit", out=str(uninterrupted), resume=True, lr=0.1)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(images, tmp_path, monkeypatch):
    from patchloom.systems.ccvit.method import CCViTMethod

    original = CCViTMethod.training_loss

    def poisoned(self: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        losses = original(self, batch)
        return {**losses, "loss": losses["loss"] * float("nan")} if self.step == 3 else losses

    monkeypatch.setattr(CCViTMethod, "training_loss", poisoned)
    out = tmp_path / "nan"
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 3 \(last learning rate .*, batch: .*\.png"):
        pl.pretrain("ccvit", **{**TINY, "data": str(images), "out": str(out)})
    note = json.loads((out / "failure.json").read_text())
    assert note["step"] == 3
    assert len(note["files"]) == 8
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not (out / "model").exists()


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(images, tmp_path, monkeypatch):
    saved, writes = torch.save, []

    def save(value: Any, file: Any, *rest: Any, **named: Any) -> Any:
        writes.append(1)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        return saved(value, file, *rest, **named)

    monkeypatch.setattr(torch, "save", save)
    out = tmp_path / "full"
    with pytest.raises(CheckpointWriteError, match=r"no space left on device.*is intact"):
        pl.pretrain("ccvit", **{**TINY, "data": str(images), "out": str(out)})
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def session(process: subprocess.Popen[str]) -> list[int]:
    """Return all processes of a command: itself, its ranks, their data workers."""
    listed = subprocess.run(["ps", "-o", "pid=", "--sid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in listed.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "target", "devices"),
    [
        (signal.SIGINT, "group", 1),  # as a terminal does
        (signal.SIGTERM, "all", 1),  # as systemd does: to the data workers too
        (signal.SIGUSR1, "parent", 1),
        (signal.SIGTERM, "rank 1", 2),
    ],
)
def test_a_signal_ends_the_run_in_order(images, tmp_path, number, target, devices):
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command(images, out, max_steps=100_000, num_workers=1, checkpoint_every=10_000, batch_size=4, devices=devices),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    if target == "group":
        os.killpg(process.pid, number)
    elif target == "rank 1":
        ranks = [pid for pid in session(process) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(ranks[0], number)
    else:
        for pid in session(process) if target == "all" else [process.pid]:
            os.kill(pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stopped_by"] == number.name
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == summary["steps"] > 0
    assert (out / "report.html").exists()
    assert pl.load(out).num_features == 192


@pytest.mark.slow
def test_a_signal_while_the_codebook_is_fitted_ends_at_once(images, tmp_path):
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command(images, out, codebook_iters=100_000, codebook_images=40),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "no step was saved; that is how --resume goes on" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(images, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            import patchloom as pl

            if __name__ == "__main__":
                pl.pretrain("ccvit", **json.loads(sys.argv[1]))
            """
        )
    )
    settings = {**TINY, "data": str(images), "drop_path": 0.0, "ema": None, "accumulate": 1, "max_steps": 6}
    curves = []
    for name, devices, batch in (("one", 1, 8), ("two", 2, 4)):
        run = {**settings, "out": str(tmp_path / name), "devices": devices, "batch_size": batch}
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(run)], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        curves.append(series(read_metrics(tmp_path / name / "metrics.csv"), "loss")[1])
    assert len(curves[0]) == 6
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=1e-5)
