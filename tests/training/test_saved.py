"""A run folder before it is gone on with: damaged files are named, and passed over where another stands in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.io import read_config
from patchloom.training.checkpoint import AtomicCheckpointIO
from patchloom.training.config import TrainConfig, dump_config, plain_settings
from patchloom.training.saved import saved_settings, usable_checkpoint

SETTINGS = plain_settings(TrainConfig(data="photos", out="runs/x", lr=0.125))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    dump_config(SETTINGS, tmp_path / "config.yaml", "pretrain mae")
    for step in (1, 2, 3):
        state = {"global_step": step, "total_steps": 9, "settings": SETTINGS, "weights": torch.randn(1000)}
        AtomicCheckpointIO().save_checkpoint(state, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_the_last_checkpoint_and_the_one_before_are_kept(run_dir):
    assert {path.name: step_of(path) for path in (run_dir / "checkpoints").iterdir()} == {
        "last.ckpt": 3,
        "previous.ckpt": 2,
    }
    assert usable_checkpoint(run_dir) == run_dir / "checkpoints" / "last.ckpt"


def test_without_hard_links_they_are_kept_too(run_dir, monkeypatch):
    def refused(*paths: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refused)
    AtomicCheckpointIO().save_checkpoint({"global_step": 4}, run_dir / "checkpoints" / "last.ckpt")
    assert [step_of(run_dir / "checkpoints" / name) for name in ("last.ckpt", "previous.ckpt")] == [4, 3]


@pytest.mark.parametrize("how", ["cut off", "changed", "empty", "gone"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(run_dir, how, capsys):
    last = run_dir / "checkpoints" / "last.ckpt"
    held = last.read_bytes()
    middle = len(held) // 2
    changed = held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :]
    if how == "gone":
        last.unlink()
    else:
        last.write_bytes({"cut off": held[:middle], "changed": changed, "empty": b""}[how])
    found = usable_checkpoint(run_dir)
    assert found == run_dir / "checkpoints" / "previous.ckpt"
    assert step_of(found) == 2
    if how != "gone":
        assert "last.ckpt is damaged (" in capsys.readouterr().err
        assert (run_dir / "checkpoints" / "damaged.ckpt").exists()


def test_where_all_are_damaged_it_says_what_can_be_done(run_dir):
    (run_dir / "model").mkdir()
    for name in ("last.ckpt", "previous.ckpt"):
        (run_dir / "checkpoints" / name).write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match=r"last\.ckpt \(.*\) and previous\.ckpt \(.*anew with overwrite;.*init_from"):
        usable_checkpoint(run_dir)


@pytest.mark.parametrize("how", ["cut off", "no YAML", "binary"])
def test_damaged_settings_are_put_back_from_the_checkpoint(run_dir, how, capsys):
    file = run_dir / "config.yaml"
    text = file.read_text()
    file.write_bytes({"cut off": text[: text.index("warmup")].encode(), "no YAML": b"{", "binary": b"\xff\x00"}[how])
    assert saved_settings(run_dir, "pretrain mae") == SETTINGS
    assert "its settings are put back from the checkpoint" in capsys.readouterr().err
    assert file.read_text() == text


def test_settings_lost_with_the_checkpoints_are_an_error(run_dir):
    for file in (run_dir / "checkpoints").iterdir():
        file.unlink()
    (run_dir / "config.yaml").write_text("# patchloom pretrain mae --config config.yaml\n# 60 settings\ndata: photos\n")
    with pytest.raises(UsageError, match=r"it has 1 of its 60 settings\), and no checkpoint has its settings"):
        saved_settings(run_dir, "pretrain mae")


def test_settings_of_runs_before_they_were_counted_are_read(run_dir):
    (run_dir / "config.yaml").write_text("# patchloom pretrain mae --config config.yaml\ndata: photos\nout: x\n")
    assert saved_settings(run_dir, "pretrain mae") == {"data": "photos", "out": "x"}
    assert read_config(run_dir / "config.yaml") == {"data": "photos", "out": "x"}


def test_a_run_of_another_method_is_named_with_its_command(run_dir):
    with pytest.raises(
        UsageError, match=r"one of pretrain mae, not of adapt linear; .* patchloom pretrain mae --resume"
    ):
        saved_settings(run_dir, "adapt linear")
