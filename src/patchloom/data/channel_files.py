"""A folder in which every channel of an image is a file of its own.

The channels are told by what their files' names have in place of one another, in the order wanted: ends of the stem
(`_dapi,_gfp,_rfp` for `cell7_dapi.tif` …) or sub-folders (`dapi/,gfp/,rfp/` for `dapi/cell7.tif` …). An image is named
by its first file without that part.

>>> ChannelFilesSource("my/folder", "_c0,_c1,_c2", in_chans=3).key(0)  # doctest: +SKIP
'plate1/cell7.tif'
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from patchloom.base.source_options import words
from patchloom.data.base import Sample, UnreadableImageError, spread
from patchloom.data.decode import decode_image
from patchloom.data.fields import Packed
from patchloom.data.folder import FolderSource, Labels
from patchloom.errors import UsageError


class ChannelFilesSource(FolderSource):
    """Images put together from a file per channel, in the order of their names.

    Args:
        path: The folder.
        parts: What tells the channels apart, separated by commas.
        labels: As for `FolderSource`, of the images' names: folders named in `parts` are no classes.
        in_chans: Number of channels; as many as there are parts.
        **options: Other options of `FolderSource`.

    Raises:
        UsageError: No such folder, another number of parts than of channels, or no file that fits them.
    """

    def __init__(
        self, path: str | Path, parts: str, labels: Labels = "auto", in_chans: int = 3, **options: Any
    ) -> None:
        self.parts = [part.strip() for part in parts.split(",") if part.strip()]
        if len(self.parts) != in_chans or len(set(self.parts)) != len(self.parts):
            raise UsageError(
                f"channel_files names {len(self.parts)} channels ({parts}), and in_chans is {in_chans}; name each "
                f"channel once, in order, such as _c0,_c1,_c2 or dapi/,gfp/,rfp/"
            )
        if options.get("caption_field") is not None:
            raise UsageError(f"caption_field is {options['caption_field']!r}, and channel_files leave no room for it")
        super().__init__(path, labels="none", in_chans=in_chans, **options)
        groups: dict[str, list[str | None]] = {}
        for index in range(len(self)):
            file = self._file(index)
            if found := self._parted(file):
                groups.setdefault(found[0], [None] * in_chans)[found[1]] = file
        if not groups:
            raise UsageError(f"no file in {path} is a channel by the names {parts}; the first file is {self._file(0)}")
        self.files = dict(sorted(groups.items()))
        names = [os.fsencode(name) for name in self.files]
        self.captions = False
        self._stamp = hashlib.sha256(f"{self._stamp} {self.parts}".encode()).hexdigest()[:16]
        self.names = Packed(names)
        self._label(names, labels, words(options.get("missing")))

    def _parted(self, file: str) -> tuple[str, int] | None:
        """Return the name of the image a file belongs to, and the number of the channel it is."""
        stem, suffix = os.path.splitext(file)  # noqa: PTH122
        for number, part in enumerate(self.parts):
            if part.endswith("/"):
                if f"/{file}".find(f"/{part}") >= 0:
                    return f"/{file}".replace(f"/{part}", "/", 1)[1:], number
            elif stem.endswith(part):
                return stem.removesuffix(part) + suffix, number
        return None

    def read(self, index: int) -> Sample:
        """Return image number `index`.

        Raises:
            UnreadableImageError: A channel is missing, cannot be decoded, or is of another size.
        """
        key = self.key(index)
        files = self.files[self._file(index)]
        missing = [self.parts[number] for number, file in enumerate(files) if file is None]
        if missing:
            raise UnreadableImageError(key, f"it has no file for the channel {missing[0]}")
        layers = [decode_image(self.root / file, file, 1, "invert", self.values) for file in files if file is not None]
        if any(layer.shape != layers[0].shape for layer in layers):
            sizes = ", ".join(f"{layer.shape[2]}x{layer.shape[1]}" for layer in layers)
            raise UnreadableImageError(key, f"its channels differ in size: {sizes}")
        if any(layer.is_floating_point() for layer in layers):
            layers = [layer if layer.is_floating_point() else layer.float() / 255 for layer in layers]
        label = -1 if self.labels is None else int(self.labels[index])
        return Sample(torch.cat(layers), label, key)

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of the files of some images, about `count` of them."""
        names = list(self.files)
        for index in spread(len(self), max(1, count // len(self.parts))):
            for file in self.files[names[index]]:
                if file is not None:
                    yield file, self.root / file
