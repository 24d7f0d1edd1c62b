"""Images of good parts to learn from, and of good and defect ones to measure on, with masks of the defects.

Folders as data sets of this kind have them: MVTec AD and BTech (`train/good`, `test/KIND`, `ground_truth/KIND`), VisA
(a table of splits), a folder per kind of defect beside one of good parts, images with masks of which those of good ones
are empty (KolektorSDD), or nothing but good parts; and shards, whose classes or masks say which are good.

>>> sets = open_defects("data/bottle")  # doctest: +SKIP
>>> len(sets.good), sets.test.kinds[:2]  # doctest: +SKIP
(209, ['broken_large', 'broken_large'])
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from patchloom.base.source_options import words
from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.defect_masks import ending_of_masks, find_masks, masks_beside, read_defect, suffix_of_masks
from patchloom.data.defect_shards import PackedMask, defect_of, read_defect_shards
from patchloom.data.reading import reading_options
from patchloom.data.sample import Sample
from patchloom.data.shards import IndexedShards, is_shards
from patchloom.data.subset import SubsetSource
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.io import existing, printable

GOOD = "good,ok,normal"
GOOD_CLASS, DEFECT_CLASS = 0, 1
MOST_LOOKED_AT = 500
EMBEDDED = ("photos", "digits")
"""Words that mean embedded sets; ./photos is a folder."""


class DefectSource(Source):
    """Images that are good or have a defect, and where it is.

    A sample has `mask` ((H, W) uint8, 1 on the defect) where masks are known; that of a good image is empty.

    Args:
        name: The source as the user named it.
        images: The images.
        labels: (n,) 0 for good, 1 for a defect.
        kinds: What kind of defect each has; `good` for none.
        masks: File of each defect's mask; None where no masks are known at all.

    Attributes:
        kinds: As given.
        has_masks: Whether masks are known.

    Raises:
        UsageError: A mask of another size than its image.
    """

    class_names: list[str]
    labels: np.ndarray

    def __init__(
        self,
        name: str,
        images: Source,
        labels: Sequence[int],
        kinds: Sequence[str],
        masks: Sequence[Path | PackedMask | None] | None = None,
    ) -> None:
        self.name = printable(name)
        self.images = images
        self.class_names = ["good", "defect"]
        self.labels = np.asarray(labels, dtype=np.int64)
        self.kinds = list(kinds)
        self.masks = None if masks is None else list(masks)
        self.in_chans, self.values, self.channels = images.in_chans, images.values, images.channels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        """Whether masks are known."""
        return self.masks is not None

    def key(self, index: int) -> str:
        """Return the name of image number `index`."""
        return self.images.key(index)

    def read(self, index: int) -> Sample:
        """Return image number `index`, with its mask where masks are known.

        Raises:
            UnreadableImageError: One of the two files cannot be decoded.
            UsageError: The mask is of another size than its image.
        """
        sample = replace(self.images.read(index), label=int(self.labels[index]))
        if self.masks is None:
            return sample
        size = (int(sample.value.shape[-2]), int(sample.value.shape[-1]))
        file = self.masks[index]
        mask = torch.zeros(size, dtype=torch.uint8) if file is None else defect_of(file, sample.key)
        if tuple(mask.shape) != size:
            raise UsageError(
                f"the mask {file} is {mask.shape[1]}x{mask.shape[0]} and its image {size[1]}x{size[0]}; they must be "
                f"of one size"
            )
        return replace(sample, named={**sample.named, "mask": mask})

    def part(self, chosen: np.ndarray) -> DefectSource:
        """Return the images of given numbers."""
        masks = None if self.masks is None else [self.masks[number] for number in chosen]
        kinds = [self.kinds[number] for number in chosen]
        return DefectSource(self.name, SubsetSource(self.images, chosen), self.labels[chosen].tolist(), kinds, masks)

    def fingerprint(self) -> str:
        """Return a short hash of images, labels and masks."""
        digest = hashlib.sha256(self.images.fingerprint().encode() + self.labels.tobytes())
        for file in self.masks or ():
            if isinstance(file, Path):  # shards are hashed with the images
                status = file.stat()
                digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class DefectSets:
    """What there is to learn from and to measure on."""

    good: Source
    """Images without defects."""
    test: DefectSource | None
    """Images to measure on; None where there are none."""


def open_defects(
    name: str,
    *,
    test: str | None = None,
    masks: str | None = None,
    good: str = GOOD,
    test_share: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> DefectSets:
    """Open images of good parts, and those to measure on.

    Args:
        name: A folder of one of the layouts above (`mvtec:FOLDER:CATEGORY` and `visa:FOLDER:CATEGORY` name a category
            of it), or any source of good images alone.
        test: Folder to measure on instead: a sub-folder of good images, one of each kind of defect.
        masks: Folder of the masks of what is measured on; default: `ground_truth` beside it, or files of the image's
            name and another suffix beside the image.
        good: Names of sub-folders of good images, separated by commas, in capitals or not.
        test_share: Share of the good images that is held out to measure on, where a folder per kind has no split.
        seed: Seed of that split.
        **options: For the images, see `open_source`.

    Raises:
        UsageError: There is no such source, no good image in it, one with a defect among them, or masks that do not
            belong to the images.
    """
    words_of_good = {word.lower() for word in words(good)}
    word, _, rest = name.partition(":")
    if word == "visa" and rest:
        sets = _visa(name, *_category(rest), options)
    else:
        root = existing("/".join(map(str, _category(rest))) if word == "mvtec" and rest else name)
        sets = _opened(name, root, test, masks, words_of_good, test_share, seed, options)
    if test is None:
        return sets
    read = {**options, **reading_options(sets.good)}
    return DefectSets(sets.good, open_tested(test, masks=masks, good=good, **read))


def open_tested(
    name: str, *, masks: str | None = None, good: str = GOOD, masked: bool = True, **options: Any
) -> DefectSource:
    """Open images to measure on: good ones in a sub-folder of one of the names of `good`, defects in the others.

    Without such a sub-folder every image has a defect.

    Args:
        name: The folder.
        masks: Folder of masks, as for `open_defects`.
        good: Names of sub-folders of good images.
        masked: Look for masks; not where images alone are judged.
        **options: For the images, see `open_source`.

    Raises:
        UsageError: No such folder, or masks that do not belong to the images.
    """
    if is_shards(name):
        return _of_shards(name, masks, {word.lower() for word in words(good)}, options)
    root = existing(name)
    if not root.is_dir():
        raise UsageError(f"there is no folder {name!r} of images to measure on")
    images = open_without_masks(root, options)
    words_of_good = {word.lower() for word in words(good)}
    tops = [_top(images.key(index)) for index in range(len(images))]
    labels = [GOOD_CLASS if top.lower() in words_of_good else DEFECT_CLASS for top in tops]
    kinds = ["good" if label == GOOD_CLASS else top or "defect" for top, label in zip(tops, labels, strict=True)]
    return (
        _with_masks(name, images, labels, kinds, root, masks) if masked else DefectSource(name, images, labels, kinds)
    )


def _opened(
    name: str,
    root: Path,
    test: str | None,
    masks: str | None,
    good: set[str],
    test_share: float,
    seed: int,
    options: dict[str, Any],
) -> DefectSets:
    if is_shards(name):
        everything = _of_shards(name, masks, good, options)
        is_good = everything.labels == GOOD_CLASS
        learnt = SubsetSource(everything.images, np.flatnonzero(is_good))
        if is_good.all() or test is not None:
            return DefectSets(learnt, None)
        return _held_out(name, everything, everything.images, test_share, seed)
    if not root.is_dir() or name.partition(":")[0] in EMBEDDED:
        if name.startswith("mvtec:"):
            raise UsageError(f"there is no folder {root} ({name}){_categories(root.parent)}")
        images = open_source(name, labels="none", **options)
        if isinstance(images, StreamSource):
            raise UsageError(f"{name} is a stream; anomaly takes images by number: a folder, or an embedded set")
        return DefectSets(images, None)
    if (root / "train").is_dir():
        return _mvtec(name, root, test, masks, good, options)
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    of_good = [folder for folder in folders if folder.lower() in good]
    if name.startswith("mvtec:"):
        raise UsageError(f"{root} is no category of MVTec AD: it has no folder train{_categories(root)}")
    images = open_without_masks(root, options)
    keys = [images.key(index) for index in range(len(images))]
    if of_good:
        is_good = np.array([_top(key).lower() in good for key in keys])
        kinds = ["good" if one else _top(key) or "defect" for key, one in zip(keys, is_good, strict=True)]
    else:
        is_good = np.array(_without_defect(keys, images, root, None if test is not None else masks))
        kinds = ["good" if one else "defect" for one in is_good]
        if len(folders) > 1 and is_good.all():
            notice(
                f"{printable(name)}: all {len(images)} images in its {len(folders)} sub-folders are taken for good; "
                f"where one alone is, --good names it"
            )
    if is_good.all():
        return DefectSets(_good_alone(name, images, root), None)
    if test is not None:
        return DefectSets(_good_alone(name, SubsetSource(images, np.flatnonzero(is_good)), root), None)
    everything = _with_masks(name, images, (~is_good).astype(int).tolist(), kinds, root, masks)
    sets = _held_out(name, everything, images, test_share, seed)
    return DefectSets(_good_alone(name, sets.good, root), sets.test)


def _held_out(name: str, everything: DefectSource, images: Source, test_share: float, seed: int) -> DefectSets:
    """Return some of the good images to learn from, and the others with the defects to measure on."""
    is_good = everything.labels == GOOD_CLASS
    numbers = np.flatnonzero(is_good)
    count = round(test_share * len(numbers))
    if not 0 < count < len(numbers):
        raise UsageError(
            f"{printable(name)} has {len(numbers)} good images, of which test_share={test_share:g} holds out {count}; "
            f"some have to be learnt from and some measured on"
        )
    held = np.sort(np.random.default_rng(seed).permutation(numbers)[:count])
    learnt = np.setdiff1d(numbers, held)
    chosen = np.sort(np.concatenate([held, np.flatnonzero(~is_good)]))
    notice(
        f"{printable(name)}: {len(learnt)} good images to learn from; measured on {count} other good ones and on "
        f"{int((~is_good).sum())} with defects"
    )
    return DefectSets(SubsetSource(images, learnt), everything.part(chosen))


def _of_shards(name: str, masks: str | None, good: set[str], options: dict[str, Any]) -> DefectSource:
    """Return all images of shards, see `read_defect_shards`.

    Raises:
        UsageError: A folder of masks is named, or the shards cannot be used.
    """
    if masks is not None:
        raise UsageError(f"masks is {masks}, and masks of shards lie in them (0001.mask.png); leave it out")
    images = open_source(name, by_index=True, **options)
    if not isinstance(images, IndexedShards):
        raise UsageError(f"images of {name} are needed by number, and compressed shards give none; unpack them to .tar")
    return DefectSource(name, images, *read_defect_shards(images, good))


def _without_defect(keys: Sequence[str], images: Source, root: Path, masks: str | None) -> list[bool]:
    """Return which images have no mask, or one that shows nothing; all, where there are no masks."""
    files = masks_beside(keys, root, images) if masks is None else find_masks(keys, existing(masks))
    return [file is None or not bool(read_defect(file, key).any()) for key, file in zip(keys, files, strict=True)]


def _mvtec(
    name: str, root: Path, test: str | None, masks: str | None, good: set[str], options: dict[str, Any]
) -> DefectSets:
    """MVTec AD and BTech: train/good, test/KIND, ground_truth/KIND."""
    found = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
    of_good = [folder for folder in found if folder.lower() in good]
    if not of_good:
        raise UsageError(f"{root / 'train'} has no folder of good images ({', '.join(sorted(good))}); --good names it")
    if strange := [folder for folder in found if folder not in of_good]:
        notice(
            f"{root / 'train'}: {', '.join(map(printable, strange))} are no names of good images and not learnt from"
        )
    learnt = open_without_masks(root / "train" / of_good[0], options)
    truth = existing(masks) if masks is not None else root / "ground_truth"
    if truth.is_dir():
        keys = [f"{of_good[0]}/{learnt.key(index)}" for index in range(len(learnt))]
        files = find_masks(keys, truth, alone=False)
        labels, kinds = [GOOD_CLASS] * len(keys), ["good"] * len(keys)
        _refuse_defects_among_good(DefectSource(name, learnt, labels, kinds, files))
    if test is not None or not (root / "test").is_dir():
        return DefectSets(learnt, None)
    read = {**options, **reading_options(learnt)}
    given = str(truth) if truth.is_dir() else None
    tested = open_tested(str(root / "test"), masks=given, good=",".join(sorted(good)), **read)
    tested.name = printable(f"{name}/test")
    return DefectSets(learnt, tested)


def _visa(name: str, root: Path, category: str, options: dict[str, Any]) -> DefectSets:
    """VisA: a table of object, split, label, image and mask."""
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise UsageError(f"{name} is no VisA: there is no {table}")
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["object"] == category]
    if not rows:
        raise UsageError(f"{table} knows no object {category!r}")
    images = open_without_masks(root / category, options)
    numbers = {f"{category}/{images.key(index)}": index for index in range(len(images))}
    if missing := [row["image"] for row in rows if row["image"] not in numbers]:
        raise UsageError(f"{root / missing[0]} (and {len(missing) - 1} more) of {table} is not there")
    learnt = [numbers[row["image"]] for row in rows if row["split"] == "train" and row["label"] == "normal"]
    tested = [row for row in rows if row["split"] == "test"]
    labels = [GOOD_CLASS if row["label"] == "normal" else DEFECT_CLASS for row in tested]
    masks = [root / row["mask"] if row["mask"] else None for row in tested]
    kinds = ["good" if label == GOOD_CLASS else "defect" for label in labels]
    chosen = SubsetSource(images, np.array([numbers[row["image"]] for row in tested]))
    return DefectSets(SubsetSource(images, np.array(learnt)), DefectSource(name, chosen, labels, kinds, masks))


def _with_masks(
    name: str,
    images: Source,
    labels: Sequence[int],
    kinds: Sequence[str],
    root: Path,
    masks: str | None,
) -> DefectSource:
    """Return images with the masks there are.

    Raises:
        UsageError: Some defects have a mask and some have none, or a mask is of another size.
    """
    bad = [number for number, label in enumerate(labels) if label == DEFECT_CLASS]
    keys = [images.key(number) for number in bad]
    if masks is not None:
        folder = existing(masks)
        if not folder.is_dir():
            raise UsageError(f"there is no folder {masks!r} of masks")
        found = find_masks(keys, folder)
    elif (root.parent / "ground_truth").is_dir():
        folder = root.parent / "ground_truth"
        found = find_masks(keys, folder)
    else:
        folder, found = root, masks_beside(keys, root, images)
    lacking = [key for key, file in zip(keys, found, strict=True) if file is None]
    if bad and len(lacking) == len(bad):
        if masks is not None:
            raise UsageError(f"no mask in {folder} belongs to an image of {printable(name)} (such as {keys[0]})")
        return DefectSource(name, images, labels, kinds)
    if lacking:
        raise UsageError(
            f"the image {lacking[0]} (and {len(lacking) - 1} more of {len(bad)} with defects) has no mask in {folder}"
        )
    files: list[Path | None] = [None] * len(images)
    for number, file in zip(bad, found, strict=True):
        files[number] = file
    source = DefectSource(name, images, labels, kinds, files)
    _check_sizes(source)
    return source


def _check_sizes(source: DefectSource) -> None:
    """Refuse a mask of another size than its image before anything is trained, as far as headers tell."""
    root = getattr(source.images, "root", None) or getattr(getattr(source.images, "source", None), "root", None)
    if root is None or source.masks is None:
        return
    known = [number for number, file in enumerate(source.masks) if isinstance(file, Path)]
    for place in sorted({round(x) for x in np.linspace(0, len(known) - 1, min(len(known), MOST_LOOKED_AT))}):
        number = known[place]
        file = cast(Path, source.masks[number])
        try:
            with Image.open(file) as mask, Image.open(Path(root) / source.key(number)) as image:
                sizes = mask.size, image.size
        except (OSError, ValueError, SyntaxError):  # no file Pillow opens, or a name that is not UTF-8: reading tells
            continue
        if sorted(sizes[0]) != sorted(sizes[1]):  # an image may be stored on its side
            told = [f"{size[0]}x{size[1]}" for size in sizes]
            raise UsageError(f"the mask {file} is {told[0]} and its image {told[1]}; they must be of one size")


def _good_alone(name: str, images: Source, root: Path) -> Source:
    """Return images that are all said to be good, unless a mask beside one shows a defect."""
    keys = [images.key(index) for index in range(len(images))]
    files = masks_beside(keys, root, images)
    _refuse_defects_among_good(DefectSource(name, images, [GOOD_CLASS] * len(keys), ["good"] * len(keys), files))
    return images


def _refuse_defects_among_good(source: DefectSource) -> None:
    """Refuse images to learn from whose mask shows a defect."""
    for number, file in enumerate(source.masks or ()):
        if file is not None and defect_of(file, source.key(number)).any():
            raise UsageError(
                f"{source.key(number)} is to be learnt from as good, and its mask {file} shows a defect; take it out"
            )


def open_without_masks(root: Path, options: dict[str, Any]) -> Source:
    """Return the images of a folder without the masks that lie among them, by their names or as one of each pair.

    Args:
        root: The folder.
        options: For the images, see `open_source`; what `include` or `exclude` name is taken as it is.
    """
    if "include" not in options and "exclude" not in options:
        if (ending := ending_of_masks(root)) is not None:
            notice(f"{printable(root)}: files *{ending}.* are masks of the images of the same name")
            options = {**options, "exclude": f"*{ending}.*"}
        elif (suffix := suffix_of_masks(root)) is not None:
            notice(f"{printable(root)}: files *{suffix} are masks of the images of the same name")
            options = {**options, "exclude": f"*{suffix},*{suffix.upper()}"}
    source = open_source(str(root), labels="none", **options)
    assert isinstance(source, Source)
    return source


def _category(rest: str) -> tuple[Path, str]:
    folder, _, category = rest.rpartition(":")
    if not folder:
        raise UsageError(f"{rest!r} names no category; write FOLDER:CATEGORY")
    return existing(folder), category


def _categories(root: Path) -> str:
    """Return the categories of MVTec AD in a folder, for an error."""
    found = sorted(entry.parent.name for entry in root.glob("*/train")) if root.is_dir() else []
    return f"; there are {', '.join(found[:20])}" if found else ""


def _top(key: str) -> str:
    return key.partition("/")[0] if "/" in key else ""
