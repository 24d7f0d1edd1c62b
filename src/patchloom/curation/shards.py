"""Images as tar shards, their files as they are, for reading from front to back (WebDataset's layout).

Shards appear whole or not at all, so what a stopped command has written stays good and is not written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.base.progress import track
from patchloom.curation.config import ShardsConfig
from patchloom.curation.listing import Files, as_files
from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder, raw_name, write_json, written_whole

ABOUT = "shards.json"
BLOCK = 512
"""A tar file's own block: a header, and what contents are filled up to."""


def run_shards(config: ShardsConfig) -> dict[str, Any]:
    """Write images as tar shards.

    The image of a/b.jpg is a/b.jpg in its shard, its class a/b.cls, several labels a/b.json, its caption a/b.txt. A dot
    within a name becomes an underscore, as what follows the first dot says what a file is; masks are left out.

    Returns:
        `images`, number of `shards`, those `written` now, files `missing` that have gone since they were listed, and
        the source that names the shards (`data`).

    Raises:
        UsageError: No such data, the images are no files, or the folder holds shards of other images.
    """
    folder = check_place(config.out)
    opened = open_source(config.data, by_index=True, quiet=True, **config.source_options())
    source = as_files(opened, "data shards")
    order = np.random.default_rng(config.seed).permutation(len(source)) if config.shuffle else np.arange(len(source))
    about = {
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "images": len(source),
        "shard_mb": config.shard_mb,
        "order": hashlib.sha256(order.tobytes()).hexdigest()[:16],
        "classes": source.class_names,
    }
    _check_folder(folder, about, config.overwrite)
    make_folder(folder)
    write_json(folder / ABOUT, about)
    stems = _stems(source)
    numbered = _numbered(source)
    plan = list(_plan(source, order, config.shard_mb * 2**20))
    digits = max(6, len(str(len(plan) - 1)))
    written, missing = 0, list[str]()
    for number, places in enumerate(track(plan, "shards", unit="shard")):
        path = folder / f"images-{number:0{digits}d}.tar"
        if path.exists():
            continue
        with written_whole(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for place in places.tolist():
                if not _add(archive, source, place, stems[place], numbered):
                    missing.append(source.key(place))
        written += 1
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notice(f"{missing[0]}{more} could not be read and is in no shard")
    last = f"{len(plan) - 1:0{digits}d}"
    name = f"images-{{{0:0{digits}d}..{last}}}.tar" if len(plan) > 1 else f"images-{last}.tar"
    return {
        "images": len(source) - len(missing),
        "shards": len(plan),
        "written": written,
        "missing": len(missing),
        "data": str(folder / name),
    }


def _check_folder(folder: Path, about: dict[str, Any], overwrite: bool) -> None:
    """Refuse shards of other images; with `overwrite` take them away."""
    shards = sorted(folder.glob("images-*.tar")) if folder.is_dir() else []
    if not shards:
        return
    try:
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before == json.loads(json.dumps(about)):
        return
    if not overwrite:
        raise UsageError(
            f"{folder} holds shards of other images or of other settings; choose another out, or set overwrite"
        )
    for shard in shards:
        shard.unlink()


def _path(source: Files, place: int) -> Path:
    return source.root / raw_name(source.key(place))


def _stems(source: Files) -> list[str]:
    """Return the name of each image within its shard, without ending: no two alike, no dot in them."""
    stems: list[str] = []
    seen: Counter[str] = Counter()
    for place in range(len(source)):
        path = Path(raw_name(source.key(place)))
        parts = [part for part in path.with_suffix("").parts if part not in ("..", "/", ".")]
        stem = "/".join(part.replace(".", "_") for part in parts)
        seen[stem] += 1
        stems.append(stem if seen[stem] == 1 else f"{stem}_{seen[stem]}")
    return stems


def _numbered(source: Files) -> bool:
    """Return whether classes are written by number, as their names are numbers of another meaning."""
    names = source.class_names or []
    if source.multilabel or not any(name.strip().lstrip("-").isdigit() for name in names):
        return False
    if names != [str(number) for number in range(len(names))]:
        notice(f"the names of classes are numbers, so shards hold their places from 0; {ABOUT} has the names")
    return True


def _plan(source: Files, order: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Yield the images of each shard: as many as fit."""
    start, held = 0, 0
    for at, place in enumerate(order.tolist()):
        try:
            size = _path(source, place).stat().st_size
        except OSError:
            size = 0
        # Image and label with their headers; what labels hold fits a block.
        needed = 4 * BLOCK + -(-size // BLOCK) * BLOCK
        if at > start and held + needed > most:
            yield order[start:at]
            start, held = at, 0
        held += needed
    yield order[start:]


def _add(archive: tarfile.TarFile, source: Files, place: int, stem: str, numbered: bool) -> bool:
    """Write an image with its label and caption; returns whether its file could be read."""
    path = _path(source, place)
    try:
        content = path.read_bytes()
    except OSError:
        return False
    _write(archive, stem + path.suffix.lower(), content)
    if source.labels is not None and source.class_names is not None:
        label = source.labels[place]
        if source.multilabel:
            shares = {
                name: None if np.isnan(share) else float(share)
                for name, share in zip(source.class_names, label, strict=True)
            }
            _write(archive, f"{stem}.json", json.dumps({"labels": shares}, ensure_ascii=False).encode())
        elif label >= 0:
            name = str(int(label)) if numbered else source.class_names[int(label)]
            _write(archive, f"{stem}.cls", name.encode(errors="surrogateescape"))
    try:
        caption = source.caption(place)
    except UnreadableImageError:
        caption = ""
    if caption:
        _write(archive, f"{stem}.txt", caption.encode())
    return True


def _write(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
