"""What an explanation leaves behind: one folder with a page, the pictures, the raw maps and the figures.

`index.html` holds everything to look at, in one file; `pictures/` the same strips as PNG files; `maps/` the maps as
NumPy arrays, under the names that `explanation.json` lists with their shapes.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder
from patchloom.report.page import Section, write_report

PAGE, FIGURES, MAPS, PICTURES = "index.html", "explanation.json", "maps", "pictures"


@dataclass(frozen=True)
class Gallery:
    """A folder with an explanation."""

    path: Path
    """The folder."""
    page: Path
    """What to open in a browser."""
    figures: dict[str, Any]
    """The contents of `explanation.json`."""

    def __str__(self) -> str:
        return f"done: gallery {self.page}"


def check_out(out: str, overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before anything is computed.

    Raises:
        UsageError: It holds something, and is not to be replaced or is no gallery.
    """
    path = check_place(out)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; a gallery is a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{path} is not empty; choose another out, or set overwrite to replace a gallery")
    if not (path / FIGURES).exists():
        raise UsageError(f"{path} is not empty and holds no gallery, so it is not replaced")


def write_gallery(
    out: str,
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, object],
    sections: Sequence[Section],
    maps: Mapping[str, Tensor],
    figures: dict[str, Any],
    command: str,
    overwrite: bool = False,
) -> Gallery:
    """Write a gallery; the folder appears whole or not at all.

    Args:
        out: The folder.
        title: Heading of the page.
        subtitle: Line below it.
        facts: Key figures.
        sections: Parts of the page; their figures also become PNG files.
        maps: Arrays by name.
        figures: Everything else, for `explanation.json`.
        command: What repeats it.
        overwrite: Replace an earlier gallery.

    Raises:
        UsageError: The folder must not be written to.
    """
    check_out(out, overwrite)
    target = Path(out)
    make_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (temporary / PICTURES).mkdir()
        (temporary / MAPS).mkdir()
        for number, section in enumerate(sections):
            for place, figure in enumerate(section.figures):
                name = re.sub(r"[^\w.-]+", "_", re.sub(r"\.\w{3,4}$", "", section.title)).strip("_")[:80]
                suffix = f"_{place + 1}" if len(section.figures) > 1 else ""
                (temporary / PICTURES / f"{number:03d}_{name}{suffix}.png").write_bytes(figure.png)
        arrays: dict[str, Any] = {name: value.detach().float().cpu().numpy() for name, value in maps.items()}
        for name, array in arrays.items():
            np.save(temporary / MAPS / f"{name}.npy", array)
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        text = json.dumps({**figures, "maps": shapes}, indent=2, default=str)
        (temporary / FIGURES).write_text(text, encoding="utf-8")
        write_report(temporary / PAGE, title=title, subtitle=subtitle, facts=facts, sections=sections, command=command)
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Gallery(target, target / PAGE, json.loads(text))
