"""Commands of `patchloom segment` besides training; what they need is loaded when they run."""

from __future__ import annotations

from typing import Any


def predict(
    run: str, images: str, out: str, *, batch_size: int = 8, device: str = "auto", include: str | None = None
) -> dict[str, Any]:
    """Write the masks a trained decoder makes of images.

    Args:
        run: Run of `patchloom segment`, or its model.
        images: Folder of images.
        out: Folder to write to; empty or absent. The mask of a/b.jpg is a/b.png, indexed: its indices are classes, its
            palette their colours.
        batch_size: Windows at a time.
        device: Where to compute: auto, cpu, cuda or cuda:1.
        include: Only images that fit one of these globs, separated by commas.

    Returns:
        `masks` (how many), the folder `out`, `classes` with the share of pixels of each, and `skipped` images.

    Raises:
        UsageError: No such model, no image, or a folder that is not empty.
    """
    from patchloom.segment.predict import write_masks

    return write_masks(run, images, out, batch_size=batch_size, device=device, include=include)
