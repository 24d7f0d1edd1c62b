"""Images with a mask: a class for every pixel. Paired folders, CamVid and ADE20K in their published layouts.

A source hands out the mask under the name `mask`, 255 where the class is unknown. What the values in the files mean is
settled once for the source (`mask_values`).

>>> source = open_segmentation("camvid:data/camvid:train")  # doctest: +SKIP
>>> source.read(0).named["mask"].shape, source.class_names[:3]  # doctest: +SKIP
(torch.Size([360, 480]), ['sky', 'building', 'pole'])
"""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchloom.base.mask_settings import MaskSettings
from patchloom.data.base import Sample, Source, UnreadableImageError, spread
from patchloom.data.decode import decode_image
from patchloom.data.mask_pairs import ListedFile, list_images, paired
from patchloom.data.mask_question import MOST_GUESSED
from patchloom.data.mask_settling import settle
from patchloom.data.mask_survey import RGB, Survey, open_mask, survey_files
from patchloom.data.mask_table import TABLE_FILES, read_table
from patchloom.data.mask_values import (
    IGNORED,
    MaskCoding,
    MaskShares,
    UnknownValueError,
    shares_of_counts,
    wrong_value,
)
from patchloom.data.reading import Reading, remembered
from patchloom.errors import UsageError, unknown_name
from patchloom.io import existing, printable

# Raised when the same masks would be counted otherwise than before.
FORMAT = 2
MOST_LOOKED_AT = 500
MOST_TOGETHER = 64
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


