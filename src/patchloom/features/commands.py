"""`patchloom cache`: what is kept on disk."""

from __future__ import annotations

from typing import Any


def show_cache(cache: str = "auto", clear: bool = False) -> dict[str, Any]:
    """List the features kept on disk, or delete them.

    Args:
        cache: Folder of the cache; auto is its usual place (PATCHLOOM_CACHE, or ~/.cache/patchloom/features).
        clear: Delete all entries.
    """
    from patchloom.features import cache as kept

    root = kept.cache_folder(cache)
    entries = kept.list_entries(cache)
    total = round(sum(entry["megabytes"] for entry in entries), 1)
    figures: dict[str, Any] = {"folder": str(root), "megabytes": total, "limit_gigabytes": kept.limit_in_bytes() / 1e9}
    if clear:
        return {**figures, "deleted": kept.clear(cache)}
    return {**figures, "entries": entries}
