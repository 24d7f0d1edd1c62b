"""Images that are not independent: several of one patient, slide or scene, as a CSV file says."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np

from patchloom.errors import UsageError
from patchloom.io import existing, printable, raw_name


def read_groups(path: str, keys: Sequence[str]) -> np.ndarray:
    """Return the group (patient, slide, scene) of each image named, (n,) int64.

    Args:
        path: CSV file with the columns `key` (name of an image) and `group`.
        keys: Names of the images.

    Raises:
        UsageError: No such file, no such columns, or images it does not name.
    """
    file = existing(path)
    if not file.is_file():
        raise UsageError(f"there is no group file {path}; give a CSV file with the columns key and group")
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        rows = csv.DictReader(handle)
        if not {"key", "group"} <= set(rows.fieldnames or ()):
            raise UsageError(f"{path} has the columns {rows.fieldnames}; it needs key (name of the image) and group")
        # Images are known by their printable names; a table may hold those or the names themselves.
        group_of_key = {printable(raw_name(row["key"] or "")): (row["group"] or "").strip() for row in rows}
    missing = [key for key in keys if not group_of_key.get(key)]
    if missing:
        raise UsageError(f"{path} names no group for {len(missing)} of {len(keys)} images, such as {missing[0]}")
    return np.unique([group_of_key[key] for key in keys], return_inverse=True)[1]
