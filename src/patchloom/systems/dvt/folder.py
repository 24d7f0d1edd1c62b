"""The folder that the first stage of DVT leaves: features by image, an index of what they are, pictures, a page.

`features/raw/a/b.npy` and `features/denoised/a/b.npy` hold (H, W, C) of the image a/b.jpg; `index.json` says of which
encoder, block and size they are. A file appears whole or not at all, and an image is in the index once all its files
are there, so that a run that was killed goes on with the first image that is not.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.version import __version__
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder, raw_name, write_json, written_whole
from patchloom.models.adapters import encoder_hash
from patchloom.models.bundle import made_from
from patchloom.systems.dvt.config import DecomposeConfig
from patchloom.systems.dvt.decompose import DenoisedImage

INDEX, FEATURES, PICTURES = "index.json", "features", "pictures"
FORMAT = 1
# What may differ between a run and its continuation.
FREE = {"out", "overwrite", "images", "images_at_once", "batch_size", "views_device", "pictures", "device"}
# Of an encoder in memory there is no name to compare; its hash is.
NAMED = {"encoder", "data"}


def kept_parts(keep: str) -> tuple[str, ...]:
    """Return the parts that are written, the denoised last: where it is, the others are."""
    return {
        "denoised": ("denoised",),
        "both": ("raw", "denoised"),
        "all": ("raw", "artifact", "residual", "denoised"),
    }[keep]


class FeatureFolder:
    """Features by image on disk.

    Args:
        path: The folder.

    Attributes:
        index: Contents of `index.json`.

    Raises:
        UsageError: There is no index, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / INDEX
        if not file.exists():
            raise UsageError(
                f"{path} holds no features of DVT (there is no {INDEX}); patchloom clean dvt decompose makes them"
            )
        try:
            self.index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known, _ = self.index["format"], self.index["images"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} is damaged ({error}); put it back from a copy, or decompose anew") from error
        if known != FORMAT:
            raise UsageError(f"{file} is of format {known}, and this version reads {FORMAT}; update patchloom")

    @classmethod
    def create(cls, path: str | Path, about: dict[str, Any]) -> FeatureFolder:
        """Make the folder, without an image in it."""
        make_folder(path)
        write_json(Path(path) / INDEX, {"format": FORMAT, **about, "images": {}})
        return cls(path)

    @property
    def images(self) -> dict[str, dict[str, Any]]:
        """What is known of each image, by its name."""
        found: dict[str, dict[str, Any]] = self.index["images"]
        return found

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (down, across)."""
        height, width = self.index["grid"]
        return int(height), int(width)

    @property
    def width(self) -> int:
        """Width of the features."""
        return int(self.index["width"])

    def place(self, part: str, file: str) -> Path:
        """Return where a part of an image is, by the file name in its entry."""
        return self.path / FEATURES / part / raw_name(file)

    def has(self, key: str) -> bool:
        """Return whether an image is there, with all its files."""
        entry = self.images.get(key)
        return entry is not None and all(self.place(part, entry["file"]).exists() for part in entry["parts"])

    def add(self, key: str, found: DenoisedImage, parts: Sequence[str], dtype: str) -> None:
        """Write the parts of an image; `save` makes it known."""
        file = self._name(key)
        for part in parts:
            values = getattr(found, part).numpy().astype(dtype)
            if not np.isfinite(values).all():
                raise UsageError(
                    f"the {part} features of '{key}' do not fit into {dtype} or are not finite; take dtype=float32, "
                    f"or a lower lr"
                )
            with written_whole(self.place(part, file)) as temporary, temporary.open("wb") as stream:
                np.save(stream, values)
        self.images[key] = {
            "file": file,
            "parts": list(parts),
            "artifact_share": round(found.artifact_share, 6),
            "loss": round(found.losses["loss"], 6),
        }

    def save(self) -> None:
        """Write the index."""
        write_json(self.path / INDEX, self.index)

    def read(self, key: str, part: str) -> Tensor:
        """Return a part of an image (H, W, C) float32.

        Raises:
            OSError: It is gone.
            ValueError: It is damaged, or of another shape.
        """
        values = np.load(self.place(part, self.images[key]["file"]), allow_pickle=False)
        if values.shape != (*self.grid, self.width):
            raise ValueError(f"it is {values.shape}, and the index says {(*self.grid, self.width)}")
        return torch.from_numpy(values.astype(np.float32))

    def _name(self, key: str) -> str:
        """Return a name of its own for an image's files: its own with another suffix, all of it where that is taken."""
        taken = {entry["file"] for name, entry in self.images.items() if name != key}
        parts = [part for part in Path(key).parts if part not in ("..", "/")]
        short = str(Path(*parts).with_suffix(".npy"))
        return short if short not in taken else f"{Path(*parts)}.npy"


def described(encoder: Encoder, config: DecomposeConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Return what the index says of the features besides the images."""
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(dataclasses.replace(config, encoder=_name_of(config))).items()
        if name not in FREE
    }
    path = Path(_name_of(config))
    return {
        "patchloom": __version__,
        "encoder": str(path.resolve()) if path.exists() else str(path),
        "encoder_hash": encoder_hash(encoder),
        "made_from": made_from(encoder),
        "layer": found["layer"],
        "image_size": list(found["image_size"]),
        "grid": list(found["grid"]),
        "width": found["width"],
        "mean": [float(value) for value in encoder.pretrained_cfg["mean"]],
        "std": [float(value) for value in encoder.pretrained_cfg["std"]],
        "settings": settings | {name: found[name] for name in ("max_resolution", "hidden_dim")},
    }


def open_folder(encoder: Encoder, config: DecomposeConfig, found: dict[str, Any]) -> FeatureFolder:
    """Return the folder of a run, new or with what an earlier start of it has left.

    Raises:
        UsageError: It holds something else, or features made under other settings.
    """
    path = check_place(config.out)
    about = json.loads(json.dumps(described(encoder, config, found)))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / INDEX).exists():
            raise UsageError(f"{path} is not empty and holds no features of DVT; choose another out")
        if not config.overwrite:
            folder = FeatureFolder(path)
            _refuse_changes(folder, about)
            return folder
        for name in (FEATURES, PICTURES):
            shutil.rmtree(path / name, ignore_errors=True)
    return FeatureFolder.create(path, about)


def _refuse_changes(folder: FeatureFolder, about: dict[str, Any]) -> None:
    before = folder.index
    for name in ("encoder_hash", "layer", "image_size", "grid", "width", "mean", "std"):
        if before[name] != about[name]:
            raise UsageError(
                f"the features in {folder.path} are of {name.replace('_', ' ')} {before[name]}, and {about[name]} is "
                f"asked for; choose another out, or overwrite"
            )
    for name, value in about["settings"].items():
        was = before["settings"].get(name, value)
        if name not in NAMED and was != value:
            raise UsageError(
                f"the features in {folder.path} were made with {name}={was}, not {value}; choose another out, or "
                f"overwrite"
            )


def _name_of(config: DecomposeConfig) -> str:
    return str(config.encoder) if isinstance(config.encoder, str | Path) else type(config.encoder).__name__


def missing_images(folder: FeatureFolder, part: str) -> Iterator[tuple[str, str]]:
    """Yield the names of images whose part is gone or was never written, and why."""
    for key, entry in folder.images.items():
        if part not in entry["parts"]:
            yield key, f"its {part} features were not kept"
        elif not folder.place(part, entry["file"]).exists():
            yield key, f"its {part} features are gone"
