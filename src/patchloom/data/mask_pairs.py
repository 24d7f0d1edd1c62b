"""Which masks belong to which image, by name: one each, or one for each class.

>>> road, tree = ("a_road.png", 1, 0), ("a_tree.png", 1, 0)
>>> pairs = paired([("a.jpg", 1, 0)], [road, tree], Path("images"), Path("masks"))
>>> [(part.name, part.file) for part in pairs[0].parts]
[('road', 'a_road.png'), ('tree', 'a_tree.png')]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from patchloom.data.fields import MASK_ENDINGS, file_rule, stem
from patchloom.data.folder import chosen_images
from patchloom.errors import UsageError
from patchloom.io import printable

ListedFile = tuple[str, int, int]
"""Path below the folder, size, time."""


class Part(NamedTuple):
    """A mask file, and the class it shows where each has a file of its own."""

    file: str
    name: str | None = None


class MaskedImage(NamedTuple):
    """An image and its masks."""

    image: str
    parts: tuple[Part, ...]


def list_images(folder: Path, include: str | None = None, exclude: str | None = None) -> list[ListedFile]:
    """Return the image files below a folder that globs choose, in order.

    Raises:
        UsageError: No such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    files = chosen_images(folder, include, exclude)
    if not files:
        raise UsageError(f"no image in {folder} or below")
    return files


def paired(
    images: Sequence[ListedFile],
    masks: Sequence[ListedFile],
    image_root: Path,
    mask_root: Path,
    left_out: Collection[str] = (),
) -> list[MaskedImage]:
    """Return images with their masks, in the order of the images' names.

    A mask has the image's path but for its suffix, and may end in `_mask` or `_label`, or in another word that all of
    them end in. Masks with one file per class lie in a sub-folder per class (`road/a.png`) or end in the class
    (`a_road.png`); an image may lack some, which then are nowhere on it.

    Args:
        images: Images.
        masks: Masks.
        image_root: Folder of the images.
        mask_root: Folder of the masks.
        left_out: Images that are not to be used; their masks go with them.

    Raises:
        UsageError: An image without mask, a mask without image, or two of a name.
    """
    if left_out:
        every = paired([*images, *((name, 0, 0) for name in left_out)], masks, image_root, mask_root)
        return [pair for pair in every if pair.image not in left_out]
    by_stem = _by_stem(images, image_root)
    stems = [_stem(file[0]) for file in masks]
    if set(stems) != set(by_stem):
        for place in (_by_folder, _by_ending):
            if (parts := place(by_stem, masks)) is not None:
                return parts
    mask_by_stem = _by_stem(masks, mask_root)
    for have, lack, kind, other, root in (
        (by_stem, mask_by_stem, "image", "mask", mask_root),
        (mask_by_stem, by_stem, "mask", "image", image_root),
    ):
        lone = [file for stem, file in have.items() if stem not in lack]
        if lone:
            more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
            raise UsageError(f"the {kind} {printable(lone[0])}{more} has no {other} of that name in {root}")
    return [MaskedImage(by_stem[stem], (Part(mask_by_stem[stem]),)) for stem in sorted(by_stem)]


def beside(
    files: Sequence[ListedFile], root: Path, image_field: str | None, mask_field: str, left_out: Collection[str] = ()
) -> list[MaskedImage]:
    """Return images with their masks of one folder, where what they are called tells them apart.

    Args:
        files: Images and masks.
        root: Their folder.
        image_field: What tells images, see `fields.file_rule`; default: all that are no masks.
        mask_field: What tells masks.
        left_out: Images that are not to be used; their masks go with them.

    Raises:
        UsageError: No mask, an image without mask, a mask without image, or two of a name.
    """
    is_mask, is_image = file_rule(mask_field), stem if image_field is None else file_rule(image_field)
    masks: dict[str, str] = {}
    images: dict[str, str] = {}
    for name, _, _ in files:
        key = is_mask(name)
        found, key = (masks, key) if key is not None else (images, is_image(name))
        if key is None:
            continue
        if key in found:
            raise UsageError(
                f"{root} holds two files for {printable(key)}: {printable(found[key])} and {printable(name)}"
            )
        found[key] = name
    if not masks or not images:
        option, asked = ("mask_field", mask_field) if not masks else ("image_field", image_field)
        raise UsageError(
            f"{option} is {asked}, and no file in {root} is called so (it has {printable(files[0][0])}); give an "
            f"ending of names (_mask) or a folder (masks/)"
        )
    for have, lack, kind, other in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
        if lone := [file for key, file in have.items() if key not in lack]:
            more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
            raise UsageError(f"the {kind} {printable(lone[0])}{more} has no {other} of that name in {root}")
    return [MaskedImage(images[key], (Part(masks[key]),)) for key in sorted(images) if images[key] not in left_out]


def _by_folder(images: dict[str, str], masks: Sequence[ListedFile]) -> list[MaskedImage] | None:
    """Return masks in a sub-folder per class, None where that is not how they lie."""
    parts: dict[str, list[Part]] = {stem: [] for stem in images}
    for name, _, _ in masks:
        folder, _, rest = name.partition("/")
        stem = _stem(rest)
        if stem not in images:
            return None
        parts[stem].append(Part(name, folder))
    return _complete(images, parts)


def _by_ending(images: dict[str, str], masks: Sequence[ListedFile]) -> list[MaskedImage] | None:
    """Return masks that end in their class, None where that is not how they are named."""
    parts: dict[str, list[Part]] = {stem: [] for stem in images}
    for name, _, _ in masks:
        whole = name.rpartition(".")[0]
        cuts = [place for place in range(len(whole) - 1, 0, -1) if whole[place] in "_-. "]
        cut = next((place for place in cuts if whole[:place] in images), None)
        if cut is None:
            return None
        parts[whole[:cut]].append(Part(name, whole[cut + 1 :]))
    return _complete(images, parts)


def _complete(images: dict[str, str], found: dict[str, list[Part]]) -> list[MaskedImage] | None:
    """Return the pairs if every image has a mask and none two of a class; without classes where there is but one."""
    classes = {part.name for parts in found.values() for part in parts}
    for parts in found.values():
        if not parts or len({part.name for part in parts}) < len(parts):
            return None
    if len(classes) == 1:
        return [MaskedImage(images[stem], (Part(found[stem][0].file),)) for stem in sorted(images)]
    return [
        MaskedImage(images[stem], tuple(sorted(found[stem], key=lambda p: p.name or ""))) for stem in sorted(images)
    ]


def _stem(name: str) -> str:
    stem = name.rpartition(".")[0]
    for ending in MASK_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def _by_stem(files: Sequence[ListedFile], folder: Path) -> dict[str, str]:
    by_stem: dict[str, str] = {}
    for name, _, _ in files:
        stem = _stem(name)
        if stem in by_stem:
            raise UsageError(
                f"{folder} holds two files for {printable(stem)}: {printable(by_stem[stem])} and {printable(name)}"
            )
        by_stem[stem] = name
    return by_stem
