"""Clips from folders of frames: `clips:FOLDER`.

Each folder that holds images is a video, its images the frames in the order of their names (`2.jpg` before `10.jpg`).
A sample is a window of so many frames so many apart ("dense" sampling, as VideoMAE and SlowFast call it): the middle
one where a video is measured, one drawn at random where it is trained on.

>>> source = ClipSource("videos", frames=16, stride=4)  # doctest: +SKIP
>>> source.read(0).value.shape  # doctest: +SKIP
torch.Size([3, 16, 240, 320])
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from patchloom.base.source_options import words
from patchloom.data.base import Source, UnreadableImageError, spread
from patchloom.data.decode import decode_image
from patchloom.data.folder import Labels, chosen_images
from patchloom.data.kinds import CLIP
from patchloom.data.pixels import alike
from patchloom.data.sample import Sample
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.io import printable

FRAMES, STRIDE = 16, 4


class ClipSource(Source):
    """The videos below a folder, each a folder of frames, in the order of their paths.

    A video with fewer frames than a window spans goes on with its last frame; how many do is said when the source is
    opened. A window with a frame that cannot be read, or of another size, makes its clip unreadable: it is skipped and
    listed like a broken image.

    Args:
        path: The folder.
        labels: `folder`: the top-level sub-folder is the class, and videos lie in it. `none`: no labels. `auto`: as
            `folder` when every video lies in one of at least two.
        in_chans: Channels the frames are read as.
        clip_frames: Frames T of a clip (VideoMAE: 16).
        clip_stride: Frames from one of a clip to the next (VideoMAE: 4 on Kinetics, 2 on Something-Something).
        include: Globs of the frames to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of frames to leave out.
        missing: Names of sub-folders, separated by commas, whose videos have no label.

    Attributes:
        span: Frames of a video that a window covers.

    Raises:
        UsageError: There is no such folder, no image below it, a video outside the sub-folders with `folder`, or
            numbers below 1.
    """

    kind = CLIP

    def __init__(
        self,
        path: str | Path,
        labels: Labels = "auto",
        in_chans: int = 3,
        clip_frames: int = FRAMES,
        clip_stride: int = STRIDE,
        include: str | None = None,
        exclude: str | None = None,
        missing: str | None = None,
    ) -> None:
        if clip_frames < 1 or clip_stride < 1:
            raise UsageError(f"clip_frames is {clip_frames} and clip_stride {clip_stride}; both must be at least 1")
        self.name, self.root, self.in_chans = f"clips:{printable(path)}", Path(path), in_chans
        self.clip_frames, self.clip_stride = clip_frames, clip_stride
        self.span = (clip_frames - 1) * clip_stride + 1
        if not self.root.is_dir():
            kind = "is a file" if self.root.exists() else "does not exist"
            raise UsageError(f"the folder of clips {path} {kind}; give the folder that holds folders of frames")
        found = sorted(chosen_images(self.root, include, exclude), key=lambda file: _in_order(file[0]))
        if not found:
            raise UsageError(f"no image in {self.root.resolve()} or below, so no frame of a clip")
        digest = hashlib.sha256(f"{clip_frames} {clip_stride}".encode())
        for file in found:
            digest.update(repr(file).encode(errors="surrogateescape"))
        self._stamp = digest.hexdigest()[:16]
        grouped = [(folder, [*files]) for folder, files in groupby((file[0] for file in found), key=_folder)]
        self.videos = [folder for folder, _ in grouped]
        self.ends = np.cumsum([len(files) for _, files in grouped])
        # As `FolderSource` does: a million names in one block of bytes.
        names = [os.fsencode(PurePosixPath(name).name) for _, files in grouped for name in files]
        self.offsets = np.cumsum([0, *map(len, names)])
        self.names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._label(labels, words(missing))
        lengths = np.diff(self.ends, prepend=0)
        if short := int((lengths < self.span).sum()):
            notice(
                f"{self.name}: {short} of {len(self)} clips have fewer than the {self.span} frames that {clip_frames} "
                f"frames {clip_stride} apart span; they go on with their last frame"
            )

    def _label(self, labels: Labels, missing: list[str]) -> None:
        tops = [video.split("/", 1)[0] if "/" in video else None for video in self.videos]
        classes = sorted({top for top in tops if top is not None and printable(top) not in missing})
        inside = all(top is not None for top in tops)
        if labels == "none" or (labels == "auto" and not (inside and len(classes) > 1)):
            if labels == "auto":
                self.why_unlabelled = "has no labels; put the videos of each class in a folder of its own"
            return
        if not inside:
            stray = printable(self.videos[tops.index(None)]) or "."
            raise UsageError(f"labels=folder needs every video in a sub-folder of {self.root}; {stray} is in none")
        self.class_names = [printable(name) for name in classes]
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([numbers.get(top, -1) for top in tops if top is not None], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.videos)

    def key(self, index: int) -> str:
        """Return the path of video number `index` below the folder, as `patchloom.io.printable` writes it."""
        return printable(self.videos[index] or self.root.name)

    def read(self, index: int) -> Sample:
        """Return the window in the middle of video number `index`, (C, T, H, W)."""
        return self._window(index, max(0, self._length(index) - self.span) // 2)

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Return a window of video number `index` that begins anywhere."""
        room = max(0, self._length(index) - self.span)
        return self._window(index, int(torch.randint(room + 1, (), generator=generator)))

    def _window(self, index: int, start: int) -> Sample:
        key, last = self.key(index), self._length(index) - 1
        places = [min(start + number * self.clip_stride, last) for number in range(self.clip_frames)]
        decoded = {place: self._frame(index, place) for place in dict.fromkeys(places)}
        frames = alike([decoded[place] for place in places])
        sizes = {tuple(frame.shape[1:]) for frame in frames}
        if len(sizes) > 1:
            told = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
            raise UnreadableImageError(key, f"its frames differ in size: {told}")
        label = -1 if self.labels is None else int(self.labels[index])
        return Sample(torch.stack(frames, 1), label, key)

    def _frame(self, index: int, place: int) -> torch.Tensor:
        path = self._path(index, place)
        try:
            return decode_image(path, printable(path.name), self.in_chans, "invert", self.values, self.channels)
        except UnreadableImageError as error:
            raise UnreadableImageError(self.key(index), f"frame {error.key}: {error.reason}") from error

    def _length(self, index: int) -> int:
        return int(self.ends[index] - (self.ends[index - 1] if index else 0))

    def _path(self, index: int, place: int) -> Path:
        number = place + (int(self.ends[index - 1]) if index else 0)
        name = os.fsdecode(self.names[self.offsets[number] : self.offsets[number + 1]].tobytes())
        return self.root / self.videos[index] / name

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of a frame in the middle of up to `count` videos."""
        for index in spread(len(self), count):
            path = self._path(index, self._length(index) // 2)
            yield printable(path.relative_to(self.root).as_posix()), path

    def sampling(self) -> dict[str, Any]:
        """Return the settings by which clips are taken from videos."""
        return {"clip_frames": self.clip_frames, "clip_stride": self.clip_stride}

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times of the frames, and of how clips are taken from them."""
        return self._stamp


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _in_order(name: str) -> tuple[Any, ...]:
    """Return what sorts frames: by folder, and within it numbers by their value."""
    folder, _, file = name.rpartition("/")
    parts = re.split(r"(\d+)", file)
    return folder, [(int(part), "") if part.isdigit() else (-1, part) for part in parts], file
