"""Settings that name places on disk: written so that they lead there from any folder, and found again if a run moves.

`config.yaml` holds them as absolute paths. Where a run is gone on with, a place is looked for

1. inside the run folder, if it lay inside it before: it travels with the run;
2. where it was;
3. beside the run folder as it lay before: run and images may have moved together;
4. in the run folder, if it is something of which the run keeps a copy.

Runs written before this hold relative paths: they are meant from the folder one is in, else from the folder the run
was started in (which its `out` tells), else from the run folder.

>>> absolute("data", "photos:test"), absolute("encoder", "vit_tiny_patch16_224")
('photos:test', 'vit_tiny_patch16_224')
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchloom import registry
from patchloom.errors import UsageError
from patchloom.io import existing, printable

SOURCES = frozenset({"data", "probe_data", "val_data", "test"})
"""Settings that name data sources."""
MODELS = frozenset(
    {"encoder", "init_from", "teacher", "heads_from", "init_adapter", "adversary_encoder", "continue_from", "text_from"}
    | {"tokenizer"}
)
"""Settings that name models on disk, or in part known ones."""
FILES = frozenset({"codebook", "groups", "masks", "task_file", "perceptual_weights"})
"""Settings that name other files."""
MADE = frozenset({"out", "cache"})
"""Settings that name what may have yet to be made."""
COPIED = dict.fromkeys(("codebook", "tokenizer"), ("codebook.safetensors", "tokenizer"))
"""What a run has a copy of, under one of these names, used where the original is gone."""
PLACES = SOURCES | MODELS | FILES | MADE
# What stands before the path in the name of a source, and names whose rest is no path.
BEFORE_PATH = (
    *registry.OPENERS,
    *("frames", "chestxray14", "chexpert", "covidx", "mimic-cxr", "camvid", "ade20k", "mvtec", "visa", "hf"),
)
NO_PATH = ("photos", "digits", "moving", "shapes", "shapes3d", "torchvision", "atari", "anomalib")
NO_CACHE = ("auto", "none", "null", "off")


def absolute(name: str, value: str) -> str:
    """Return the value of a setting with the path in it made absolute; one that leads nowhere, or is none, as it is.

    Args:
        name: Name of the setting.
        value: Its value, such as `images`, `chexpert:sets/chexpert:train`, `labels.csv:test` or `x-{00..09}.tar`.
    """
    if name in MADE:
        return value if name == "cache" and value.lower() in NO_CACHE else str(Path.cwd() / value)
    place = _parted(name, value, Path.cwd())
    return value if place is None else _joined(place, Path.cwd())


def relocated(name: str, saved: Mapping[str, Any], run_dir: Path) -> str:
    """Return the value of a setting of a saved run, with the path in it as it is now.

    Args:
        name: Name of the setting.
        saved: Settings of the run, as its `config.yaml` has them.
        run_dir: Where the run is now.

    Raises:
        UsageError: The path leads nowhere any more; the error names all that was tried.
    """
    value = str(saved[name])
    if name in MADE:
        return value
    tried = []
    for base, path in _candidates(name, value, saved, run_dir):
        if (parts := _parted(name, path, base)) is not None:
            return _joined(parts, base)
        tried.append(_joined(_split(name, path), base))
    for copy in COPIED.get(name, ()):
        if (run_dir / copy).exists():
            return str(Path(os.path.abspath(run_dir)) / copy)  # noqa: PTH100 - may be a link
    if name in SOURCES:
        named = not _is_word(value) and not value.startswith("hf:")
    else:  # what is no path may be the name of a model
        named = name in FILES or Path(value).is_absolute()
    if named and tried:
        places = " nor ".join(printable(one) for one in dict.fromkeys(tried))
        raise UsageError(f"the run has {name}={value}, and there is neither {places}; give its place now as {name}")
    return value


def same_place(name: str, value: str, saved: Mapping[str, Any], run_dir: Path) -> bool:
    """Return whether a value leads to the same place as the one a run was saved with."""
    try:
        before = relocated(name, saved, run_dir)
    except UsageError:
        return False
    return _real(name, before) == _real(name, value)


def _candidates(name: str, value: str, saved: Mapping[str, Any], run_dir: Path) -> list[tuple[Path, str]]:
    """Return (folder, value that is meant from there) in the order in which they are tried."""
    now, was = Path(os.path.abspath(run_dir)), Path(str(saved.get("out") or run_dir))  # noqa: PTH100 - may be a link
    head, path, tail = _split(name, value)
    if not Path(path).is_absolute():
        bases = [Path.cwd()]
        parts = [part for part in was.parts if part != "."]
        if not was.is_absolute() and ".." not in parts and list(now.parts[len(now.parts) - len(parts) :]) == parts:
            bases.append(Path(*now.parts[: len(now.parts) - len(parts)]))
        return [(base, value) for base in (*bases, now)]
    candidates = [(now, value)]
    if was.is_absolute() and was != now:
        moved = (now, f"{head}{os.path.relpath(path, was)}{tail}")
        candidates = [moved, *candidates] if Path(path).is_relative_to(was) else [*candidates, moved]
    return candidates


def _parted(name: str, value: str, base: Path) -> tuple[str, str, str] | None:
    """Return what stands before the path, the path, and what follows; None where nothing is there."""
    if name in SOURCES and _is_word(value):
        return None
    head, path, tail = _split(name, value)
    while not _is_there(base / path):
        shorter, colon, last = path.rpartition(":")
        if not colon or "/" in last or not shorter:
            return None
        path, tail = shorter, f":{last}{tail}"
    return head, path, tail


def _split(name: str, value: str) -> tuple[str, str, str]:
    word, colon, rest = value.partition(":")
    return (f"{word}:", rest, "") if name in SOURCES and colon and word in BEFORE_PATH else ("", value, "")


def _joined(parts: tuple[str, str, str], base: Path) -> str:
    head, path, tail = parts
    joined = base / path
    return f"{head}{os.path.normpath(joined) if path.startswith('..') else joined}{tail}"


def _is_word(value: str) -> bool:
    return value.partition(":")[0] in NO_PATH


def _is_there(path: Path) -> bool:
    text = str(path)
    if text.endswith((".tar", ".tar.gz", ".tgz")):  # a pattern of shards: is its first there?
        text = re.sub(r"\{([^{}.,]*)(?:\.\.|,)[^{}]*\}", r"\1", text)
        if glob.has_magic(text):
            return bool(glob.glob(text))  # noqa: PTH207 - may be absolute
    try:
        return existing(text).exists()
    except OSError:
        return False


def _real(name: str, value: str) -> tuple[str, str, str] | str:
    place = _parted(name, value, Path.cwd())
    return value if place is None else (place[0], os.path.realpath(existing(place[1])), place[2])
