"""Images with boxes (and the outlines of what is in them) by a JSON file of COCO's layout.

>>> source = CocoSource("my/annotations.json")  # doctest: +SKIP
>>> source.read(0).named["boxes"].shape, source.class_names  # doctest: +SKIP
(torch.Size([3, 4]), ['cat', 'dog'])
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data.listed import ListedSource
from patchloom.data.sample import OnDemand
from patchloom.data.survey import notice
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import existing, printable

FOLDERS = ("", "images", "../images", "..")
"""Where images may lie, from the JSON file's folder."""


class CocoSource(ListedSource):
    """The images of a COCO file, each with `boxes` and `box_classes`.

    `boxes` are (n, 4) float32, left, top, right, bottom in pixels; `box_classes` (n,) int64; `instance_masks`, made
    when asked for, (n, H, W) bool, a box's own area where the file has no outline. Groups (`iscrowd`) are left out.

    Args:
        path: The JSON file.
        root: Folder of the images; default: that of the file, or `images` in it or beside it, whichever holds them.
        in_chans: Channels the images are read as.
        include: Globs of the images to take; default: all.
        exclude: Globs of images to leave out.
        class_names: Classes in the order of their numbers, as settled on another file; default: by category id.

    Attributes:
        category_ids: The file's own number of each class.
        image_ids: The file's own number of each image.

    Raises:
        UsageError: No such file, one of another layout, an annotation of an unknown image or class, or images missing.
    """

    class_names: list[str]

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        in_chans: int = 3,
        include: str | None = None,
        exclude: str | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        place = existing(path)
        shown = printable(place)
        found = _read(place, shown)
        categories = sorted(found["categories"], key=lambda one: int(one["id"]))
        if double := [c["name"] for c, d in pairwise(categories) if c["name"] == d["name"]]:
            raise UsageError(f"{shown} has two categories called {double[0]!r}")
        own = {str(category["name"]): int(category["id"]) for category in categories}
        names = list(own) if class_names is None else list(class_names)
        if strange := [name for name in own if name not in names]:
            raise UsageError(f"{shown} has the class {strange[0]!r}; those known are {', '.join(names[:12])}")
        number_of = {identity: names.index(name) for name, identity in own.items()}
        self.category_ids = [own.get(name, -1) for name in names]
        self.annotations = _by_image(found, number_of, shown)
        images = found["images"]
        files = [str(image["file_name"]) for image in images]
        folder = Path(root) if root is not None else _folder_of(place, files)
        ids = [str(int(image["id"])) for image in images]
        options: dict[str, Any] = {"include": include, "exclude": exclude, "beside": {"id": ids}}
        super().__init__(shown, folder, files, None, names, in_chans, **options)
        self.image_ids = [int(identity) for identity in self.beside["id"]]

    def named(self, index: int) -> Mapping[str, Any]:
        """Return boxes, classes and masks of image number `index`, each made when it is asked for."""
        return OnDemand(
            boxes=partial(self.boxes, index),
            box_classes=partial(self.box_classes, index),
            instance_masks=partial(self.instance_masks, index),
        )

    def boxes(self, index: int) -> Tensor:
        """Return the boxes of image number `index`, (n, 4): left, top, right, bottom."""
        found = [one["bbox"] for one in self.annotations[self.image_ids[index]]]
        boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    def box_classes(self, index: int) -> Tensor:
        """Return their classes, (n,)."""
        return torch.tensor([one["class"] for one in self.annotations[self.image_ids[index]]], dtype=torch.int64)

    def instance_masks(self, index: int) -> Tensor:
        """Return what is in them, (n, H, W) bool.

        Raises:
            MissingExtraError: The file has outlines, and what reads them is not installed.
        """
        annotations = self.annotations[self.image_ids[index]]
        height, width = self.stored_size(index)
        masks = np.zeros((len(annotations), height, width), bool)
        for mask, one in zip(masks, annotations, strict=True):
            if one.get("segmentation"):
                mask[:] = _decoded(one["segmentation"], height, width)
            else:
                left, top, wide, high = one["bbox"]
                rows = slice(max(0, round(top)), max(0, round(top + high)))
                mask[rows, max(0, round(left)) : max(0, round(left + wide))] = True
        return torch.from_numpy(masks)

    def stored_size(self, index: int) -> tuple[int, int]:
        """Return height and width of image number `index`."""
        image = super().read(index).image
        return image.shape[-2], image.shape[-1]


def _read(place: Path, shown: str) -> dict[str, Any]:
    if not place.is_file():
        raise UsageError(f"there is no file {shown}; give a JSON file of COCO's layout")
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{shown} is no JSON ({error})") from error
    parts = ("images", "annotations", "categories")
    missing = parts if not isinstance(found, dict) else [part for part in parts if part not in found]
    if missing:
        raise UsageError(f"{shown} has no {missing[0]!r}; COCO's layout has {', '.join(parts)}")
    if not found["images"]:
        raise UsageError(f"{shown} lists no image")
    if not found["categories"]:
        raise UsageError(f"{shown} has no category")
    whole: dict[str, Any] = found
    return whole


def _by_image(found: dict[str, Any], number_of: dict[int, int], shown: str) -> dict[int, list[dict[str, Any]]]:
    """Return the annotations of each image by its id, with their class; those without area are left out, aloud."""
    known = {int(image["id"]) for image in found["images"]}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    empty = 0
    for one in found["annotations"]:
        image, category = int(one["image_id"]), int(one["category_id"])
        if image not in known:
            raise UsageError(f"{shown} has an annotation of image {image}, which it does not list")
        if category not in number_of:
            raise UsageError(f"{shown} has an annotation of category {category}, which it does not list")
        if one.get("iscrowd"):
            continue
        box = [float(x) for x in one["bbox"]]
        if len(box) != 4 or not all(np.isfinite(box)) or min(box[2:]) <= 0:
            empty += 1
            continue
        by_image[image].append({**one, "bbox": box, "class": number_of[category]})
    if empty:
        notice(f"{shown}: {empty} boxes without area are left out")
    for identity in known:
        by_image.setdefault(identity, [])
    return dict(by_image)


def _folder_of(place: Path, files: list[str]) -> Path:
    for folder in FOLDERS:
        candidate = place.parent / folder
        if (candidate / files[0]).is_file():
            return candidate.resolve()
    return place.parent


def _decoded(segmentation: Any, height: int, width: int) -> np.ndarray:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise MissingExtraError("pycocotools", "detection", "reading outlines of COCO files") from error
    if isinstance(segmentation, list):
        encoded = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = coco.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    decoded: np.ndarray = coco.decode(encoded).astype(bool)
    return decoded
