"""Images with a mask: a class for every pixel. Paired folders, CamVid and ADE20K in their published layouts.

A source hands out the mask as the image's last channel, 255 where the class is unknown, so that whatever reads,
shuffles, skips and batches images does so with their masks.

>>> source = open_segmentation("camvid:data/camvid:train")  # doctest: +SKIP
>>> source.read(0).image.shape, source.class_names[:3]  # doctest: +SKIP
(torch.Size([4, 360, 480]), ['sky', 'building', 'pole'])
"""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchloom.data.base import Sample, Source, UnreadableImageError
from patchloom.data.decode import decode_image
from patchloom.data.folder import chosen_images
from patchloom.errors import UsageError, unknown_name
from patchloom.io import existing, printable

IGNORED = 255
MOST_CLASSES = 255
MASK_FOLDERS = ("masks", "labels", "annotations", "annots")
CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
ADE_CLASSES = 150


class Pair(NamedTuple):
    """An image and its mask."""

    image: Tensor
    """(C, H, W) uint8."""
    mask: Tensor
    """(H, W) uint8, 255 where unknown."""


def split_mask(image: Tensor) -> Pair:
    """Return what `MaskSource.read` put together: image (C, H, W) and mask (H, W)."""
    return Pair(image[:-1], image[-1].to(torch.uint8))


