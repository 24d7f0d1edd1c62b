"""Features of tiles on disk: one folder per slide, written whole or not at all, read by memory mapping.

`SLIDE/features.npy` holds a row per tile: level, column and row of its DeepZoom address, then the features, the layout
of the published benchmark (owkin/HistoSSLscaling). `store.json` says what made them.

>>> store = TileStore("features/")  # doctest: +SKIP
>>> store.bag("patient-1").features.shape  # doctest: +SKIP
(812, 384)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.errors import UsageError
from patchloom.io import make_folder, write_json

STORE, FEATURES, SLIDE = "store.json", "features.npy", "slide.json"
METADATA_COLUMNS = 3
WRITTEN = 1
"""Version of the layout."""


@dataclass(frozen=True)
class TileBag:
    """The tiles of one slide."""

    slide: str
    """Name of the slide."""
    features: np.ndarray = field(repr=False)
    """(n, D) float32 or float16, possibly on disk."""
    places: np.ndarray = field(repr=False)
    """(n, 2): column and row."""
    level: int
    """DeepZoom level."""

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.features)


class TileStore:
    """A folder of tile features.

    Args:
        path: The folder.
        about: What makes the features, for a store that is to be written: an existing one has to say the same.

    Raises:
        UsageError: There is no store, or the one there was made differently.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        file = self.path / STORE
        if about is None:
            self.about = self._read(file)
            return
        self.about = json.loads(json.dumps({"layout": WRITTEN, **about}))
        if file.exists():
            self._refuse_changes(self._read(file))
        elif self.path.exists() and any(self.path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no tile features; choose another folder")
        else:
            make_folder(self.path)
            write_json(file, self.about)

    def _read(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            if self.names():  # features in the published layout, made elsewhere
                return {}
            raise UsageError(f"{self.path} holds no tile features; make them with patchloom slides embed")
        try:
            about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file} is damaged ({error}); make the features again in another folder") from error
        return about

    def _refuse_changes(self, stored: dict[str, Any]) -> None:
        for name in {**stored, **self.about}:
            # The same weights may go by another name.
            if name != "encoder" and stored.get(name) != self.about.get(name):
                raise UsageError(
                    f"{self.path} was made with {name} {stored.get(name)}, not {self.about.get(name)}; one folder "
                    "holds features of one kind, choose another out"
                )

    def names(self) -> list[str]:
        """Return the names of the slides whose features are there, sorted."""
        return sorted(file.parent.name for file in self.path.glob(f"[!.]*/{FEATURES}"))

    def __contains__(self, name: str) -> bool:
        """Return whether the features of a slide are there."""
        return (self.path / name / FEATURES).is_file()

    def slide(self, name: str) -> dict[str, Any]:
        """Return what is known of a slide beside its features; empty where nothing was written."""
        file = self.path / name / SLIDE
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return about

    def write(
        self, name: str, level: int, places: np.ndarray, features: np.ndarray, about: Mapping[str, Any], **files: bytes
    ) -> None:
        """Write the features of a slide; its folder appears whole or not at all.

        Args:
            name: Name of the slide.
            level: DeepZoom level of the tiles.
            places: (n, 2) column and row.
            features: (n, D) float32, or float16 to halve the folder.
            about: What else to keep of the slide.
            **files: Contents of further PNG files by name.

        Raises:
            UsageError: Half precision cannot hold the places of so large a slide.
        """
        if features.dtype == np.float16 and places.max(initial=0) > 2048:
            raise UsageError(f"{name} has more than 2048 tiles across, too many for half precision; use dtype float32")
        metadata = np.concatenate([np.full((len(places), 1), level), places], 1).astype(features.dtype)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self.path))
        try:
            np.save(temporary / FEATURES, np.concatenate([metadata, features], 1))
            write_json(temporary / SLIDE, about)
            for file, content in files.items():
                (temporary / f"{file}.png").write_bytes(content)
            temporary.chmod(0o755)
            temporary.replace(self.path / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if name not in self:  # another process may have been faster
                raise

    def bag(self, name: str) -> TileBag:
        """Return the tiles of a slide, memory-mapped.

        Raises:
            UsageError: There are none, or the file is damaged.
        """
        file = self.path / name / FEATURES
        if not file.is_file():
            raise UsageError(f"{self.path} has no features of slide {name!r}")
        try:
            table = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise UsageError(f"{file} is damaged ({error}); delete {file.parent} and make it again") from error
        if table.ndim == 2 and table.shape[1] == METADATA_COLUMNS:
            raise UsageError(
                f"{self.path} holds the places of tiles, but no features; make them: patchloom slides embed"
            )
        if table.ndim != 2 or table.shape[1] < METADATA_COLUMNS:
            raise UsageError(
                f"{file} is a table of {table.shape}; rows of level, column, row and features are expected"
            )
        places = np.asarray(table[:, 1:METADATA_COLUMNS]).astype(np.int64)
        level = int(table[0, 0]) if len(table) else 0
        return TileBag(name, table[:, METADATA_COLUMNS:], places, level)
