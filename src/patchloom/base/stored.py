"""Tensors on disk, read as plain data; a damaged file is named, with what to do, and no pickle is ever carried out."""

from __future__ import annotations

import re
import warnings
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from patchloom.errors import UsageError

OBJECT = re.compile(r"GLOBAL\s+([\w.]+)")


class DamagedFileError(UsageError):
    """A file is cut off, overwritten, or holds something else than its name says."""


def read_tensors(path: str | Path, remedy: str = "copy or write it again") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        DamagedFileError: It cannot be read; ends with the remedy.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged ({_first_line(error)}); {remedy}") from error


def read_pickle(
    path: str | Path, remedy: str = "copy or write it again", *, plain: list[Any] | None = None, mmap: bool = False
) -> Any:
    """Return what `torch.save` wrote: tensors and plain values only.

    Args:
        path: The file.
        remedy: Ends the message about a damaged file.
        plain: Classes that may pass besides, since they are data.
        mmap: Leave tensors on disk until they are used.

    Raises:
        DamagedFileError: It is cut off or no such file at all.
        UsageError: It holds objects, which could run code when they are made.
    """
    allowed: AbstractContextManager[Any] = torch.serialization.safe_globals(plain) if plain else nullcontext()
    try:
        with allowed, warnings.catch_warnings():
            # torch asks whoever reads this to file an issue with it.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        # torch's own advice is to read it all the same; a file from elsewhere can do anything then.
        if match := OBJECT.search(str(error)):
            raise UsageError(
                f"{path} cannot be read as plain tensors: it holds the object {match[1]}, and objects could run code; "
                f"where you trust it, save its state dict alone with torch.save"
            ) from error
        raise DamagedFileError(f"{path} cannot be read as plain tensors: it is damaged or no file of torch") from error
    except Exception as error:  # what a damaged pickle makes of the reader may be anything
        raise DamagedFileError(f"{path} is damaged ({_first_line(error)}); {remedy}") from error


def damage(path: str | Path) -> str | None:
    """Return what is wrong with a file that `torch.save` wrote, None where it is whole: its checksums are compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        return _first_line(error)
    return None if wrong is None else f"the checksum of {wrong} is another"


def _first_line(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0]
    return words[:100] or type(error).__name__
