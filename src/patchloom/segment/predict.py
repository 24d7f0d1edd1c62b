"""Masks of images by a trained decoder, as indexed PNGs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchloom.base.progress import track
from patchloom.data import open_source
from patchloom.data.base import StreamSource, UnreadableImageError
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import unit
from patchloom.encoders import in_chans
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.io import check_place, make_folder, write_bytes
from patchloom.segment.saved import load_segmenter


def write_masks(
    run: str, images: str, out: str, *, batch_size: int = 8, device: str = "auto", include: str | None = None
) -> dict[str, Any]:
    """Write masks of images; see `commands.predict` for what goes in, comes out and is raised."""

    folder = check_place(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; choose another out")
    place = torch_device(device)
    model = load_segmenter(run).to(place)
    encoder = model.backbone.encoder
    options: dict[str, Any] = {} if include is None else {"include": include}
    opened = open_source(images, in_chans=in_chans(encoder), model=encoder, **options)
    require_kind(opened, ("image",), "segment predict")
    source = opened.by_index() if isinstance(opened, StreamSource) else opened
    make_folder(folder)
    counts = np.zeros(256, np.int64)
    skipped, written = [], set[str]()
    for index in track(range(len(source)), "segmenting"):
        try:
            sample = source.read(index)
        except UnreadableImageError as error:
            skipped.append({"file": error.key, "reason": error.reason})
            continue
        with torch.no_grad():
            mask = model.segment(unit(sample.image).to(place), batch_size=batch_size).cpu().numpy()
        counts += np.bincount(mask.ravel(), minlength=256)
        name = str(Path(sample.key).with_suffix(".png"))
        if name in written:  # a.jpg and a.png
            name = f"{sample.key}.png"
        written.add(name)
        write_bytes(folder / name, _indexed(mask, model.palette))
    if not written:
        raise UsageError(f"{images} holds no readable image")
    shares = {name: float(counts[number] / counts.sum()) for number, name in enumerate(model.class_names)}
    return {"masks": len(written), "out": str(folder), "classes": shares, "skipped": skipped}


def _indexed(mask: np.ndarray, palette: list[tuple[int, int, int]]) -> bytes:
    image = Image.frombytes("P", mask.shape[::-1], np.ascontiguousarray(mask).tobytes())
    # All 256 entries, so that no writer packs the indices anew.
    image.putpalette([*(value for colour in palette for value in colour), *([0] * 768)][:768])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()
