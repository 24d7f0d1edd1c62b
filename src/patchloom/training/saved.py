"""What a run folder says of its run before it is gone on with: whose it is, its settings, its checkpoint, its end.

A damaged file is named and passed over where another can stand in for it: the checkpoint before the last, and the
settings that every checkpoint carries.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from patchloom.errors import UsageError
from patchloom.io import read_config
from patchloom.training.config import CONFIG, dump_config

CHECKPOINTS, LAST, PREVIOUS, DAMAGED = "checkpoints", "last.ckpt", "previous.ckpt", "damaged.ckpt"


def command_of(run_dir: Path) -> str | None:
    """Return the words that name the method of a run (`pretrain ccvit`), where its folder says so."""
    try:
        with (run_dir / CONFIG).open(encoding="utf-8") as file:
            match = re.match(r"# patchloom (.+?) --config", file.readline())
    except (OSError, UnicodeDecodeError):
        return None
    return match[1] if match else None


def saved_settings(run_dir: Path, command: str) -> dict[str, Any]:
    """Return the settings of the run in a folder; put them back from a checkpoint where their file is damaged.

    Args:
        run_dir: Run folder.
        command: The words that name the method which is to go on with it.

    Raises:
        UsageError: It is a run of another method (with the command that fits), or no settings can be read.
    """
    made_by = command_of(run_dir)
    if made_by is not None and made_by != command:
        raise UsageError(
            f"the run in {run_dir} is one of {made_by}, not of {command}; go on with it by "
            f"patchloom {made_by} --resume --out {run_dir}, or choose another out"
        )
    path = run_dir / CONFIG
    try:
        return _whole(path)
    except UsageError as error:
        settings = _from_checkpoint(run_dir)
        if settings is None:
            raise UsageError(
                f"{path} is damaged ({error}), and no checkpoint has its settings; put it back from a copy, or start "
                f"anew with overwrite"
            ) from error
        print(f"{path} is damaged ({error}); its settings are put back from the checkpoint", file=sys.stderr)
        dump_config(settings, path, command)
        return read_config(path)


def _whole(path: Path) -> dict[str, Any]:
    values = read_config(path)
    counted = re.search(r"^# (\d+) settings$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if counted and len(values) < int(counted[1]):
        raise UsageError(f"it has {len(values)} of its {counted[1]} settings")
    return values


def _from_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    from patchloom.base.stored import read_pickle

    for name in (LAST, PREVIOUS):
        path = run_dir / CHECKPOINTS / name
        try:
            settings = read_pickle(path, mmap=True).get("settings") if path.exists() else None
        except UsageError:
            continue
        if isinstance(settings, dict):
            return settings
    return None


def usable_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint to go on from: the last, or where that is damaged the one before it, saying so.

    Raises:
        UsageError: There are checkpoints, and all are damaged.
    """
    from patchloom.base.stored import damage

    folder, wrong = run_dir / CHECKPOINTS, {}
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        if (reason := damage(path)) is not None:
            wrong[path.name] = reason
            continue
        if LAST in wrong:
            (folder / LAST).replace(folder / DAMAGED)
            print(
                f"{folder / LAST} is damaged ({wrong[LAST]}); it is kept as {DAMAGED}, and the run goes on from {path}",
                file=sys.stderr,
            )
        return path
    if not wrong:
        return None
    listed = " and ".join(f"{name} ({reason})" for name, reason in wrong.items())
    weights = f"; {run_dir / 'model'} has the weights of an earlier stop, for init_from" if holds_model(run_dir) else ""
    raise UsageError(f"all checkpoints in {folder} are damaged: {listed}; start the run anew with overwrite{weights}")


def holds_model(run_dir: Path) -> bool:
    """Return whether a run has written its model."""
    return (run_dir / "model").exists()


def is_complete(checkpoint: Path, run_dir: Path) -> bool:
    """Return whether a run has made all its steps and written all it leaves behind."""
    from patchloom.base.stored import read_pickle

    state = read_pickle(checkpoint, mmap=True)
    steps = steps_done(state)
    if steps < state["total_steps"] or not holds_model(run_dir):
        return False
    try:  # the summary is written last; one of an earlier stop is of fewer steps
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return bool(summary["steps"] == steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def steps_done(checkpoint: dict[str, Any]) -> int:
    """Return the steps a checkpoint was written after; older ones, of one optimiser, have Lightning's count alone."""
    return int(checkpoint["step"] if "step" in checkpoint else checkpoint["global_step"])
