"""Features kept on disk: the second measurement of an encoder on the same images starts at once.

An entry is found by its content: every weight of the encoder, how its vectors are made, and the fingerprint of the
source (for a folder the names, sizes and times of its files; a file that is replaced by one of the same size and the
same time goes unnoticed). Other weights or other images make another entry. Where an encoder of the same name was
measured on the same source before, the new entry takes the place of the old one, and says why.

Entries lie in `~/.cache/patchloom/features`, or where the environment variable PATCHLOOM_CACHE says. Beyond
PATCHLOOM_CACHE_GB gigabytes (20) those not used for longest are deleted; `patchloom cache` lists what is there, and
`patchloom cache --clear` deletes it.

>>> from patchloom.data import open_source
>>> first = cached_features(None, open_source("digits:test"), cache="cache", num_workers=0)  # doctest: +SKIP
>>> again = cached_features(None, open_source("digits:test"), cache="cache")  # from disk  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from patchloom.base.sizes import Size
from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import View
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.features.extract import Features, Pool, Precision, Produce, Take, extract_into, side_of, vector_parts
from patchloom.features.fingerprint import digest, place_of_source, source_hash, weights_hash
from patchloom.features.inputs import require_taken

# Raised when the same encoder and images would give other vectors than before.
FORMAT = 1
ABOUT, VECTORS, LABELS, KEYS = "about.json", "vectors.npy", "labels.npy", "keys.npy"
LIMIT_GB = 20.0
# An unfinished entry this old, in seconds, was left by a process that is gone.
ABANDONED = 24 * 3600


def cached_features(
    encoder: Encoder | None,
    source: Source | StreamSource,
    *,
    cache: str | Path | None = "auto",
    name: str | None = None,
    image_size: Size | None = None,
    batch_size: int = 128,
    num_workers: int = 2,
    device: str = "auto",
    pool: Pool = "auto",
    layers: Sequence[int] | None = None,
    precision: Precision = "32",
    view: View = "crop",
    progress: bool = True,
) -> Features:
    """Return the features of all images of a source as `extract` does, from disk where they are there already.

    Args:
        encoder: The encoder, or None for raw pixels.
        source: Where the images come from.
        cache: Folder of the cache; `auto` is its usual place, `none` (or None) leaves it out.
        name: What the user calls the encoder: features of the same name and source that are out of date are replaced.
        image_size: As for `extract`, like all that follow.
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: `auto`, `cpu`, `cuda`, …
        pool: How tokens become a vector.
        layers: Blocks whose output is taken.
        precision: Number format of the encoder's arithmetic.
        view: What the encoder is shown of an image.
        progress: Show a bar on a terminal.

    Returns:
        Features whose vectors are mapped from the disk: pages are read when they are used. Writing to them changes
        nothing on disk.

    Raises:
        UsageError: As for `extract`; or the place of the cache is a file.
    """
    require_taken(source, encoder)
    if layers is not None and encoder is not None:
        vector_parts(encoder, pool, layers)  # refuses what cannot be, before anything is hashed
    name = "pixels" if encoder is None else name
    root = cache_folder(cache)
    how: dict[str, Any] = {"pool": pool, "layers": layers, "precision": precision, "view": view}
    options = {**how, "image_size": image_size, "batch_size": batch_size, "num_workers": num_workers}
    options |= {"device": device, "progress": progress}
    if root is None:
        return _extracted(encoder, source, options)
    about = {
        "format": FORMAT,
        "encoder": weights_hash(encoder),
        "source": source_hash(source),
        "how": {**how, "layers": None if layers is None else list(layers), "side": side_of(encoder, image_size)},
    }

    def produce(take: Take) -> list[tuple[str, str]]:
        return extract_into(take, encoder, source, **options)

    rows = kept_rows(root, about, name, source.name, produce)
    return _extracted(encoder, source, options) if rows is None else rows


def kept_rows(
    root: Path, about: dict[str, Any], model_name: str | None, source_name: str, produce: Produce
) -> Features | None:
    """Return one row for each image of a source from disk; where they are not there, they are made and kept.

    Args:
        root: Folder of the cache, see `cache_folder`.
        about: All that makes the rows what they are: hashes of the model (`encoder`) and of the images (`source`),
            and how the one is applied to the other (`how`).
        model_name: What the user calls the model: rows of the same names and the same `how` that are out of date are
            replaced.
        source_name: What the user calls the images.
        produce: Makes the rows: it calls its argument with rows (B, D) float32, labels and keys of each batch, and
            returns what could not be read.

    Returns:
        The rows, mapped from the disk, or None where the cache cannot be written; a warning says so.
    """
    key = digest(json.dumps(about, sort_keys=True).encode())
    about = {**about, "encoder_name": model_name, "source_name": source_name}
    # Entries of one model by name, one source and one way to make rows lie side by side.
    about_pair = [model_name or key, place_of_source(source_name), about["how"]]
    entry = root / digest(json.dumps(about_pair, sort_keys=True).encode())[:16] / key
    stored = _read(entry)
    if stored is not None:
        return stored
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"features are not kept, the cache {root} cannot be written: {error}", stacklevel=3)
        return None
    _replace_outdated(entry, about)
    features = _write(entry, about, produce)
    _keep_within_limit(root, entry)
    return features


def cache_folder(cache: str | Path | None = "auto") -> Path | None:
    """Return the folder a setting `cache` means, or None for no cache.

    Raises:
        UsageError: A file is in its place.
    """
    if cache is None or str(cache).lower() in ("none", "null", "off"):
        return None
    if str(cache) != "auto":
        folder = Path(cache).expanduser()
    elif given := os.environ.get("PATCHLOOM_CACHE"):
        folder = Path(given).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "patchloom" / "features"
    if folder.is_file():
        raise UsageError(f"cache is {folder}, which is a file; name a folder, or none for no cache")
    return folder


def list_entries(cache: str | Path | None = "auto") -> list[dict[str, Any]]:
    """Return what a cache holds, the last used first: encoder, source, images, megabytes, day of the last use."""
    root = cache_folder(cache)
    entries = [] if root is None else sorted(_entries(root), key=_last_use, reverse=True)
    listed = []
    for entry in entries:
        about = _about(entry) or {}
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(_last_use(entry)))
        listed.append(
            {
                "encoder": about.get("encoder_name") or "a module",
                "source": about.get("source_name"),
                "images": about.get("shape", [0])[0],
                "megabytes": round(_size(entry) / 1e6, 1),
                "used": used,
                "entry": str(entry),
            }
        )
    return listed


def clear(cache: str | Path | None = "auto") -> int:
    """Delete all entries of a cache, and nothing else in its folder; return how many there were."""
    root = cache_folder(cache)
    entries = [] if root is None else list(_entries(root))
    for entry in entries:
        _delete(entry)
    return len(entries)


def _extracted(encoder: Encoder | None, source: Source | StreamSource, options: dict[str, Any]) -> Features:
    from patchloom.features.extract import extract

    return extract(encoder, source, **options)


def _write(entry: Path, about: dict[str, Any], produce: Produce) -> Features:
    """Make rows into an entry, which appears whole or not at all, and return them from there."""
    temporary = Path(tempfile.mkdtemp(prefix=".writing.", dir=entry.parent))
    try:
        labels: list[Tensor] = []
        keys: list[str] = []
        with (temporary / VECTORS).open("wb") as file:
            writer = _Rows(file)

            def take(vectors: Tensor, known: Tensor, names: list[str]) -> bool:
                writer.add(vectors.numpy())
                labels.append(known)
                keys.extend(names)
                return True

            skipped = produce(take)
            writer.finish()
        np.save(temporary / LABELS, torch.cat(labels).numpy())
        np.save(temporary / KEYS, np.frombuffer("\0".join(keys).encode(errors="surrogateescape"), dtype=np.uint8))
        about = {**about, "shape": [writer.rows, writer.width], "skipped": skipped}
        (temporary / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        temporary.chmod(0o755)
        try:
            temporary.rename(entry)
        except OSError:  # another process was faster, or a damaged entry is in the place
            if _read(entry) is None:
                _delete(entry)
                temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    features = _read(entry)
    if features is None:
        raise OSError(f"the features written to {entry} cannot be read back; is the disk full?")
    return features


class _Rows:
    """Writes a .npy file row by row; how many there are is filled in at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.rows = self.width = 0

    def add(self, rows: np.ndarray) -> None:
        if not self.rows:
            self.width = rows.shape[1]
            self._header()
        self.file.write(np.ascontiguousarray(rows, dtype=np.float32).data)
        self.rows += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for the first number to grow.
        about = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, about)


