"""Codebooks on disk: safetensors with what they mean beside them, or the bare tables of the reference (npy, faiss)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import written_whole

CODEBOOK_NAME = "codebook.safetensors"
SUFFIXES = (".safetensors", ".npy", ".faiss")
_FORMAT = "patchloom.centroids"


def write_codebook(
    path: Path,
    centroids: Tensor,
    *,
    patch_size: int,
    in_chans: int,
    counts: Tensor | None,
    facts: dict[str, Any],
    overwrite: bool,
) -> None:
    """Write centroids, whole or not at all.

    Args:
        path: Ends in `.safetensors`, `.npy` or `.faiss`; the latter two hold the table alone.
        centroids: (K, in_chans * patch_size**2).
        patch_size: Side of a patch in pixels.
        in_chans: Channels.
        counts: (K,) int64 points per centroid when it was fitted (safetensors only).
        facts: What else to say of the codebook, as JSON (safetensors only).
        overwrite: Replace an existing file.

    Raises:
        UsageError: Another ending, or the file exists.
        MissingExtraError: `.faiss` without faiss.
    """
    _check_suffix(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; give another name or overwrite=True")
    table = centroids.detach().cpu().float().contiguous()
    with written_whole(path) as partial:
        if path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, table.numpy())
        elif path.suffix == ".faiss":
            faiss = _faiss()
            index = faiss.IndexFlatL2(table.shape[1])
            index.add(table.numpy())
            faiss.write_index(index, str(partial))
        else:
            metadata = {
                "format": _FORMAT,
                "patch_size": str(patch_size),
                "in_chans": str(in_chans),
                "order": "chw",
                "value_range": "[0, 1]",
                "facts": json.dumps(facts),
            }
            tensors = {"centroids": table} | ({} if counts is None else {"counts": counts.cpu().contiguous()})
            partial.write_bytes(save(tensors, metadata))  # save_file would deny it to other users


def read_codebook(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read centroids and, from safetensors, `patch_size`, `in_chans`, `facts` and, where known, `counts`.

    Args:
        path: A file as `write_codebook` makes them, or a folder with a `codebook.safetensors`.

    Returns:
        (K, d) float32, and the metadata; empty for `.npy` and `.faiss`.

    Raises:
        UsageError: No such file, another ending, or no codebook in it.
        MissingExtraError: `.faiss` without faiss.
    """
    if path.is_dir():
        path = path / CODEBOOK_NAME
    if not path.is_file():
        raise UsageError(f"no codebook at {path}; make one with: patchloom tokenize fit")
    _check_suffix(path)
    if path.suffix == ".faiss":
        faiss = _faiss()
        index = faiss.read_index(str(path))
        if not isinstance(index, faiss.IndexFlat):
            raise UsageError(f"{path} is a faiss {type(index).__name__}; a codebook is a flat index")
        return torch.from_numpy(index.reconstruct_n(0, index.ntotal).copy()), {}
    try:
        if path.suffix == ".npy":
            return _as_table(torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32)), path), {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or "centroids" not in file.keys():  # noqa: SIM118
                raise UsageError(f"{path} is a safetensors file, but no codebook of patchloom")
            if metadata.get("order") != "chw":
                raise UsageError(f"{path} holds patches in order {metadata.get('order')!r}; only 'chw' is supported")
            table = _as_table(file.get_tensor("centroids").float(), path)
            counts = file.get_tensor("counts") if "counts" in file.keys() else None  # noqa: SIM118
        known: dict[str, Any] = {name: int(metadata[name]) for name in ("patch_size", "in_chans")}
        return table, known | {"counts": counts, "facts": json.loads(metadata.get("facts", "{}"))}
    except (SafetensorError, KeyError, ValueError, EOFError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path} is damaged or no codebook ({error}); fit it again (in a run folder: delete it and resume)"
        ) from error


def _as_table(table: Tensor, path: Path) -> Tensor:
    if table.ndim != 2:
        raise UsageError(f"{path} holds a tensor of shape {tuple(table.shape)}; a codebook is a matrix (K, d)")
    return table


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"a codebook's file name ends in {', '.join(SUFFIXES)}, not {path.name!r}")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "faiss", "a .faiss codebook") from error
    return faiss
