"""Masks of images by a trained segmentation model, as PNGs; of volumes, as NIfTI in their own space."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchloom.base.progress import track
from patchloom.data import open_source
from patchloom.data.base import StreamSource, UnreadableImageError
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import unit
from patchloom.data.sample import Sample
from patchloom.data.segmentation import colours
from patchloom.data.volumes import Volume, save_mask
from patchloom.encoders import in_chans, kind_of
from patchloom.errors import MissingExtraError, UsageError
from patchloom.features.extract import torch_device
from patchloom.io import check_place, make_folder, write_bytes, write_json, write_text
from patchloom.segment.objects import has_pycocotools
from patchloom.segment.saved import open_segmenter

OVERLAYS = "overlays"


def write_masks(
    run: str,
    images: str,
    out: str,
    *,
    task: str = "semantic",
    overlays: bool = False,
    proposals: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    include: str | None = None,
) -> dict[str, Any]:
    """Write masks of images; see `commands.predict` for what goes in, comes out and is raised."""
    folder = check_place(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; choose another out")
    place = torch_device(device)
    model = open_segmenter(run, proposals=proposals).to(place)
    writer = _writer(task, model, run)
    options: dict[str, Any] = {} if include is None else {"include": include}
    opened = open_source(images, in_chans=in_chans(model.encoder), model=model.encoder, **options)
    require_kind(opened, (writer.kind,), "this model")
    if overlays and writer.kind != "image":
        raise UsageError(f"overlays are pictures of images, and this model takes {writer.kind}s; leave them out")
    source = opened.by_index() if isinstance(opened, StreamSource) else opened
    make_folder(folder)
    skipped, written = [], set[str]()
    for index in track(range(len(source)), "segmenting"):
        try:
            sample = source.read(index)
        except UnreadableImageError as error:
            skipped.append({"file": error.key, "reason": error.reason})
            continue
        name = str(Path(sample.key.removesuffix(".gz")).with_suffix(writer.suffix))
        if name in written:  # a.jpg and a.png
            name = f"{sample.key}{writer.suffix}"
        written.add(name)
        with torch.no_grad():
            writer.write(sample, folder, name, batch_size, overlays)
    if not written:
        raise UsageError(f"{images} holds no readable {writer.kind}")
    return {"masks": len(written), "out": str(folder), **writer.finish(folder), "skipped": skipped}


class _Pictures(ABC):
    """What is written of images: a PNG of each."""

    kind, suffix = "image", ".png"
    model: Any

    def write(self, sample: Sample, folder: Path, name: str, batch_size: int, overlays: bool) -> None:
        """Write what the model makes of an image, and with `overlays` a picture of it on the image."""
        image = unit(sample.image)
        place = next(self.model.parameters()).device
        content, drawn = self.written(image.to(place), name, sample.key, batch_size)
        write_bytes(folder / name, content)
        if overlays:
            write_bytes(folder / OVERLAYS / name, overlay(image, drawn))

    @abstractmethod
    def written(self, image: Tensor, name: str, key: str, batch_size: int) -> tuple[bytes, np.ndarray]:
        """Return the PNG of an image, and the colour of each pixel."""

    @abstractmethod
    def finish(self, folder: Path) -> dict[str, Any]:
        """Return what there is to say of all."""


class _Volumes:
    """NIfTI files of classes, in the space of their volumes."""

    kind, suffix = "volume", ".nii.gz"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.counts = np.zeros(256, np.int64)

    def write(self, sample: Sample, folder: Path, name: str, batch_size: int, overlays: bool) -> None:
        """Write the class of every voxel of a volume."""
        mask = self.model.mask_of(sample)
        self.counts += np.bincount(mask.flatten().numpy(), minlength=256)
        make_folder((folder / name).parent)
        save_mask(mask, Volume.of(sample), "axial", folder / name)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Return what there is to say of all."""
        return _shares(self.model, self.counts)


