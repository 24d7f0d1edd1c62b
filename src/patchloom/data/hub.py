"""Data sets that other libraries fetch: `torchvision:NAME[:test]` and `hf:NAME[:split]`."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchloom.base.hub import fetching, reason
from patchloom.data.base import Sample, Source, UnreadableImageError, spread
from patchloom.data.decode import decode_image
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
        made = getattr(datasets, dataset)
        arguments: dict[str, Any] = {"root": str(Path(root).expanduser())}
        accepted = inspect.signature(made).parameters
        if "train" in accepted:
            arguments["train"] = split == "train"
        elif "split" in accepted:
            arguments["split"] = split
        if "download" in accepted:
            arguments["download"] = True
        try:
            self.dataset = made(**arguments)
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
    """A data set of the Hugging Face hub, or one on disk in its layout; image and label columns are found.

    Args:
        dataset: Name, or path of a data set saved by `datasets`.
        split: Name of the split.
        in_chans: 3 or 1.

    Raises:
        MissingExtraError: `datasets` is not installed.
        UsageError: The set cannot be opened, or has no image column.
    """

    def __init__(self, dataset: str, split: str = "train", in_chans: int = 3) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("datasets", "hf", f"hf:{dataset}") from error
        self.name = f"hf:{dataset}" + ("" if split == "train" else f":{split}")
        self.in_chans = in_chans
        try:
            if (Path(dataset) / "dataset_info.json").exists() or (Path(dataset) / "dataset_dict.json").exists():
                found = datasets.load_from_disk(dataset)
                table = found[split] if isinstance(found, datasets.DatasetDict) else found
            else:
                with fetching():
                    table = datasets.load_dataset(dataset, split=split)
        except Exception as error:
            raise UsageError(f"{self.name} cannot be opened ({reason(error)})") from error
        kinds = table.features
        images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise UsageError(f"{self.name} has no image column (its columns: {', '.join(kinds)})")
        self.column = images[0]
        # Undecoded, so that a broken image is ours to survive.
        self.table = table.cast_column(self.column, datasets.Image(decode=False))
        labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        if labels:
            self.class_names = list(kinds[labels[0]].names)
            self.labels = np.array(table[labels[0]], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.table)

    def key(self, index: int) -> str:
        """Return the number of an image as its name."""
        return f"{index:07d}"

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        data = self._data(index)
        label = -1 if self.labels is None else int(self.labels[index])
        return Sample(
            decode_image(data, self.key(index), self.in_chans, "invert", self.values, self.channels),
            label,
            self.key(index),
        )

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield numbers and contents of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), self._data(index)

    def _data(self, index: int) -> Path | bytes:
        cell = self.table[index][self.column]
        return cell["bytes"] if cell and cell.get("bytes") else Path(cell["path"] if cell and cell["path"] else "")

    def fingerprint(self) -> str:
        """Return a short hash of the table's own fingerprint."""
        return hashlib.sha256(f"{self.name} {self.table._fingerprint}".encode()).hexdigest()[:16]


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