class MaskSource(Source):
    """Images and masks from two folders, paired by name.

    Args:
        name: The source as the user named it.
        images: Folder of images.
        masks: Folder of masks: one value per pixel (grey or indexed), of the images' size. The mask of `a/b.jpg` is
            `a/b.png` or another image of that stem, `_mask` or `_label` at its end allowed.
        class_names: Names by number; default: as many as the masks hold, which are then all read once.
        unknown: Values of masks that mean unknown.
        from_one: Classes count from 1 in the files, and 0 is unknown (ADE20K).
        palette: (R, G, B) by class; default: that of the first indexed mask, else colours all round the circle.
        in_chans: Channels the images are read as, 3 or 1.
        include: Globs of the images to take, see `patchloom.source_options.choose`; default: all.
        exclude: Globs of images to leave out; their masks go with them.

    Raises:
        UsageError: No such folder, nothing in it, a mask without image or an image without mask, or more classes
            than a byte holds.
    """

    def __init__(
        self,
        name: str,
        images: Path,
        masks: Path,
        *,
        class_names: Sequence[str] | None = None,
        unknown: Sequence[int] = (IGNORED,),
        from_one: bool = False,
        palette: Sequence[tuple[int, int, int]] | None = None,
        in_chans: int = 3,
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        self.name = printable(name)
        self.in_chans = in_chans
        self.images, self.masks = Path(images), Path(masks)
        self.unknown, self.from_one = tuple(unknown), from_one
        found = [_listed(self.images, include, exclude), _listed(self.masks)]
        if include is not None or exclude is not None:
            found[1] = {stem: file for stem, file in found[1].items() if stem in found[0]}
        self.pairs = _paired(found[0], found[1], self.images, self.masks)
        digest = hashlib.sha256(repr((self.unknown, from_one)).encode())
        for files in found:
            for file in sorted(files.values()):
                digest.update(repr(file).encode())
        self._stamp = digest.hexdigest()[:16]
        names = list(class_names) if class_names is not None else [str(n) for n in range(self._highest() + 1)]
        if not 1 <= len(names) <= MOST_CLASSES:
            raise UsageError(f"{name} has {len(names)} classes; masks here hold 1 to {MOST_CLASSES}")
        self.class_names = names
        own = palette if palette is not None else self._own_palette()
        self.palette = list(own) if own is not None and len(own) >= len(names) else colours(len(names))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def key(self, index: int) -> str:
        """Return the path of image number `index` below its folder."""
        return printable(self.pairs[index][0])

    def read(self, index: int) -> Sample:
        """Return pair number `index`: (C + 1, H, W) uint8, the mask last; see `split_mask`.

        Raises:
            UnreadableImageError: One of the two files cannot be decoded.
            UsageError: The mask is of another size than its image, in colour, or holds a class there is not.
        """
        name, mask_key = self.pairs[index]
        key = self.key(index)
        image = decode_image(self.images / name, key, self.in_chans)
        mask = self.read_mask(index)
        if mask.shape != image.shape[1:]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (mask.shape, image.shape[1:])]
            raise UsageError(
                f"the mask {self.masks / mask_key} is {sizes[0]} and its image {sizes[1]}; they must be of one size"
            )
        return Sample(torch.cat([image, mask[None]]), -1, key)

    def read_mask(self, index: int) -> Tensor:
        """Return mask number `index`, (H, W) uint8, 255 where unknown."""
        file = self.masks / self.pairs[index][1]
        values = _values(file, printable(self.pairs[index][1]))
        hidden = np.isin(values, self.unknown)
        if self.from_one:
            hidden |= values == 0
            values = values - 1
        wrong = values[~hidden]
        if wrong.size and (wrong.max() >= len(self.class_names or []) or wrong.min() < 0):
            value = int(wrong.max()) + self.from_one
            raise UsageError(
                f"the mask {file} holds the value {value}; {self.name} has {len(self.class_names or [])} classes, "
                f"numbered from {int(self.from_one)}, and {', '.join(map(str, self.unknown))} for unknown"
            )
        return torch.from_numpy(np.where(hidden, IGNORED, values).astype(np.uint8))

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times of images and masks."""
        return self._stamp

    def _highest(self) -> int:
        """Return the highest class of all masks."""
        highest = -1
        for _, key in self.pairs:
            try:
                present = np.unique(_values(self.masks / key, key))
            except UnreadableImageError:
                continue
            known = present[~np.isin(present, self.unknown)]
            if known.size:
                highest = max(highest, int(known.max()) - self.from_one)
        if highest < 0:
            raise UsageError(f"the masks in {self.masks} hold no class")
        return highest

    def _own_palette(self) -> list[tuple[int, int, int]] | None:
        try:
            with Image.open(self.masks / self.pairs[0][1]) as mask:
                values = mask.getpalette() if mask.mode == "P" else None
        except OSError:
            return None
        if values is None:
            return None
        return [(values[i], values[i + 1], values[i + 2]) for i in range(0, len(values) - 2, 3)]


def open_segmentation(
    name: str,
    *,
    in_chans: int = 3,
    class_names: Sequence[str] | None = None,
    default_names: Sequence[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> MaskSource:
    """Open images with masks by name.

    Args:
        name: A folder with `images` and `masks` (or `labels`, `annotations`) in it, and optionally `classes.txt`, a
            name per line; `camvid:FOLDER:train` (val, test); `ade20k:FOLDER:train` (val).
        in_chans: Channels the images are read as.
        class_names: Names of the classes of a plain folder, instead of its own.
        default_names: Names of the classes of a plain folder that names none; default: as many as its masks hold.
        include: Globs of the images to take, see `patchloom.source_options.choose`; default: all.
        exclude: Globs of images to leave out; their masks go with them.

    Raises:
        UsageError: There is no such source.
    """
    word, _, rest = name.partition(":")
    if word in ("camvid", "ade20k") and rest:
        folder, split = _split_of(rest, {"camvid": ("train", "val", "test"), "ade20k": ("train", "val")}[word])
        opener = _camvid if word == "camvid" else _ade20k
        return opener(name, folder, split, in_chans=in_chans, include=include, exclude=exclude)
    root = existing(name)
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {name!r} of images and masks, nor a source of that name "
            f"(camvid:FOLDER:SPLIT, ade20k:FOLDER:SPLIT)"
        )
    masks = next((root / folder for folder in MASK_FOLDERS if (root / folder).is_dir()), None)
    if not (root / "images").is_dir() or masks is None:
        raise UsageError(f"{name} must hold a folder images and a folder masks (or {', '.join(MASK_FOLDERS[1:])})")
    if class_names is None:
        for place in (root, root.parent):
            if (place / "classes.txt").is_file():
                lines = (place / "classes.txt").read_text(encoding="utf-8").splitlines()
                class_names = [line.strip() for line in lines if line.strip()]
                break
    names = class_names if class_names is not None else default_names
    return MaskSource(
        name, root / "images", masks, class_names=names, in_chans=in_chans, include=include, exclude=exclude
    )


def colours(count: int) -> list[tuple[int, int, int]]:
    """Return that many colours, (R, G, B) each: neighbours in number lie far apart on the circle of hues."""
    found = []
    for number in range(count):
        # The golden ratio spreads any number of hues; brightness tells rounds apart.
        hue, round_ = (number * 0.618034) % 1.0, number // 12
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (round_ % 2), 0.95 - 0.25 * (round_ % 3))
        found.append((round(red * 255), round(green * 255), round(blue * 255)))
    return found


def _camvid(name: str, root: Path, split: str, **options: Any) -> MaskSource:
    """CamVid, SegNet's split: 11 classes, 11 is void; `train` + `trainannot`, or `train/images` + `train/labels`."""
    nested = root / split / "images", root / split / "labels"
    flat = root / split, root / f"{split}annot"
    images, masks = next((pair for pair in (nested, flat) if all(folder.is_dir() for folder in pair)), flat)
    if not masks.is_dir():
        raise UsageError(f"no CamVid in {root}: looked for {split}/images with {split}/labels, and for {split}annot")
    return MaskSource(
        name,
        images,
        masks,
        class_names=list(CAMVID),
        unknown=(len(CAMVID), IGNORED),
        palette=list(CAMVID.values()),
        **options,
    )


