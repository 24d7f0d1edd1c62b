"""Images with a mask: a class for every pixel. Folders, tables, shards, data sets, CamVid and ADE20K as published.

A source hands out the mask under the name `mask`, 255 where the class is unknown. What the values in the files mean is
settled once for the source (`mask_values`).

>>> source = open_segmentation("camvid:data/camvid:train")  # doctest: +SKIP
>>> source.read(0).named["mask"].shape, source.class_names[:3]  # doctest: +SKIP
(torch.Size([360, 480]), ['sky', 'building', 'pole'])
"""

from __future__ import annotations

import colorsys
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.source_options import refuse_untaken
from patchloom.data.base import Sample, Source, UnreadableImageError, spread
from patchloom.data.decode import decode_image
from patchloom.data.fields import MASK_FOLDERS, ending_beside
from patchloom.data.hub import HuggingFaceSource
from patchloom.data.labels import LabelFileSource, is_label_file
from patchloom.data.mask_pairs import list_images
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
from patchloom.data.masked_files import FolderMasks, HubMasks, ListedMask, MaskedFiles, ShardMasks, TableMasks
from patchloom.data.reading import Reading, remembered
from patchloom.data.shards import ShardSource, is_shards
from patchloom.errors import UsageError, unknown_name
from patchloom.io import existing, printable
from patchloom.registry import OPENERS

# Raised when the same masks would be counted otherwise than before.
FORMAT = 2
MOST_LOOKED_AT = 500
MOST_TOGETHER = 64
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
BLACK_AND_WHITE = [(0, 0, 0), (255, 255, 255)]


