"""Where images and their masks are stored: two folders, files beside one another, a table, shards, a data set.

Each is images by number and the encoded masks that belong to them. What the values of masks mean is none of its
business, see `segmentation`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from patchloom.data.base import UnreadableImageError
from patchloom.data.fields import MASK, missing_of
from patchloom.data.hub import HuggingFaceSource
from patchloom.data.labels import LabelFileSource
from patchloom.data.listed import located
from patchloom.data.mask_pairs import MaskedImage, Part, beside, list_images, paired
from patchloom.data.shard_files import Role
from patchloom.data.shards import IndexedShards, ShardSource
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.io import printable

Encoded = Path | bytes
ALONE = (Part("", None),)


class ListedMask(NamedTuple):
    """A mask as it is listed before any is read."""

    stamp: object
    """What changes when the file does."""
    data: Path | Callable[[], Encoded]
    name: str


class MaskedFiles(ABC):
    """Images by number, and the masks that belong to each.

    Attributes:
        where: What tells this place from others, for what is kept about its masks.
        stamps: What changes when an image does, one for each.
    """

    where: str
    stamps: Sequence[object]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images that have a mask."""

    @abstractmethod
    def key(self, index: int) -> str:
        """Return the name of image number `index`."""

    @abstractmethod
    def image(self, index: int) -> Encoded:
        """Return image number `index` as it is stored."""

    @abstractmethod
    def mask(self, index: int, part: int = 0) -> Encoded:
        """Return a mask of image number `index` as it is stored.

        Raises:
            UnreadableImageError: It is not there.
        """

    @abstractmethod
    def mask_name(self, index: int, part: int = 0) -> str:
        """Return the name of a mask."""

    def parts(self, index: int) -> tuple[Part, ...]:
        """Return the masks of image number `index`: one, or one for each class."""
        return ALONE

    def masks(self) -> list[ListedMask]:
        """Return all masks, in their order."""
        return [ListedMask(index, partial(self.mask, index), self.mask_name(index)) for index in range(len(self))]

    def place(self, name: str) -> str:
        """Return where a person finds an image or a mask of that name."""
        return name