class MaskSource(Source):
    """Images and masks from two folders, paired by name.

    How masks are read is settled once, from all of them, see `mask_settling.settle`; `said` says it in a line.

    Args:
        name: The source as the user named it.
        images: Folder of images.
        masks: Folder of masks, of the images' size. The mask of `a/b.jpg` is `a/b.png` or another image of that stem,
            `_mask` or `_label` at its end allowed; or a file per class, see `mask_pairs.paired`.
        class_names: Names by number; default: as many as the masks hold.
        layout: Of masks whose values are published: those that are unknown, and the number of the first class.
        palette: (R, G, B) by class; default: that of indexed masks, else colours all round the circle.
        in_chans: Channels the images are read as, 3 or 1.
        settings: What the user says of the masks' values.
        coding: How masks are read, as settled on another source.
        table: File that names values or colours.
        include: Globs of the images to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of images to leave out; their masks go with them.

    Attributes:
        coding: How masks are read.
        shares: What the masks hold.

    Raises:
        UsageError: No such folder, nothing in it, a mask without image or an image without mask, more classes than a
            byte holds, or masks whose meaning has to be said.
    """

    class_names: list[str]

    def __init__(
        self,
        name: str,
        images: Path,
        masks: Path,
        *,
        class_names: Sequence[str] | None = None,
        layout: tuple[Sequence[int], int] | None = None,
        palette: Sequence[RGB] | None = None,
        in_chans: int = 3,
        settings: MaskSettings | None = None,
        coding: MaskCoding | None = None,
        table: Path | None = None,
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        self.name = printable(name)
        self.in_chans = in_chans
        self.images, self.masks = Path(images), Path(masks)
        found = [list_images(self.images, include, exclude), list_images(self.masks)]
        left_out = frozenset(file[0] for file in list_images(self.images)) - {file[0] for file in found[0]}
        self.pairs = paired(found[0], found[1], self.images, self.masks, left_out)
        used = {part.file for pair in self.pairs for part in pair.parts}
        found[1] = [file for file in found[1] if file[0] in used]
        per_class = tuple(sorted({part.name for pair in self.pairs for part in pair.parts if part.name is not None}))
        self.own_names = list(class_names) if class_names is not None else None
        settings = settings or MaskSettings()
        survey = self._look(found[1], None if coding is None and layout is None else MOST_LOOKED_AT, settings, coding)
        if coding is None:
            entries = None if table is None else read_table(table)
            coding = settle(
                survey, name, settings, names=class_names, table=entries, layout=layout, per_class=per_class
            )
        self._fits(coding, survey, per_class)
        self._check_sizes()
        self.coding = coding
        self.class_names = list(coding.names)
        digest = hashlib.sha256(repr((coding.table(), coding.names, coding.per_class)).encode())
        for files in found:
            for file in files:
                digest.update(repr(file).encode())
        self._stamp = digest.hexdigest()[:16]
        # Where each class has a file of its own, what covers what shows only once they are put together.
        self.shares = self._shares() if per_class else coding.shares(survey)
        own = coding.palette if palette is None or len(palette) != len(coding.names) else palette
        self.palette = list(own) if own is not None else colours(len(coding.names))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def key(self, index: int) -> str:
        """Return the path of image number `index` below its folder."""
        return printable(self.pairs[index].image)

    def said(self) -> str:
        """Return the line that says how masks are read and what they hold."""
        return self.coding.line(self.name, self.shares)

    def read(self, index: int) -> Sample:
        """Return image number `index` (C, H, W) with its `mask` (H, W) uint8.

        Raises:
            UnreadableImageError: One of the two files cannot be decoded.
            UsageError: The mask is of another size than its image, or holds a value that means nothing.
        """
        key = self.key(index)
        path = self.images / self.pairs[index].image
        image = decode_image(path, key, self.in_chans, "invert", self.values, self.channels)
        mask = self.read_mask(index)
        if mask.shape != image.shape[1:]:
            file = self.masks / self.pairs[index].parts[0].file
            raise _wrong_size(file, tuple(mask.shape)[::-1], tuple(image.shape[1:])[::-1])
        return Sample(image, -1, key, {"mask": mask})

    def read_mask(self, index: int) -> Tensor:
        """Return mask number `index`, (H, W) uint8, 255 where unknown."""
        parts = self.pairs[index].parts
        if not self.coding.per_class:
            return torch.from_numpy(self._decoded(parts[0].file).astype(np.uint8))
        classes = {part.name: self._decoded(part.file) for part in parts}
        sizes = {values.shape for values in classes.values()}
        if len(sizes) > 1:
            raise UsageError(
                f"the masks of {self.images / self.key(index)} are of different sizes; they must be of one"
            )
        return torch.from_numpy(self.coding.together(classes).astype(np.uint8))

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), self.images / self.pairs[index].image

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times of images and masks."""
        return self._stamp

    def _decoded(self, key: str) -> np.ndarray:
        try:
            return self.coding.decode(open_mask(self.masks / key, printable(key)))
        except UnknownValueError as error:
            raise wrong_value(f"the mask {self.masks / key}", error.value, self.coding, self.name) from error

    def _look(
        self, files: list[ListedFile], most: int | None, settings: MaskSettings, coding: MaskCoding | None
    ) -> Survey:
        """Return what the masks hold; of those read in a known way, `most` from all over the list do."""
        chosen = sorted({round(x) for x in np.linspace(0, len(files) - 1, min(len(files), most or len(files)))})
        looked = [files[number] for number in chosen]
        stamp = hashlib.sha256(repr((FORMAT, str(self.masks.resolve()), looked)).encode()).hexdigest()[:24]

        def refuse_early(few: Survey) -> None:
            if len(few.values) > MOST_GUESSED or few.many:
                settle(few, self.name, settings, names=self.own_names)

        check = refuse_early if most is None else None
        return survey_files([(self.masks / file[0], printable(file[0])) for file in looked], stamp, check)

    def _fits(self, coding: MaskCoding, survey: Survey, per_class: tuple[str, ...]) -> None:
        """Refuse masks that are not read as those the coding was settled on."""
        if bool(per_class) != bool(coding.per_class):
            kinds = ("one mask for each image", "one for each class")
            raise UsageError(
                f"{self.name} has {kinds[bool(per_class)]}, and what it is compared with {kinds[not per_class]}"
            )
        if strange := sorted(set(per_class) - set(coding.per_class)):
            raise UsageError(
                f"{self.name} has masks of the class {strange[0]}; there are {', '.join(coding.per_class)}"
            )
        if clash := coding.palette_clash(survey):
            raise UsageError(
                f"the palettes of the masks of {self.name} are in another order: {clash}; store the same indices, or "
                f"name the colours by --mask_values"
            )
        try:
            coding.shares(survey)
        except UnknownValueError as error:
            place = self.masks / survey.place(error.value, coding.form)
            raise wrong_value(f"the mask {place}", error.value, coding, self.name) from error

    def _check_sizes(self) -> None:
        """Refuse a mask of another size than its image before anything is trained, as far as headers tell."""
        for number in sorted({round(x) for x in np.linspace(0, len(self) - 1, min(len(self), MOST_LOOKED_AT))}):
            pair = self.pairs[number]
            files = [self.images / pair.image, *(self.masks / part.file for part in pair.parts)]
            try:
                sizes = [_stored_size(file) for file in files]
            except (OSError, ValueError, SyntaxError):  # no file Pillow opens: reading it will tell
                continue
            for size, file in zip(sizes[1:], files[1:], strict=True):
                if sorted(size) != sorted(sizes[0]):  # an image may be stored on its side
                    raise _wrong_size(file, size, sizes[0])

    def _shares(self) -> MaskShares:
        chosen = sorted({round(x) for x in np.linspace(0, len(self) - 1, min(len(self), MOST_TOGETHER))})
        sums = np.zeros(256, np.int64)
        for index in chosen:
            try:
                sums += np.bincount(self.read_mask(index).numpy().ravel(), minlength=256)
            except UnreadableImageError:
                continue
        names = self.coding.names
        shares = shares_of_counts(sums[: len(names)], int(sums[IGNORED]), names, len(chosen))
        files = sum(len(pair.parts) for pair in self.pairs)
        return shares._replace(without_file=len(self) * len(self.coding.per_class) - files)


def open_segmentation(
    name: str,
    *,
    in_chans: int = 3,
    class_names: Sequence[str] | None = None,
    settings: MaskSettings | None = None,
    coding: MaskCoding | None = None,
    include: str | None = None,
    exclude: str | None = None,
    value_range: str | None = None,
    no_data: float | None = None,
    use_channels: str | None = None,
    model: Any = None,
) -> MaskSource:
    """Open images with masks by name.

    Args:
        name: A folder with `images` and `masks` (or `labels`, `annotations`) in it, and optionally `classes.txt`, a
            name per line, or a table of values or colours (`mask_values.txt`, `label_colors.txt`, `class_dict.csv`);
            `camvid:FOLDER:train` (val, test); `ade20k:FOLDER:train` (val).
        in_chans: Channels the images are read as.
        class_names: Names of the classes of a plain folder, instead of its own.
        settings: What the user says of the values of masks; default: they are recognised.
        coding: How masks are read, as settled on another source, instead.
        include: Globs of the images to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of images to leave out; their masks go with them.
        value_range: What stored values of images become 0 and 1, see `patchloom.base.source_options`.
        no_data: Value that means that nothing is known of a pixel.
        use_channels: Numbers of the channels taken of each image.
        model: Encoder whose training images say how these are read, where the options do not.

    Raises:
        UsageError: There is no such source, or it cannot be read so.
    """
    asked = {"value_range": value_range, "no_data": no_data, "use_channels": use_channels}
    how = Reading.of(remembered(model) | {option: value for option, value in asked.items() if value is not None})
    read: dict[str, Any] = {"in_chans": in_chans, "settings": settings, "coding": coding}
    read |= {"include": include, "exclude": exclude}
    word, _, rest = name.partition(":")
    if word in ("camvid", "ade20k") and rest:
        folder, split = _split_of(rest, {"camvid": ("train", "val", "test"), "ade20k": ("train", "val")}[word])
        return how.given_to((_camvid if word == "camvid" else _ade20k)(name, folder, split, read))
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
    tables = [place / file for place in (root, root.parent) for file in TABLE_FILES if (place / file).is_file()]
    table = tables[0] if tables and class_names is None else None
    return how.given_to(MaskSource(name, root / "images", masks, class_names=class_names, table=table, **read))


def colours(count: int) -> list[tuple[int, int, int]]:
    """Return that many colours, (R, G, B) each: neighbours in number lie far apart on the circle of hues."""
    found = []
    for number in range(count):
        # The golden ratio spreads any number of hues; brightness tells rounds apart.
        hue, round_ = (number * 0.618034) % 1.0, number // 12
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (round_ % 2), 0.95 - 0.25 * (round_ % 3))
        found.append((round(red * 255), round(green * 255), round(blue * 255)))
    return found


def _stored_size(file: Path) -> tuple[int, ...]:
    with Image.open(file) as image:
        return image.size


def _wrong_size(file: Path, mask: tuple[int, ...], image: tuple[int, ...]) -> UsageError:
    sizes = [f"{size[0]}x{size[1]}" for size in (mask, image)]
    return UsageError(f"the mask {file} is {sizes[0]} and its image {sizes[1]}; they must be of one size")


def _camvid(name: str, root: Path, split: str, read: dict[str, Any]) -> MaskSource:
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
        layout=((len(CAMVID), IGNORED), 0),
        palette=list(CAMVID.values()),
        **read,
    )


def _ade20k(name: str, root: Path, split: str, read: dict[str, Any]) -> MaskSource:
    """ADE20K's challenge: 150 classes from 1 on, 0 is unknown."""
    folder = {"train": "training", "val": "validation"}[split]
    images, masks = root / "images" / folder, root / "annotations" / folder
    if not (images.is_dir() and masks.is_dir()):
        raise UsageError(f"no ADE20K in {root}: looked for images/{folder} and annotations/{folder}")
    names = [f"class {number}" for number in range(1, ADE_CLASSES + 1)]
    if (listing := root / "objectInfo150.txt").is_file():
        rows = [line.split("\t") for line in listing.read_text(encoding="utf-8").splitlines()[1:]]
        found = [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()]
        names = found if len(found) == ADE_CLASSES else names
    return MaskSource(name, images, masks, class_names=names, layout=((IGNORED,), 1), **read)


def _split_of(rest: str, known: tuple[str, ...]) -> tuple[Path, str]:
    folder, _, split = rest.rpartition(":")
    if not folder:  # no split named
        return existing(rest), "train"
    if split not in known:
        raise unknown_name("split", split, known)
    return existing(folder), split
