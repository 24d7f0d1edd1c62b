"""Data sets that other libraries fetch: `torchvision:NAME[:test]` and `hf:NAME[:split]`."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchloom.base.hub import fetching, reason
from patchloom.base.source_options import words
from patchloom.data.base import Sample, Source, UnreadableImageError, spread
from patchloom.data.decode import decode_image
from patchloom.data.fields import CAPTION, IMAGE, LABEL, LABELS, MASK, find, find_several
from patchloom.data.labels import classes, several
from patchloom.errors import MissingExtraError, UsageError, unknown_name

CACHE = "~/.cache/patchloom"


class TorchvisionSource(Source):
    """A classification set of torchvision, downloaded on first use.

    Args:
        dataset: Name of the class in `torchvision.datasets`.
        split: `train` or `test`.
        root: Where the files are, or are put.
        in_chans: 3 or 1.

    Raises:
        UsageError: Unknown set (with the nearest names), or files that can be neither found nor downloaded.
    """

    def __init__(self, dataset: str, split: str = "train", root: str = CACHE, in_chans: int = 3) -> None:
        from torchvision import datasets

        names = [name for name in datasets.__all__ if name not in ("ImageFolder", "DatasetFolder", "FakeData")]
        if dataset not in names:
            raise unknown_name("torchvision set", dataset, names)
        if split not in ("train", "test"):
            raise unknown_name(f"split of torchvision:{dataset}", split, ("train", "test"))
        self.name = f"torchvision:{dataset}" + ("" if split == "train" else f":{split}")
        self.in_chans = in_chans
        dataset_class = getattr(datasets, dataset)
        arguments: dict[str, Any] = {"root": str(Path(root).expanduser())}
        accepted = inspect.signature(dataset_class).parameters
        if "train" in accepted:
            arguments["train"] = split == "train"
        elif "split" in accepted:
            arguments["split"] = split
        if "download" in accepted:
            arguments["download"] = True
        try:
            self.dataset = dataset_class(**arguments)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{self.name} is neither in {root} nor can it be fetched ({reason})") from error
        self.labels = _integers(getattr(self.dataset, "targets", getattr(self.dataset, "labels", None)))
        classes = getattr(self.dataset, "classes", None)
        if self.labels is not None:
            count = int(self.labels.max()) + 1
            self.class_names = [str(name) for name in classes] if classes else [str(n) for n in range(count)]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def key(self, index: int) -> str:
        """Return the number of an image as its name."""
        return f"{index:07d}"

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        try:
            image, label = self.dataset[index][:2]
        except (OSError, ValueError) as error:
            raise UnreadableImageError(self.key(index), " ".join(str(error).split())) from error
        known = -1 if self.labels is None else int(label)
        return Sample(_tensor(image, self.in_chans), known, self.key(index))

    def fingerprint(self) -> str:
        """Return a short hash of name, size and labels."""
        digest = hashlib.sha256(f"{self.name} {len(self)}".encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]


class HuggingFaceSource(Source):
    """A data set of the Hugging Face hub, or one on disk in its layout; its columns are found by type and name.

    Args:
        dataset: Name, or path of a data set saved by `datasets`.
        split: Name of the split.
        in_chans: 3 or 1.
        missing: Words that stand for a missing label, separated by commas.
        image_field: Column of the images; default: the first of images that is none of masks (see `fields`).
        label_field: Column of the labels: classes, names, numbers, or lists of several of them; or columns of several
            labels, separated by commas. Default: the first of classes, else one by name.
        mask_field: Column of the masks, which are images.
        caption_field: Column of the captions, text or lists of it.

    Attributes:
        mask_column: Column of the masks, or None.
        caption_column: Column of the captions, or None.

    Raises:
        MissingExtraError: `datasets` is not installed.
        UsageError: The set cannot be opened, has no image column, or no column of a name asked for.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        in_chans: int = 3,
        missing: str | None = None,
        image_field: str | None = None,
        label_field: str | None = None,
        mask_field: str | None = None,
        caption_field: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("datasets", "hf", f"hf:{dataset}") from error
        self.name = f"hf:{dataset}" + ("" if split == "train" else f":{split}")
        self.in_chans = in_chans
        self._asked = image_field is not None
        try:
            if (Path(dataset) / "dataset_info.json").exists() or (Path(dataset) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(dataset)
                table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                with fetching():
                    table = datasets.load_dataset(dataset, split=split)
        except Exception as error:
            raise UsageError(f"{self.name} cannot be opened ({reason(error)})") from error
        kinds = table.features
        images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise UsageError(f"{self.name} has no image column (its columns: {', '.join(kinds)})")
        called_so = [name for name in images if name.lower() in (*MASK.columns, *LABEL.columns)]
        asked = find(MASK, images, mask_field, self.name) if mask_field is not None else None
        plain = [name for name in images if name != asked and name not in called_so] or images
        self.column = (find(IMAGE, images, image_field, self.name) if image_field is not None else None) or plain[0]
        self.mask_column = asked or next((name for name in called_so if name != self.column), None)
        # Undecoded, so that a broken image is ours to survive.
        for name in images:
            table = table.cast_column(name, datasets.Image(decode=False))
        self.table = table
        text = [name for name, kind in kinds.items() if name not in images and _is_text(kind)]
        self.caption_column = find(CAPTION, text, caption_field, self.name)
        self.captions = self.caption_column is not None
        # Of a whole row other columns would be read, too.
        wanted = (self.column, self.mask_column, self.caption_column)
        self._columns = {name: table.select_columns([name]) for name in wanted if name is not None}
        rest = [name for name, kind in kinds.items() if name != self.caption_column and _holds_labels(kind)]
        classes = [name for name in rest if isinstance(kinds[name], datasets.ClassLabel)]
        columns = find_several(LABEL, rest, label_field, self.name) or classes[:1]
        columns = columns or [name for field in (LABEL, LABELS) if (name := find(field, rest, None, self.name))][:1]
        if len(columns) > 1:
            self.labels, self.class_names = _shares(self.name, table, columns)
        elif columns:
            self.labels, self.class_names = _labels(self.name, table, columns[0], words(missing))
        self.why_unlabelled = f"has no column of labels (its columns: {', '.join(kinds)})"

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.table)

    def key(self, index: int) -> str:
        """Return the number of an image as its name."""
        return f"{index:07d}"

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        data = self.cell(index, self.column)
        label: Any = -1 if self.labels is None else self.labels[index]
        return Sample(
            decode_image(data, self.key(index), self.in_chans, "invert", self.values, self.channels),
            label if self.multilabel else int(label),
            self.key(index),
            self.named(index),
        )

    def caption(self, index: int) -> str:
        """Return the caption of image number `index`, of several the first."""
        if self.caption_column is None:
            return ""
        found = self._columns[self.caption_column][index][self.caption_column]
        found = (found or [""])[0] if isinstance(found, list) else found
        return (found or "").strip()

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield numbers and contents of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), self.cell(index, self.column)

    def cell(self, index: int, column: str) -> Path | bytes:
        """Return an image of a column as it is stored; an empty path where there is none."""
        cell = self._columns[column][index][column]
        return cell["bytes"] if cell and cell.get("bytes") else Path(cell["path"] if cell and cell["path"] else "")

    def fingerprint(self) -> str:
        """Return a short hash of the table's own fingerprint, and of the column of images where it was asked for."""
        asked = f" {self.column}" if self._asked else ""
        return hashlib.sha256(f"{self.name} {self.table._fingerprint}{asked}".encode()).hexdigest()[:16]