def _ade20k(name: str, root: Path, split: str, **options: Any) -> MaskSource:
    """ADE20K's challenge: 150 classes from 1 on, 0 is unknown."""
    folder = {"train": "training", "val": "validation"}[split]
    images, masks = root / "images" / folder, root / "annotations" / folder
    if not (images.is_dir() and masks.is_dir()):
        raise UsageError(f"no ADE20K in {root}: looked for images/{folder} and annotations/{folder}")
    names = [f"class {number}" for number in range(1, ADE_CLASSES + 1)]
    if (listing := root / "objectInfo150.txt").is_file():
        rows = [line.split("\t") for line in listing.read_text(encoding="utf-8").splitlines()[1:]]
        read = [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()]
        names = read if len(read) == ADE_CLASSES else names
    return MaskSource(name, images, masks, class_names=names, from_one=True, **options)


def _split_of(rest: str, known: tuple[str, ...]) -> tuple[Path, str]:
    folder, _, split = rest.rpartition(":")
    if not folder:  # no split named
        return Path(rest), "train"
    if split not in known:
        raise unknown_name("split", split, known)
    return Path(folder), split


def _listed(folder: Path, include: str | None = None, exclude: str | None = None) -> dict[str, tuple[str, int, int]]:
    """Return the image files below a folder by what pairs them: their path without suffix."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    found: dict[str, tuple[str, int, int]] = {}
    for file in chosen_images(folder, include, exclude):
        stem = file[0].rpartition(".")[0]
        for ending in ("_mask", "_label", "_labelIds"):
            stem = stem.removesuffix(ending)
        if stem in found:
            raise UsageError(
                f"{folder} holds two files for {printable(stem)}: {printable(found[stem][0])} and {printable(file[0])}"
            )
        found[stem] = file
    if not found:
        raise UsageError(f"no image in {folder} or below")
    return found


def _paired(
    images: dict[str, tuple[str, int, int]], masks: dict[str, tuple[str, int, int]], image_root: Path, mask_root: Path
) -> list[tuple[str, str]]:
    """Return the names of images and masks, in the order of the images."""
    for have, lack, kind, other, root in (
        (images, masks, "image", "mask", mask_root),
        (masks, images, "mask", "image", image_root),
    ):
        lone = [file[0] for stem, file in have.items() if stem not in lack]
        if lone:
            more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
            raise UsageError(f"the {kind} {printable(lone[0])}{more} has no {other} of that name in {root}")
    return [(images[stem][0], masks[stem][0]) for stem in sorted(images)]


def _values(file: Path, key: str) -> np.ndarray:
    """Return the values of a mask, (H, W) int32: the indices of an indexed image, not its colours."""
    try:
        with Image.open(file) as mask:
            mask.load()
            if mask.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
                raise UsageError(
                    f"the mask {file} is in colour ({mask.mode}); save the number of the class of each pixel instead, "
                    f"as a grey or indexed PNG"
                )
            values = np.asarray(mask)
    except UsageError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files
        raise UnreadableImageError(key, f"its mask cannot be read: {' '.join(str(error).split())[:100]}") from error
    if values.ndim != 2:
        raise UsageError(f"the mask {file} has {values.ndim} dimensions; one value per pixel is needed")
    return values.astype(np.int32)
