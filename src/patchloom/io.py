r"""Files: names as text that finds the file again, and files that appear whole or not at all.

A file name on Linux is bytes, and not all bytes are UTF-8. Everything that is written, printed or stored holds such a
name as `printable` makes it: `br\xe9ken.png`, a backslash, an x and two hexadecimal digits for each byte that is no
part of UTF-8 (and for control characters, such as a line's end). `raw_name` turns it back into the name Python opens
files by. Names without such bytes stay as they are.

>>> printable("br\udce9ken.png")
'br\\xe9ken.png'
>>> raw_name(printable("br\udce9ken.png")) == "br\udce9ken.png"
True
>>> printable("größe 1.png")
'größe 1.png'
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from patchloom.errors import UsageError

# Lone surrogates stand for bytes that are not UTF-8 (PEP 383). A backslash is written out where it would be read back
# as such a byte.
_UNPRINTABLE = re.compile(r"[\udc80-\udcff\x00-\x1f\x7f]|\\(?=x[0-9a-f]{2})")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WRITTEN_OUT = re.compile(r"(?:\\x[0-9a-f]{2})+")


def printable(name: str | os.PathLike[str]) -> str:
    r"""Return a file name as text that any file, terminal or table takes; see `raw_name`.

    Args:
        name: As Python opens it: bytes that are not UTF-8 are lone surrogates.
    """
    return _UNPRINTABLE.sub(lambda match: rf"\x{os.fsencode(match[0])[0]:02x}", os.fspath(name))


def raw_name(text: str) -> str:
    r"""Return the file name of `printable` text, to open the file by: `open(raw_name(r"br\xe9ken.png"))`."""
    return _WRITTEN_OUT.sub(lambda match: os.fsdecode(bytes.fromhex(match[0].replace("\\x", ""))), text)


def encodable(text: str) -> str:
    r"""Return text in which bytes that are not UTF-8 are written out as `printable` does; nothing else changes."""
    return _SURROGATE.sub(lambda match: _lone(match[0]), text)


def existing(path: str | os.PathLike[str]) -> Path:
    """Return a path as it is, or read as `printable` text where that is what exists."""
    given = Path(path)
    if not os.path.lexists(given) and os.path.lexists(raw := raw_name(str(given))):
        return Path(raw)
    return given


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to; it takes the place of `path` when all is done, and goes if it is not.

    Folders above it are made. Readers see the old file or the whole new one, whenever the process is killed.

    Raises:
        UsageError: No file can be made there.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unmade(target, error) from error
    # The name comes last: what is written may look at its suffix.
    temporary = target.with_name(f".{os.getpid()}-{os.urandom(3).hex()}.{target.name[-40:]}")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        if error.filename is not None and str(error.filename) == str(temporary):
            raise _unmade(target, error) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; file names in it are made `printable` where need be."""
    write_bytes(path, encodable(text).encode())


def write_json(
    path: str | Path, values: Any, *, indent: int | None = 2, default: Callable[[Any], Any] | None = None
) -> None:
    """Write values as JSON, whole or not at all; `default` turns what JSON has no form for into what it has."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, default=default) + "\n"
    # In JSON a backslash is itself written with two.
    write_bytes(path, _SURROGATE.sub(lambda match: "\\" + _lone(match[0]), text).encode())


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV, whole or not at all; file names in it are made `printable` where need be."""
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([encodable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)


def make_folder(path: str | Path) -> Path:
    """Make a folder and those above it, where they are not there.

    Raises:
        UsageError: It cannot be made: a file is in its way, it may not be written, its name is too long.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unmade(folder, error) from error
    return folder


def check_place(path: str | Path) -> Path:
    """Refuse a place to write to that cannot be made, before any work is done; nothing is left behind.

    Args:
        path: A file or folder to be; the folders above it need not be there.

    Raises:
        UsageError: As `make_folder`.
    """
    place = Path(path)
    if _SURROGATE.search(str(place)):
        # Model files and tables are written by libraries that take text alone.
        raise UsageError(f"{printable(place)} cannot be made: its name is not UTF-8; {_REMEDY}")
    try:
        os.lstat(place)  # says when the name is too long, or when a file stands where a folder has to be
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unmade(place, error) from error
    for above in (place.absolute(), *place.absolute().parents):
        with suppress(OSError):
            if above.exists():
                if not above.is_dir() and above != place.absolute():
                    raise UsageError(f"{printable(place)} cannot be made: {printable(above)} is a file; {_REMEDY}")
                if above.is_dir() and not os.access(above, os.W_OK | os.X_OK):
                    raise UsageError(
                        f"{printable(place)} cannot be made: {printable(above)} may not be written; {_REMEDY}"
                    )
                break
    return place


_REMEDY = "choose another out"


def _unmade(path: Path, error: OSError) -> UsageError:
    reason = (error.strerror or str(error)).lower()
    if isinstance(error, NotADirectoryError | FileExistsError):
        file = next((part for part in (path, *path.parents) if part.is_file()), path)
        reason = f"{printable(file)} is a file"
    return UsageError(f"{_shortened(printable(path))} cannot be made: {reason}; {_REMEDY}")


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:120]}…{text[-40:]}"


def _lone(surrogate: str) -> str:
    byte = ord(surrogate) - 0xDC00
    return rf"\x{byte:02x}" if 0x80 <= byte <= 0xFF else rf"\u{ord(surrogate):04x}"


def read_config(path: Path) -> dict[str, Any]:
    """Return the names and values in a run's `config.yaml`.

    Raises:
        UsageError: The file is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings (a YAML mapping was expected)")
    return values