def _inner(kind: Any) -> Any:
    """Return the type of what a column holds, of lists that of their items."""
    return kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)


def _is_text(kind: Any) -> bool:
    """Return whether a column holds text, or lists of it."""
    return getattr(_inner(kind), "dtype", None) in ("string", "large_string")


def _holds_labels(kind: Any) -> bool:
    """Return whether a column holds names or numbers, or lists of them."""
    dtype = str(getattr(_inner(kind), "dtype", None))
    return dtype.startswith(("string", "large_string", "int", "uint", "float", "bool"))


def _labels(name: str, table: Any, column: str, missing: Sequence[str]) -> tuple[np.ndarray, list[str] | None]:
    """Return the labels of a column, and their names, as `Source` has them."""
    kind, given = table.features[column], table[column][:]
    inner = _inner(kind)
    known = list(inner.names) if hasattr(inner, "names") else None
    if kind is not inner:
        rows = [None if row is None else [known[one] if known else _name(one) for one in row] for row in given]
        labels, found = several(rows)
        return (labels, found) if known is None else (_at(labels, found, known), known)
    if known is not None:
        return np.array([-1 if label is None else label for label in given], dtype=np.int64), known
    if inner.dtype in ("float32", "float64") and not all(label is None or float(label).is_integer() for label in given):
        raise UsageError(f"the column {column} of {name} holds numbers that are no classes, such as {given[0]}")
    cells = ["" if label is None else str(int(label) if isinstance(label, (bool, float)) else label) for label in given]
    return classes([cell.strip() for cell in cells], ("", *missing))


def _name(value: Any) -> str | float:
    return value if isinstance(value, str) else float(value)


def _shares(name: str, table: Any, columns: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return labels of a column each, shares from 0 to 1, NaN where nothing is given."""
    labels = np.full((len(table), len(columns)), np.nan, np.float32)
    for place, column in enumerate(columns):
        for row, value in enumerate(table[column][:]):
            if value is None:
                continue
            if isinstance(value, str) or not 0 <= value <= 1:
                raise UsageError(f"the column {column} of {name} holds {value!r}; a label is 1, 0 or a share between")
            labels[row, place] = value
    return labels, list(columns)


def _at(labels: np.ndarray, found: list[str], names: list[str]) -> np.ndarray:
    """Return vectors of labels (n, found) in the order of names that hold those found: (n, names)."""
    ordered = np.zeros((len(labels), len(names)), np.float32)
    ordered[:, [names.index(name) for name in found]] = labels
    ordered[np.isnan(labels).any(1)] = np.nan
    return ordered


def _tensor(image: Any, in_chans: int) -> Tensor:
    """Return a PIL image or tensor as (in_chans, H, W) uint8."""
    if isinstance(image, Tensor):
        return image.expand(in_chans, -1, -1) if image.shape[0] == 1 else image
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    array = np.array(image.convert("RGB" if in_chans == 3 else "L"))
    tensor = torch.from_numpy(array)
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _integers(targets: Any) -> np.ndarray | None:
    """Return labels as (n,) int64, or None where they are not one whole number per image."""
    if targets is None:
        return None
    array = np.asarray(targets)
    return array.astype(np.int64) if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) else None