class FolderMasks(MaskedFiles):
    """Images and masks from two folders, paired by name, or from one in which masks are named by a rule.

    Args:
        images: Folder of images.
        masks: Folder of masks.
        include: Globs of the images to take; default: all.
        exclude: Globs of images to leave out; their masks go with them.
        image_field: What tells images from other files where both lie in one folder, see `fields.file_rule`.
        mask_field: What tells masks; without it they are paired by name.

    Raises:
        UsageError: No such folder, nothing in it, a mask without image or an image without mask.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        include: str | None = None,
        exclude: str | None = None,
        image_field: str | None = None,
        mask_field: str | None = None,
    ) -> None:
        self.images, self.root = Path(images), Path(masks)
        chosen, every = list_images(self.images, include, exclude), list_images(self.images)
        left_out = frozenset(file[0] for file in every) - {file[0] for file in chosen}
        listed = list_images(self.root)
        if mask_field is None:
            self.pairs: list[MaskedImage] = paired(chosen, listed, self.images, self.root, left_out)
        else:
            self.pairs = beside(every, self.images, image_field, mask_field, left_out)
        used = {part.file for pair in self.pairs for part in pair.parts}
        images_used = {pair.image for pair in self.pairs}
        self.listed = [file for file in listed if file[0] in used]
        self.stamps = [file for file in chosen if file[0] in images_used]
        self.where = str(self.root.resolve())

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def key(self, index: int) -> str:
        """Return the path of an image below its folder."""
        return printable(self.pairs[index].image)

    def image(self, index: int) -> Path:
        """Return the file of an image."""
        return self.images / self.pairs[index].image

    def parts(self, index: int) -> tuple[Part, ...]:
        """Return the mask files of an image."""
        return self.pairs[index].parts

    def mask(self, index: int, part: int = 0) -> Path:
        """Return the file of a mask."""
        return self.root / self.pairs[index].parts[part].file

    def mask_name(self, index: int, part: int = 0) -> str:
        """Return the path of a mask below its folder."""
        return printable(self.pairs[index].parts[part].file)

    def masks(self) -> list[ListedMask]:
        """Return all masks, in the order of their paths."""
        return [ListedMask(file, self.root / file[0], printable(file[0])) for file in self.listed]

    def place(self, name: str) -> str:
        """Return the path of a mask."""
        return str(self.root / name)


class TableMasks(MaskedFiles):
    """Images and masks by the columns of a table; images without a mask are left out, which is said.

    Args:
        table: The images.

    Raises:
        UsageError: No column of masks, masks that are not there, or no image with one.
    """

    def __init__(self, table: LabelFileSource) -> None:
        named = table.beside.get(MASK.name)
        if named is None:
            raise UsageError(
                f"{table.name} has no column of masks (its columns: {', '.join(table.columns)}); --mask_field names "
                f"one that is called otherwise"
            )
        self.root = table.root
        kept = [index for index, file in enumerate(named) if file.strip()]
        lacking = [table.key(index) for index, file in enumerate(named) if not file.strip()]
        _say_lacking(table.name, lacking, len(table))
        self.files = [table.files[index] for index in kept]
        self.mask_files, stamps = located(table.name, table.root, [named[index] for index in kept], "masks")
        self.sizes = stamps.tolist()
        self.where = f"{table.root.resolve()}"
        self.stamps = [table.fingerprint(), *kept]

    def __len__(self) -> int:
        """Return the number of images that have a mask."""
        return len(self.files)

    def key(self, index: int) -> str:
        """Return the path of an image below the folder of the table."""
        return printable(self.files[index])

    def image(self, index: int) -> Path:
        """Return the file of an image."""
        return self.root / self.files[index]

    def mask(self, index: int, part: int = 0) -> Path:
        """Return the file of a mask."""
        return self.root / self.mask_files[index]

    def mask_name(self, index: int, part: int = 0) -> str:
        """Return the path of a mask below the folder of the table."""
        return printable(self.mask_files[index])

    def masks(self) -> list[ListedMask]:
        """Return all masks, in the order of the table."""
        files = zip(self.mask_files, self.sizes, strict=True)
        return [ListedMask((file, *stamp), self.root / file, printable(file)) for file, stamp in files]

    def place(self, name: str) -> str:
        """Return the path of a mask."""
        return str(self.root / name)


class ShardMasks(MaskedFiles):
    """Images and masks in shards; images without a mask are left out, which is said.

    Args:
        shards: The shards, none of them compressed.

    Raises:
        UsageError: A shard is compressed, or no image has a mask.
    """

    def __init__(self, shards: ShardSource) -> None:
        self.source: IndexedShards = shards.by_index()
        self.shards = shards
        names = shards.mask_names
        if names is None:
            raise UsageError(
                f"{shards.name} has no masks (its files and keys: {shards.fields_there()}); they are called "
                f"0001.mask.png beside 0001.jpg, or as --mask_field says"
            )
        self.kept = [index for index in range(len(names)) if names[index]]
        lacking = [index for index in range(len(names)) if not names[index]]
        _say_lacking(shards.name, [self.source.key(index) for index in lacking[:3]], len(names), len(lacking))
        self.where = f"{shards.name} {shards.fingerprint()}"
        self.stamps = [self.where, str(shards.roles)]

    def __len__(self) -> int:
        """Return the number of images that have a mask."""
        return len(self.kept)

    def key(self, index: int) -> str:
        """Return the name of an image; reads it."""
        return self.source.key(self.kept[index])

    def image(self, index: int) -> bytes:
        """Return an image as it is stored."""
        return self._content(index, "image")

    def mask(self, index: int, part: int = 0) -> bytes:
        """Return a mask as it is stored."""
        return self._content(index, "mask")

    def mask_name(self, index: int, part: int = 0) -> str:
        """Return the name of a mask, that of its shard before it."""
        assert self.shards.mask_names is not None
        number = self.kept[index]
        return printable(f"{self.shards.shard_name(number)}/{self.shards.mask_names[number]}")

    def _content(self, index: int, role: Role) -> bytes:
        shard, files = self.shards.files(self.kept[index], (role,))
        if role not in files:
            raise UnreadableImageError(self.mask_name(index), f"{shard} has changed since it was looked through")
        return files[role][1]


class HubMasks(MaskedFiles):
    """Images and masks in two columns of a data set.

    Args:
        source: The data set.

    Raises:
        UsageError: No column of masks.
    """

    def __init__(self, source: HuggingFaceSource) -> None:
        if source.mask_column is None:
            raise UsageError(
                f"{source.name} has no column of masks (its columns: {', '.join(source.table.features)}); "
                f"--mask_field names one that is called otherwise"
            )
        self.source, self.column = source, source.mask_column
        self.where = f"{source.name} {source.fingerprint()}"
        self.stamps = [self.where, source.column, self.column]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def key(self, index: int) -> str:
        """Return the number of an image as its name."""
        return self.source.key(index)

    def image(self, index: int) -> Encoded:
        """Return an image as it is stored."""
        return self.source.cell(index, self.source.column)

    def mask(self, index: int, part: int = 0) -> Encoded:
        """Return a mask as it is stored."""
        data = self.source.cell(index, self.column)
        if data == Path():
            raise UnreadableImageError(self.key(index), f"it has no mask in the column {self.column}")
        return data

    def mask_name(self, index: int, part: int = 0) -> str:
        """Return the number of an image, and the column."""
        return f"{self.key(index)}/{self.column}"


def _say_lacking(name: str, lacking: Sequence[str], total: int, count: int | None = None) -> None:
    count = len(lacking) if count is None else count
    if count == total:
        raise UsageError(f"no image of {name} has a mask")
    if count:
        notice(missing_of("mask", name, lacking, count, total))
