"""Checkpoints that are either whole or not there, whatever happens while one is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from patchloom.base.stored import read_pickle
from patchloom.training.method import Method
from patchloom.training.saved import LAST, PREVIOUS


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the one before it is intact."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a reader sees the old file or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointWriteError: The disk refused (full, read-only, gone).
        """
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.name == LAST:
                _keep(target)
            temporary.replace(target)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            kept = f"; the checkpoint before it is intact in {target}" if target.exists() else ""
            raise CheckpointWriteError(
                f"cannot write the checkpoint {target} ({_reason(error)}){kept}; free some space and resume"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of ours: tensors and plain values only, never arbitrary objects."""
        checkpoint: dict[str, Any] = read_pickle(path)
        return checkpoint


class CheckpointEvery(Checkpoint):
    """Writes `last.ckpt` every so many optimiser steps, at the end of each epoch, and when training ends.

    The one before it is kept as `previous.ckpt`.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path = folder / LAST
        self.every = every
        self.saved_at = -1

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where due. Only after whole optimiser steps: a half-accumulated gradient would be lost."""
        assert isinstance(pl_module, Method)
        if not pl_module.at_step_end():
            return
        ends = (
            (pl_module.at_epoch_end() and not pl_module.measures)
            or pl_module.step == pl_module.total_steps
            or trainer.should_stop
        )
        if pl_module.step % self.every == 0 or ends:
            self.save(trainer, pl_module.step)

    def on_train_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Save the end."""
        assert isinstance(pl_module, Method)
        self.save(trainer, pl_module.step)

    def save(self, trainer: lp.Trainer, step: int) -> None:
        """Write the checkpoint unless this step's is written already."""
        if self.saved_at != step:
            for logger in trainer.loggers:  # what was logged up to here must not be lost with the process
                logger.save()
            trainer.save_checkpoint(self.path)
            self.saved_at = step


def _keep(last: Path) -> None:
    """Keep a checkpoint beside the one that replaces it; there is a `last.ckpt` at any moment."""
    if not last.exists():
        return
    previous = last.with_name(PREVIOUS)
    link = last.with_name(PREVIOUS + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(last, link)
    except OSError:  # no hard links on this disk: for a moment only the previous one is there
        last.replace(previous)
        return
    link.replace(previous)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error)
    return "no space left on device" if "No space left" in text or "write failed" in text else text.split("\n")[0]