class MaskSource(Source):
    """Images and the masks that belong to them.

    How masks are read is settled once, from all of them, see `mask_settling.settle`; `said` says it in a line.

    Args:
        name: The source as the user named it.
        files: Images and masks as they are stored, masks of the images' size.
        class_names: Names by number; default: as many as the masks hold.
        layout: Of masks whose values are published: those that are unknown, and the number of the first class.
        palette: (R, G, B) by class; default: that of indexed masks, else colours all round the circle.
        in_chans: Channels the images are read as, 3 or 1.
        settings: What the user says of the masks' values.
        coding: How masks are read, as settled on another source.
        table: File that names values or colours.

    Attributes:
        coding: How masks are read.
        shares: What the masks hold.

    Raises:
        UsageError: More classes than a byte holds, or masks whose meaning has to be said.
    """

    class_names: list[str]

    def __init__(
        self,
        name: str,
        files: MaskedFiles,
        *,
        class_names: Sequence[str] | None = None,
        layout: tuple[Sequence[int], int] | None = None,
        palette: Sequence[RGB] | None = None,
        in_chans: int = 3,
        settings: MaskSettings | None = None,
        coding: MaskCoding | None = None,
        table: Path | None = None,
    ) -> None:
        self.name = printable(name)
        self.in_chans = in_chans
        self.files = files
        masks = files.masks()
        parts = [part.name for index in range(len(files)) for part in files.parts(index)]
        per_class = tuple(sorted({part for part in parts if part is not None}))
        self.own_names = list(class_names) if class_names is not None else None
        settings = settings or MaskSettings()
        survey = self._look(masks, None if coding is None and layout is None else MOST_LOOKED_AT, settings, coding)
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
        for stamp in (*files.stamps, *(mask.stamp for mask in masks)):
            digest.update(repr(stamp).encode())
        self._stamp = digest.hexdigest()[:16]
        # Where each class has a file of its own, what covers what shows only once they are put together.
        self.shares = self._shares() if per_class else coding.shares(survey)
        own = coding.palette if palette is None or len(palette) != len(coding.names) else palette
        drawn = BLACK_AND_WHITE if _is_binary(coding) else colours(len(coding.names))
        self.palette = list(drawn if own is None else own)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.files)

    def key(self, index: int) -> str:
        """Return the name of image number `index`."""
        return self.files.key(index)

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
        image = decode_image(self.files.image(index), key, self.in_chans, "invert", self.values, self.channels)
        mask = self.read_mask(index)
        if mask.shape != image.shape[1:]:
            name = self.files.place(self.files.mask_name(index))
            raise _wrong_size(name, tuple(mask.shape)[::-1], tuple(image.shape[1:])[::-1])
        return Sample(image, -1, key, {"mask": mask})

    def read_mask(self, index: int) -> Tensor:
        """Return mask number `index`, (H, W) uint8, 255 where unknown."""
        parts = self.files.parts(index)
        if not self.coding.per_class:
            return torch.from_numpy(self._decoded(index, 0).astype(np.uint8))
        classes = {part.name: self._decoded(index, number) for number, part in enumerate(parts)}
        sizes = {values.shape for values in classes.values()}
        if len(sizes) > 1:
            raise UsageError(f"the masks of {self.key(index)} are of different sizes; they must be of one")
        return torch.from_numpy(self.coding.together(classes).astype(np.uint8))

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and files or contents of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), self.files.image(index)

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times of images and masks."""
        return self._stamp

    def _decoded(self, index: int, part: int) -> np.ndarray:
        name = self.files.mask_name(index, part)
        try:
            return self.coding.decode(open_mask(self.files.mask(index, part), name))
        except UnknownValueError as error:
            raise wrong_value(f"the mask {self.files.place(name)}", error.value, self.coding, self.name) from error

    def _look(
        self, masks: Sequence[ListedMask], most: int | None, settings: MaskSettings, coding: MaskCoding | None
    ) -> Survey:
        """Return what the masks hold; of those read in a known way, `most` from all over the list do."""
        chosen = sorted({round(x) for x in np.linspace(0, len(masks) - 1, min(len(masks), most or len(masks)))})
        looked = [masks[number] for number in chosen]
        about = (FORMAT, self.files.where, [mask.stamp for mask in looked])
        stamp = hashlib.sha256(repr(about).encode()).hexdigest()[:24]

        def refuse_early(few: Survey) -> None:
            if len(few.values) > MOST_GUESSED or few.many:
                settle(few, self.name, settings, names=self.own_names)

        check = refuse_early if most is None else None
        return survey_files([(mask.data, mask.name) for mask in looked], stamp, check)

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
            place = self.files.place(survey.place(error.value, coding.form))
            raise wrong_value(f"the mask {place}", error.value, coding, self.name) from error

    def _check_sizes(self) -> None:
        """Refuse a mask of another size than its image before anything is trained, as far as headers tell."""
        for number in sorted({round(x) for x in np.linspace(0, len(self) - 1, min(len(self), MOST_LOOKED_AT))}):
            masks = range(len(self.files.parts(number)))
            try:
                image = _stored_size(self.files.image(number))
                sizes = [_stored_size(self.files.mask(number, part)) for part in masks]
            except (OSError, ValueError, SyntaxError, UnreadableImageError):  # reading it will tell
                continue
            for part, size in zip(masks, sizes, strict=True):
                if sorted(size) != sorted(image):  # an image may be stored on its side
                    raise _wrong_size(self.files.place(self.files.mask_name(number, part)), size, image)

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
        files = sum(len(self.files.parts(index)) for index in range(len(self)))
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
    image_field: str | None = None,
    mask_field: str | None = None,
    value_range: str | None = None,
    no_data: float | None = None,
    use_channels: str | None = None,
    model: Any = None,
) -> MaskSource:
    """Open images with masks by name.

    Args:
        name: A folder with `images` and `masks` (or `labels`, `annotations`) in it, or one in which each image has a
            mask beside it (`a.jpg`, `a_mask.png`); `FILE.csv` or `FILE.parquet` with a column of masks; shards with
            `0001.mask.png` beside `0001.jpg`; `hf:NAME` with a column of masks; `camvid:FOLDER:train` (val, test);
            `ade20k:FOLDER:train` (val). Where images or masks are called otherwise, `image_field` and `mask_field` say
            so. `classes.txt`, a name per line, or a table of values or colours (`mask_values.txt`, `label_colors.txt`,
            `class_dict.csv`) beside them names the classes.
        in_chans: Channels the images are read as.
        class_names: Names of the classes, instead of those beside the images.
        settings: What the user says of the values of masks; default: they are recognised.
        coding: How masks are read, as settled on another source, instead.
        include: Globs of the images to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of images to leave out; their masks go with them.
        image_field: What holds the images, see `patchloom.base.source_options`.
        mask_field: What holds the masks.
        value_range: What stored values of images become 0 and 1.
        no_data: Value that means that nothing is known of a pixel.
        use_channels: Numbers of the channels taken of each image.
        model: Encoder whose training images say how these are read, where the options do not.

    Raises:
        UsageError: There is no such source, it has no masks, or it cannot be read so.
    """
    asked = {"value_range": value_range, "no_data": no_data, "use_channels": use_channels}
    how = Reading.of(remembered(model) | {option: value for option, value in asked.items() if value is not None})
    read: dict[str, Any] = {"in_chans": in_chans, "settings": settings, "coding": coding}
    chosen = {"include": include, "exclude": exclude}
    fields = {"image_field": image_field, "mask_field": mask_field}
    given = {option: value for option, value in (chosen | fields).items() if value is not None}
    word, _, rest = name.partition(":")
    if word in ("camvid", "ade20k") and rest:
        published = _camvid if word == "camvid" else _ade20k
        refuse_untaken(published, name, given)
        folder, split = _split_of(rest, {"camvid": ("train", "val", "test"), "ade20k": ("train", "val")}[word])
        return how.given_to(published(name, folder, split, read, include, exclude))
    files, places = _opened(name, word, rest, given)
    if class_names is None:
        for place in places:
            if (place / "classes.txt").is_file():
                lines = (place / "classes.txt").read_text(encoding="utf-8").splitlines()
                class_names = [line.strip() for line in lines if line.strip()]
                break
    tables = [place / file for place in places for file in TABLE_FILES if (place / file).is_file()]
    table = tables[0] if tables and class_names is None else None
    return how.given_to(MaskSource(name, files, class_names=class_names, table=table, **read))


def refuse_unmasked(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of sources that mean nothing where images have masks.

    Raises:
        UsageError: Names the option, and what holds the masks.
    """
    for option, what in (
        ("label_field", "labels of whole images"),
        ("caption_field", "captions"),
        ("missing", "labels"),
    ):
        if option in options:
            raise UsageError(
                f"{option} is {options[option]!r}, which is about {what}, and here the classes of pixels are learnt "
                f"from masks; leave it out, and name what holds the masks by mask_field where they are not found"
            )
    refuse_untaken(open_segmentation, name, options)