class _Semantic(_Pictures):
    """Indexed PNGs of classes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.counts = np.zeros(256, np.int64)

    def written(self, image: Tensor, name: str, key: str, batch_size: int) -> tuple[bytes, np.ndarray]:
        """Return the PNG of an image, and the colour of each pixel (H, W, 3) uint8, black where there is none."""
        mask = self.model.segment(image, batch_size=batch_size).cpu().numpy()
        self.counts += np.bincount(mask.ravel(), minlength=256)
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.model.palette)] = np.asarray(self.model.palette, np.uint8).reshape(-1, 3)
        return _indexed(mask, self.model.palette), table[mask]

    def finish(self, folder: Path) -> dict[str, Any]:
        """Return what there is to say of all."""
        return _shares(self.model, self.counts)


class _Panoptic(_Pictures):
    """PNGs of segments' ids, and COCO's list of them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.annotations: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.count = 0

    def written(self, image: Tensor, name: str, key: str, batch_size: int) -> tuple[bytes, np.ndarray]:
        """Return the PNG of an image, and the colour of each pixel."""
        found = self.model.predict(image, "panoptic")
        ids = found.ids.cpu().numpy()
        segments = [
            {**segment, **_extent(ids == segment["id"]), "iscrowd": 0, "isthing": int(segment["isthing"])}
            for segment in found.segments
        ]
        number = self._image(ids.shape, key)
        self.annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
        self.count += len(segments)
        return _as_colours(ids), _id_colours(ids)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write the list, and return what there is to say of all."""
        about = {"images": self.images, "annotations": self.annotations, "categories": self._categories()}
        write_json(folder / "panoptic.json", about)
        return {"segments": self.count}

    def _categories(self) -> list[dict[str, Any]]:
        things = set(self.model.things)
        names = enumerate(self.model.class_names)
        return [{"id": number, "name": name, "isthing": int(name in things)} for number, name in names]

    def _image(self, shape: tuple[int, ...], key: str) -> int:
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": key, "height": shape[0], "width": shape[1]})
        return number


class _Instances(_Panoptic):
    """PNGs of objects' ids, and COCO's results."""

    def written(self, image: Tensor, name: str, key: str, batch_size: int) -> tuple[bytes, np.ndarray]:
        """Return the PNG of an image, the best object on top, and the colour of each pixel."""
        found = self.model.predict(image, "instance")
        masks = found.masks.cpu().numpy()
        number = self._image(tuple(image.shape[-2:]), key)
        ids = np.zeros(image.shape[-2:], np.int32)
        for place in range(len(masks)):
            self.count += 1
            ids[masks[place] & (ids == 0)] = place + 1
            about = {"image_id": number, "file_name": name, "id": place + 1, "category_id": int(found.labels[place])}
            about |= {"score": float(found.scores[place]), "segmentation": run_lengths(masks[place])}
            self.annotations.append(about | {"bbox": _extent(masks[place])["bbox"]})
        return _as_colours(ids), _id_colours(ids)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write results and what their numbers mean, and return what there is to say of all."""
        write_text(folder / "instances.json", json.dumps(self.annotations))
        write_json(folder / "index.json", {"images": self.images, "categories": self._categories()})
        return {"segments": self.count}


def _writer(task: str, model: Any, run: str) -> Any:
    kinds: dict[str, Any] = {"semantic": _Semantic, "panoptic": _Panoptic, "instance": _Instances}
    if task == "semantic":
        return _Volumes(model) if kind_of(model.encoder) == "volume" else _Semantic(model)
    if not hasattr(model, "predict"):
        raise UsageError(
            f"{run} gives every pixel a class and tells no objects apart; task={task} is for segment point"
        )
    if not model.things:
        raise UsageError(f"{run} was not told which classes are things; train it with --things, such as car,pedestrian")
    if task == "instance" and not has_pycocotools():
        raise MissingExtraError("pycocotools", "detection", "writing objects as COCO's results")
    return kinds[task](model)


def _shares(model: Any, counts: np.ndarray) -> dict[str, Any]:
    names, total = model.class_names, int(counts.sum())
    return {"classes": {name: float(counts[number] / total) for number, name in enumerate(names)}}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask (H, W) bool in COCO's compressed run lengths."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def overlay(image: Tensor, drawn: np.ndarray) -> bytes:
    """Return a PNG of an image (C, H, W) in [0, 1] under colours (H, W, 3); where they are black, alone."""
    pixels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    levels = (pixels.clamp(0, 1) * 255).round().permute(1, 2, 0).cpu().numpy()
    there = drawn.any(-1, keepdims=True)
    mixed = np.where(there, 0.5 * levels + 0.5 * drawn, levels)
    buffer = io.BytesIO()
    Image.fromarray(mixed.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _extent(mask: np.ndarray) -> dict[str, Any]:
    """Return area and box (left, top, width, height) of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return {"area": 0, "bbox": [0, 0, 0, 0]}
    left, top = int(columns[0]), int(rows[0])
    return {"area": int(mask.sum()), "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]}


def _as_colours(ids: np.ndarray) -> bytes:
    """Return a PNG of ids, as panoptic COCO writes them: R + 256 G + 65536 B."""
    values = ids.astype(np.uint32)
    pixels = np.stack([values & 255, values >> 8 & 255, values >> 16 & 255], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _id_colours(ids: np.ndarray) -> np.ndarray:
    table = np.array([(0, 0, 0), *colours(int(ids.max()))], np.uint8)
    found: np.ndarray = table[ids]
    return found


def _indexed(mask: np.ndarray, palette: list[tuple[int, int, int]]) -> bytes:
    image = Image.frombytes("P", mask.shape[::-1], np.ascontiguousarray(mask).tobytes())
    # All 256 entries, so that no writer packs the indices anew.
    image.putpalette([*(value for colour in palette for value in colour), *([0] * 768)][:768])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()