def _read(entry: Path) -> Features | None:
    """Return the features of an entry; None where there is none, or where it is damaged."""
    about = _about(entry)
    if about is None:
        return None
    try:
        # Copy on write: whoever changes a vector changes their own copy.
        vectors = torch.from_numpy(np.load(entry / VECTORS, mmap_mode="c"))
        labels = torch.from_numpy(np.load(entry / LABELS))
        text = np.load(entry / KEYS).tobytes().decode(errors="surrogateescape")
    except (OSError, ValueError, EOFError):
        return None
    keys = text.split("\0")
    if list(vectors.shape) != about["shape"] or len(labels) != len(vectors) or len(keys) != len(vectors):
        return None
    with suppress(OSError):  # a cache that may be read but not written
        os.utime(entry / ABOUT)
    return Features(vectors, labels, keys, [(key, reason) for key, reason in about["skipped"]])


def _replace_outdated(entry: Path, about: dict[str, Any]) -> None:
    """Delete what was cached for the same names, and say what has changed since."""
    for other in entry.parent.iterdir():
        if other.name.startswith("."):
            if time.time() - other.stat().st_mtime > ABANDONED:
                _delete(other)
            continue
        before = _about(other)
        if other == entry or before is None:
            _delete(other)
            continue
        what = [
            text
            for field, text in (
                ("encoder", f"the weights of {about['encoder_name']}"),
                ("source", about["source_name"]),
            )
            if before[field] != about[field]
        ]
        print(
            f"{' and '.join(what) or 'the way of extracting'} changed since features were kept; extracting them anew",
            file=sys.stderr,
        )
        _delete(other)


