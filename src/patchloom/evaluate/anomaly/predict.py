"""Scores, maps and overlays of images by a trained detector, at the images' own size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from patchloom.base.progress import track
from patchloom.data import open_source
from patchloom.data.base import Source, UnreadableImageError
from patchloom.data.defects import EMBEDDED, open_without_masks
from patchloom.data.pixels import resize, unit
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.io import check_place, existing, make_folder, write_bytes, write_rows
from patchloom.systems.ear.report import overlaid
from patchloom.systems.ear.saved import load_ear

HEADER = ["file", "score", "normalized", "defect", "peak", "peak_row", "peak_column"]
SCORES = "scores.csv"


def write_predictions(
    run: str,
    images: str,
    out: str,
    *,
    encoder: str | None = None,
    threshold: float | None = None,
    device: str = "auto",
    include: str | None = None,
    exclude: str | None = None,
) -> dict[str, Any]:
    """Write what a detector says of images; see `commands.predict` for what goes in, comes out and is raised."""
    from patchloom.models.bundle import open_encoder

    folder = check_place(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; choose another out")
    place = torch_device(device)
    saved = load_ear(run, None if encoder is None else open_encoder(encoder))
    model = saved.model.to(place)
    if threshold is not None:
        model.threshold.fill_(threshold)
    channels = saved.about["unet"]["in_channels"]
    options: dict[str, Any] = {
        name: value for name, value in (("include", include), ("exclude", exclude)) if value is not None
    }
    options |= {"in_chans": channels, "model": saved.reading}
    place_of_images = existing(images)
    source: Any
    if place_of_images.is_dir() and images not in EMBEDDED:
        source = open_without_masks(place_of_images, options)
    else:
        source = open_source(images, labels="none", by_index=True, **options)
    if not isinstance(source, Source):
        raise UsageError(f"{images} is a stream; give a folder of images, or shards that are not compressed")
    make_folder(folder)
    limit, pixel_limit = float(model.threshold), float(model.pixel_threshold)
    rows: list[list[Any]] = []
    skipped, names = [], set[str]()
    for index in track(range(len(source)), "looking for defects"):
        try:
            sample = source.read(index)
        except UnreadableImageError as error:
            skipped.append({"file": error.key, "reason": error.reason})
            continue
        view = unit(resize(sample.value, saved.image_size, "bilinear"))[None].to(place)
        with torch.no_grad():
            found = model(view)
        size = (int(sample.value.shape[-2]), int(sample.value.shape[-1]))
        whole = F.interpolate(found["anomaly_map"].float(), size=size, mode="bilinear", align_corners=False)[0, 0].cpu()
        score = float(found["pred_score"])
        row, column = divmod(int(whole.argmax()), size[1])
        part = float(model.normalized(found["pred_score"]))
        told = [f"{score:.9g}", f"{part:.6g}", int(score >= limit), f"{float(whole.max()):.9g}", row, column]
        rows.append([sample.key, *told])
        name = str(Path(sample.key).with_suffix(""))
        if name in names:  # a.jpg and a.png
            name = sample.key
        names.add(name)
        _write(folder, name, unit(sample.value), whole, pixel_limit)
    if not rows:
        raise UsageError(f"{images} holds no readable image")
    write_rows(folder / SCORES, HEADER, rows)
    called = sum(row[3] for row in rows)
    return {"images": len(rows), "defects": called, "threshold": limit, "out": str(folder), "skipped": skipped}


def _write(folder: Path, name: str, picture: torch.Tensor, found: torch.Tensor, pixel_limit: float) -> None:
    """Write the map of an image, its overlay, in full colour from twice the threshold of pixels on, and its mask."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, found.numpy().astype(np.float32), compression="zlib")
    write_bytes(folder / "maps" / f"{name}.tiff", buffer.getvalue())
    top = 2 * pixel_limit if pixel_limit > 0 else float(found.max())
    _png(folder / "overlays" / f"{name}.png", overlaid(picture, found / max(top, 1e-12))[..., :3])
    _png(folder / "masks" / f"{name}.png", (found.numpy() >= pixel_limit).astype(np.uint8) * 255)


def _png(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
