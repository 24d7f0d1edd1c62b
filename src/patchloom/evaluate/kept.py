"""Training that is part of an evaluation and kept in a folder: nothing else goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchloom.errors import UsageError
from patchloom.io import make_folder, write_text
from patchloom.training.config import FREE_ON_RESUME

ASKED = "asked.json"
"""File of a run's folder that says what was asked."""


def claim(folder: Path, asked: Mapping[str, Any]) -> None:
    """Take the folder of a run, or go on in that of the same one.

    Raises:
        UsageError: It holds another run, or something else.
    """
    binding = {name: value for name, value in asked.items() if name not in FREE_ON_RESUME - {"data"}}
    record, words = folder / ASKED, json.dumps(binding, default=str, sort_keys=True)
    if folder.exists() and any(folder.iterdir()):
        if not record.exists():
            raise UsageError(f"{folder} is not empty and holds no run of this evaluation; choose another run")
        if record.read_text(encoding="utf-8") != words:
            raise UsageError(f"{folder} holds a run of another encoder or other settings; choose another run")
    make_folder(folder)
    write_text(record, words)
