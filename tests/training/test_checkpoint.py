"""Checkpoints: whole or not there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.training.checkpoint import AtomicCheckpointIO, CheckpointWriteError


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"weights": torch.ones(3), "step": 1}, path)

    def full(file_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match=r"no space left on device.*the checkpoint before it is intact"):
        writer.save_checkpoint({"weights": torch.zeros(3), "step": 2}, path)
    assert writer.load_checkpoint(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_really_full_disk_is_one_clear_error(tmp_path):
    """The limit on file size is the nearest thing to a full disk that a test may cause."""
    code = f"""
        import resource, signal, torch
        from patchloom.training.checkpoint import AtomicCheckpointIO, CheckpointWriteError
        writer = AtomicCheckpointIO()
        writer.save_checkpoint({{"step": 1}}, {str(tmp_path / "last.ckpt")!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            writer.save_checkpoint({{"weights": torch.zeros(1_000_000)}}, {str(tmp_path / "last.ckpt")!r})
        except CheckpointWriteError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "cannot write the checkpoint" in done.stdout
    assert "is intact" in done.stdout
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt") == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_checkpoints_that_could_run_code_are_not_read(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple:
            return print, ("boom",)

    torch.save({"bomb": Bomb()}, tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="could run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