def _opened(name: str, word: str, rest: str, given: dict[str, Any]) -> tuple[MaskedFiles, list[Path]]:
    """Return what a name stands for, and the folders in which files that name the classes may lie."""
    if word == "hf" and rest:
        refuse_untaken(HuggingFaceSource, name, given)
        dataset, _, split = rest.partition(":")
        return HubMasks(HuggingFaceSource(dataset, split or "train", **given)), []
    if is_label_file(name):
        table = LabelFileSource(name, labelled=False, **given)
        return TableMasks(table), [table.root, table.root.parent]
    if is_shards(name):
        refuse_untaken(ShardSource, name, given)
        shards = ShardSource(name, **given)
        return ShardMasks(shards), [shards.shards[0].parent]
    if (word in OPENERS or word in ("atari", "frames")) and rest:
        raise UsageError(
            f"{name} are no images with masks; give a folder with images/ and masks/, or a table or shards with masks"
        )
    root = existing(name)
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {name!r} of images and masks, nor a source of that name "
            f"(FILE.csv, shards, hf:NAME, camvid:FOLDER:SPLIT, ade20k:FOLDER:SPLIT)"
        )
    masks = next((root / folder for folder in MASK_FOLDERS if (root / folder).is_dir()), None)
    if given.keys().isdisjoint(("image_field", "mask_field")) and (root / "images").is_dir() and masks is not None:
        return FolderMasks(root / "images", masks, **given), [root, root.parent]
    if "mask_field" not in given:
        if (ending := ending_beside(file for file, _, _ in list_images(root))) is None:
            raise UsageError(
                f"{name} must hold a folder images and a folder masks (or {', '.join(MASK_FOLDERS[1:])}), or a mask "
                f"beside each image (a.jpg, a_mask.png); --mask_field says what masks are called otherwise (_seg, seg/)"
            )
        given = {**given, "mask_field": ending}
    return FolderMasks(root, root, **given), [root, root.parent]


def _is_binary(coding: MaskCoding) -> bool:
    """Return whether masks are black and white as they are stored: 0 is the first of two classes, 255 the other."""
    if len(coding.names) != 2 or coding.form not in ("values", "shades"):
        return False
    try:
        return coding.decode(np.array([0, 255], np.uint8)).tolist() == [0, 1]
    except UnknownValueError:
        return False


def colours(count: int) -> list[tuple[int, int, int]]:
    """Return that many colours, (R, G, B) each: neighbours in number lie far apart on the circle of hues."""
    found = []
    for number in range(count):
        # The golden ratio spreads any number of hues; brightness tells rounds apart.
        hue, round_ = (number * 0.618034) % 1.0, number // 12
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (round_ % 2), 0.95 - 0.25 * (round_ % 3))
        found.append((round(red * 255), round(green * 255), round(blue * 255)))
    return found


def _stored_size(file: Path | bytes) -> tuple[int, ...]:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return image.size


def _wrong_size(file: str, mask: tuple[int, ...], image: tuple[int, ...]) -> UsageError:
    sizes = [f"{size[0]}x{size[1]}" for size in (mask, image)]
    return UsageError(f"the mask {file} is {sizes[0]} and its image {sizes[1]}; they must be of one size")


def _camvid(
    name: str, root: Path, split: str, read: dict[str, Any], include: str | None, exclude: str | None
) -> MaskSource:
    """CamVid, SegNet's split: 11 classes, 11 is void; `train` + `trainannot`, or `train/images` + `train/labels`."""
    nested = root / split / "images", root / split / "labels"
    flat = root / split, root / f"{split}annot"
    images, masks = next((pair for pair in (nested, flat) if all(folder.is_dir() for folder in pair)), flat)
    if not masks.is_dir():
        raise UsageError(f"no CamVid in {root}: looked for {split}/images with {split}/labels, and for {split}annot")
    return MaskSource(
        name,
        FolderMasks(images, masks, include, exclude),
        class_names=list(CAMVID),
        layout=((len(CAMVID), IGNORED), 0),
        palette=list(CAMVID.values()),
        **read,
    )


def _ade20k(
    name: str, root: Path, split: str, read: dict[str, Any], include: str | None, exclude: str | None
) -> MaskSource:
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
    files = FolderMasks(images, masks, include, exclude)
    return MaskSource(name, files, class_names=names, layout=((IGNORED,), 1), **read)


def _split_of(rest: str, known: tuple[str, ...]) -> tuple[Path, str]:
    folder, _, split = rest.rpartition(":")
    if not folder:  # no split named
        return existing(rest), "train"
    if split not in known:
        raise unknown_name("split", split, known)
    return existing(folder), split