def _keep_within_limit(root: Path, keep: Path) -> None:
    """Delete the entries not used for longest until the rest fits."""
    entries = sorted(_entries(root), key=_last_use, reverse=True)
    total, most = 0, limit_in_bytes()
    for entry in [keep, *(one for one in entries if one != keep)]:
        size = _size(entry)
        total += size
        if total > most and entry != keep:
            about = _about(entry) or {}
            print(
                f"the cache {root} exceeds {most / 1e9:g} GB (PATCHLOOM_CACHE_GB): deleting the features of "
                f"{about.get('encoder_name') or 'a module'} on {about.get('source_name')}",
                file=sys.stderr,
            )
            _delete(entry)
            total -= size


def limit_in_bytes() -> float:
    given = os.environ.get("PATCHLOOM_CACHE_GB", str(LIMIT_GB))
    try:
        return float(given) * 1e9
    except ValueError as error:
        raise UsageError(f"PATCHLOOM_CACHE_GB is {given!r}; it must be a number of gigabytes") from error


def _entries(root: Path) -> Iterator[Path]:
    for about in root.glob(f"*/*/{ABOUT}"):
        if not about.parent.name.startswith(".") and _about(about.parent) is not None:
            yield about.parent


def _about(entry: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(about, dict) and about.get("format") == FORMAT and "shape" in about
    return about if is_ours else None


def _last_use(entry: Path) -> float:
    try:
        return (entry / ABOUT).stat().st_mtime
    except OSError:
        return 0.0


def _size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir() if file.is_file())


def _delete(entry: Path) -> None:
    shutil.rmtree(entry, ignore_errors=True)
