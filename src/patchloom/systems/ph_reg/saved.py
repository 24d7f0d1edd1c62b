"""Dense CLIP towers on disk: the bundle of the ViT, and beside it the projection to the space of texts.

`dense_clip.safetensors` holds the projection, `dense_clip.json` how the last block is read. timm and other verbs open
the ViT as it is, with its last block whole; `patchloom.load` gives the `DenseCLIP`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from patchloom.errors import UsageError
from patchloom.io import write_json, written_whole
from patchloom.models.bundle import bundle_fingerprint, find_bundle
from patchloom.models.bundle import load as load_bundle
from patchloom.systems.ph_reg.clip import DenseCLIP

WEIGHTS, ABOUT = "dense_clip.safetensors", "dense_clip.json"
FORMAT = 1


def save_dense(model: DenseCLIP, path: Path) -> None:
    """Write what a tower has besides its ViT into the folder of the ViT's bundle."""
    with written_whole(path / WEIGHTS) as temporary:
        save_file({"projection": model.projection.detach().cpu().contiguous()}, temporary)
    about = {"readout": model.readout, "neighbour_std": model.neighbour_std}
    write_json(path / ABOUT, {"format": FORMAT, "encoder": bundle_fingerprint(path), **about})


def is_dense(path: str | Path) -> bool:
    """Return whether a bundle or run holds a dense CLIP tower."""
    return any((folder / ABOUT).exists() for folder in (Path(path), Path(path) / "model"))


def load_dense(path: str | Path) -> DenseCLIP:
    """Return the tower of a bundle or run, in eval mode.

    Raises:
        UsageError: There is none, or its files are damaged or of another ViT.
    """
    folder = find_bundle(path)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise UsageError(
                f"{folder / ABOUT} is of format {about['format']}, and this version reads {FORMAT}; update patchloom"
            )
        projection = load_file(folder / WEIGHTS)["projection"]
        readout, std, encoder = about["readout"], float(about["neighbour_std"]), about["encoder"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"{folder / ABOUT} or {WEIGHTS} is damaged ({said}); write the run again") from error
    if encoder != bundle_fingerprint(folder):
        raise UsageError(f"{folder / ABOUT} belongs to another ViT than the one beside it; copy the whole folder again")
    return DenseCLIP(load_bundle(folder), projection, readout, std).eval()
