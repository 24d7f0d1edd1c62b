"""The images of a pile without copies, as a table; nothing is deleted."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchloom.curation.compare import compared
from patchloom.curation.config import DedupConfig
from patchloom.curation.listing import Files, as_files, checked_table, write_listing
from patchloom.curation.pairs import groups_of, kept_of, leaks
from patchloom.features.extract import torch_device
from patchloom.io import raw_name


def run_dedup(config: DedupConfig) -> dict[str, Any]:
    """List the images without copies: of each group the one with the most pixels is kept, of equal ones the largest.

    Returns:
        `images` read, `kept`, `copies` left out, those `leaked` (copies of `against`), those that do not open
        (`broken`), the `threshold` and how it was found, and the two files.

    Raises:
        UsageError: No such data, no image opens, the images are no files, or a file exists.
    """
    path = checked_table(config.out, config.overwrite)
    beside = checked_table(str(path.with_name(f"{path.stem}-left-out.csv")), config.overwrite)
    images = compared(config)
    source, look = as_files(images.source, "data dedup"), images.look
    device = torch_device(config.device)
    # Of equally many pixels the larger file is the less compressed.
    best = look.facts[:, 0] * look.facts[:, 1] + 1e-12 * np.array([_size(source, place) for place in look.places])
    why: dict[int, str] = {}
    instead: dict[int, str] = {}
    if config.against is not None:
        others = images.of(config.against, config)
        for number, other, _ in leaks(images.vectors, others.vectors, images.threshold, device):
            why[number], instead[number] = "copy of an image of against", others.look.keys[other]
    leaked = len(why)
    for group in groups_of(images.vectors, images.threshold, device):
        left = np.array([number for number in group if number not in why], dtype=np.int64)
        for number, kept in kept_of(images.vectors, left, best, images.threshold).items():
            why[number], instead[number] = "copy", look.keys[kept]
    places = look.places.tolist()
    kept_places = [place for number, place in enumerate(places) if number not in why]
    write_listing(path, source, kept_places)
    columns = {
        "why": {places[number]: text for number, text in why.items()},
        "copy_of": {places[number]: text for number, text in instead.items()},
    }
    write_listing(beside, source, sorted(columns["why"]), columns)
    return {
        "images": len(look),
        "kept": len(kept_places),
        "copies": len(why) - leaked,
        "leaked": leaked,
        "broken": len(look.skipped),
        **images.facts,
        "out": str(path),
        "left_out": str(beside),
    }


def _size(source: Files, place: int) -> int:
    """Return the bytes of an image file; 0 where it has gone since."""
    try:
        return (source.root / raw_name(source.key(int(place)))).stat().st_size
    except OSError:
        return 0
