"""What belongs to an image and what it is called: one vocabulary for folders, tables, shards and data sets of the hub.

| field | columns, keys of .json | endings of files in shards |
| --- | --- | --- |
| image | file, filename, filepath, path, image, key; of clips video, clip | an image; a video |
| label, one class | label, class, grade, target | .cls, .label |
| labels, several | labels, or a column each | |
| mask | mask, seg, segmentation, annotation | .mask.png, .seg.png |
| caption | caption, text, title | .txt, .caption |
| split | split | |

Where a source calls a field otherwise, an option of the same name says so: `label_field`, `mask_field` …

>>> find(CAPTION, ["file", "Text"], None, "cats.csv")
'Text'
>>> find(LABEL, ["file", "lable"], "label", "cats.csv")
Traceback (most recent call last):
patchloom.errors.UsageError: label_field is label, and cats.csv has file, lable; did you mean lable?
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from patchloom.base.source_options import words
from patchloom.data.base import UnreadableImageError
from patchloom.errors import UsageError

MOST_NAMED = 20
MASK_ENDINGS = ("_mask", "_label", "_labelIds")
"""What names of masks end in, where they lie in a folder of their own."""
MASK_FOLDERS = ("masks", "labels", "annotations", "annots")
TEXT_SUFFIX = ".txt"


@dataclass(frozen=True)
class Field:
    """Something that belongs to an image."""

    name: str
    columns: tuple[str, ...]
    """What columns of tables and keys of .json files are called that hold it."""
    endings: tuple[str, ...] = ()
    """What a file in shards has after the stem: `cls` in `0001.cls`; of masks before the suffix, `0001.mask.png`."""


IMAGE = Field("image", ("file", "filename", "filepath", "path", "image", "key"))
CLIP = Field("image", (*IMAGE.columns, "video", "clip"))
"""Of tables of videos"""
LABEL = Field("label", ("label", "class", "grade", "target"), ("cls", "label"))
LABELS = Field("labels", ("labels",))
MASK = Field("mask", ("mask", "seg", "segmentation", "annotation"), ("mask", "seg"))
CAPTION = Field("caption", ("caption", "text", "title"), ("txt", "caption"))
SPLIT = Field("split", ("split",))


def find(field: Field, there: Iterable[str], asked: str | None, where: str) -> str | None:
    """Return what a source calls a field, or None where it has none and none was asked for.

    Args:
        field: The field.
        there: Names that the source has.
        asked: What the user says it is called.
        where: The source, for the error.

    Raises:
        UsageError: What was asked for is not there; names what is, and the nearest of it.
    """
    names = list(there)
    if asked is not None:
        if asked in names:
            return asked
        same = [name for name in names if name.lower() == asked.lower()]
        if len(same) == 1:
            return same[0]
        raise no_field(field, asked, names, where)
    return next((name for name in names if name.lower() in field.columns), None)


def find_several(field: Field, there: Sequence[str], asked: str | None, where: str) -> list[str] | None:
    """Return the names that an option lists, commas between them; None where it is not given.

    Raises:
        UsageError: One of them is not there.
    """
    if asked is None:
        return None
    if asked in there:  # a name may hold a comma
        return [asked]
    return [name for word in words(asked) if (name := find(field, there, word, where)) is not None]


def no_field(field: Field, asked: str, there: Iterable[str], where: str) -> UsageError:
    """Return the error for a field that a source does not have."""
    names = list(dict.fromkeys(there))
    near = get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    has = ", ".join(names[:MOST_NAMED]) + more if names else "nothing by a name"
    return UsageError(f"{field.name}_field is {asked}, and {where} has {has}{hint}")


def file_rule(text: str) -> Callable[[str], str | None]:
    """Return what tells the files of a field in a folder: the name of the image they belong to, None for other files.

    Args:
        text: `masks/`, a folder at any depth; or an ending of file names, with or without a suffix (`_mask`,
            `_mask.png`, `.png`).

    >>> rule = file_rule("_mask")
    >>> rule("a/1_mask.png"), rule("a/1.png")
    ('a/1', None)
    >>> file_rule("masks/")("a/masks/1.png")
    'a/1'
    """

    def stem_of(file: str) -> str | None:
        folder, slash, last = file.rpartition("/")
        if text.endswith("/"):
            inside = f"/{folder}{slash}"
            if f"/{text}" not in inside:
                return None
            return inside.replace(f"/{text}", "/", 1)[1:] + stem(last)
        whole = last if "." in text else stem(last)
        return f"{folder}{slash}{whole.removesuffix(text)}" if whole.endswith(text) and whole != text else None

    return stem_of


def stem(file: str) -> str:
    """Return a path without its last suffix."""
    head, dot, _ = file.rpartition(".")
    return head if dot and not head.endswith("/") and head else file


def ending_beside(files: Iterable[str]) -> str | None:
    """Return the ending of masks that lie beside their images, where all images have such a mask; else None.

    >>> ending_beside(["a.jpg", "a_mask.png"])
    '_mask'
    """
    stems = {stem(name) for name in files}
    for ending in (*MASK_ENDINGS, "_seg"):
        masks = {one for one in stems if one.endswith(ending) and one.removesuffix(ending) in stems}
        if masks and {one.removesuffix(ending) for one in masks} == stems - masks:
            return ending
    return None


def caption_text(raw: bytes | str, key: str) -> str:
    """Return a caption as text, without blanks around it.

    Raises:
        UnreadableImageError: It is not UTF-8; the image that it belongs to cannot be used with it.
    """
    try:
        # Tables are read so that names of files may be any bytes.
        data = raw if isinstance(raw, bytes) else raw.encode(errors="surrogateescape")
        return data.decode("utf-8-sig").strip()
    except UnicodeError as error:
        raise UnreadableImageError(key, "its caption is not UTF-8") from error


class Packed(Sequence[str]):
    """Names in one block of bytes: a million take some tens of megabytes, and handing them to workers costs nothing."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.ends = np.cumsum([0] + [len(name) for name in names])
        self.block = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        """Return name number `index`."""
        return os.fsdecode(self.block[self.ends[index] : self.ends[index + 1]].tobytes())


def missing_of(what: str, where: str, lacking: Sequence[str], count: int, total: int) -> str:
    """Return the line that says which images lack something and are left out.

    Args:
        what: What they lack.
        where: The source.
        lacking: Names of the first of them.
        count: How many they are.
        total: How many images there are.
    """
    more = f" and {count - 3} more" if count > 3 else ""
    return f"{where}: {count} of {total} images have no {what} and are left out: {', '.join(lacking[:3])}{more}"
