"""Clips of videos: folders of frames and video files, by a folder, a table or shards.

    clips:FOLDER             every folder of frames and every video file below it; sub-folders are classes
    clips:FILE.csv           a table of video files or folders of frames, with labels (see `fields`, `labels`)
    clips:NAME-{00..09}.tar  shards of video files with labels (`0001.mp4`, `0001.cls`; see `shards`)

A folder that holds images is a video, its images the frames in the order of their names (`2.jpg` before `10.jpg`). A
sample is some frames of a video: a window of so many so many apart (dense), or one frame of each of equal parts of it
(sparse); in the middle where a video is measured, drawn at random where it is trained on (see `clip_sampling`).

>>> source = open_clips("videos", clip_frames=16, clip_stride=4)  # doctest: +SKIP
>>> source.read(0).value.shape  # doctest: +SKIP
torch.Size([3, 16, 240, 320])
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from patchloom.base.source_options import choose, words
from patchloom.data import clip_sampling as sampling
from patchloom.data.base import Source, UnreadableImageError, spread
from patchloom.data.decode import decode_image, to_tensor
from patchloom.data.fields import CLIP as CLIP_FIELD
from patchloom.data.fields import Packed
from patchloom.data.folder import Labels, walk_images
from patchloom.data.kinds import CLIP
from patchloom.data.labels import LabelFileSource, is_label_file
from patchloom.data.pixels import alike
from patchloom.data.sample import Sample
from patchloom.data.shards import ShardSource, is_shards
from patchloom.data.stored import Stored
from patchloom.data.survey import notice
from patchloom.data.video_files import VIDEO_SUFFIXES, VideoIndex, look_through, read_frames, require_decoder
from patchloom.errors import UsageError, unknown_name
from patchloom.io import printable

FRAMES, STRIDE = 16, 4
Sampling = Literal["dense", "sparse"]
KNOWN = 4096
"""Files whose time stamps a process remembers."""
SHOWN = 10


class ClipsSource(Source):
    """Videos by number, and how clips are taken from them.

    A video with fewer frames than a window spans goes on with its last frame. A clip with a frame that cannot be read,
    or of another size, is skipped and listed like a broken image.

    Args:
        name: The source as the user named it.
        in_chans: Channels the frames are read as; of video files 3 or 1.
        clip_frames: Frames T of a clip (VideoMAE: 16).
        clip_stride: Frames from one of a clip to the next where sampling is dense (VideoMAE: 4 on Kinetics, 2 on
            Something-Something).
        clip_sampling: `dense` or `sparse`.

    Attributes:
        span: Frames of a video that a clip needs so as not to repeat any.

    Raises:
        UsageError: Numbers below 1, or another sampling.
    """

    kind = CLIP

    def __init__(
        self,
        name: str,
        in_chans: int,
        clip_frames: int = FRAMES,
        clip_stride: int = STRIDE,
        clip_sampling: str = "dense",
    ) -> None:
        if clip_frames < 1 or clip_stride < 1:
            raise UsageError(f"clip_frames is {clip_frames} and clip_stride {clip_stride}; both must be at least 1")
        if clip_sampling not in get_args(Sampling):
            raise unknown_name("clip_sampling", clip_sampling, get_args(Sampling))
        self.name, self.in_chans = name, in_chans
        self.clip_frames, self.clip_stride, self.clip_sampling = clip_frames, clip_stride, clip_sampling
        self.span = sampling.span(clip_frames, clip_stride) if clip_sampling == "dense" else clip_frames
        self._known: OrderedDict[int, VideoIndex] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the time stamps that were found behind."""
        return {**vars(self), "_known": OrderedDict()}

    def read(self, index: int) -> Sample:
        """Return the clip in the middle of video number `index`, (C, T, H, W)."""
        length = self.length(index)
        if self.clip_sampling == "sparse":
            return self.clip(index, sampling.middle_segments(length, self.clip_frames))
        return self.clip(index, sampling.middle_window(length, self.clip_frames, self.clip_stride))

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Return a clip of video number `index` that is drawn at random."""
        length = self.length(index)
        if self.clip_sampling == "sparse":
            return self.clip(index, sampling.drawn_segments(length, self.clip_frames, generator))
        return self.clip(index, sampling.drawn_window(length, self.clip_frames, self.clip_stride, generator))

    def views(self, index: int, count: int) -> list[Sample]:
        """Return several clips of video number `index`, evenly spaced (dense) or interleaved (sparse), for testing."""
        length = self.length(index)
        if self.clip_sampling == "sparse":
            places = sampling.sparse_views(length, self.clip_frames, count)
        else:
            places = sampling.dense_views(length, self.clip_frames, self.clip_stride, count)
        return [self.clip(index, one) for one in places]

    def clip(self, index: int, places: Sequence[int]) -> Sample:
        """Return frames of video number `index` as a sample, each read once.

        Raises:
            UnreadableImageError: One of them cannot be read, or is of another size.
        """
        key, distinct = self.key(index), sorted(set(places))
        read = dict(zip(distinct, self.frames(index, distinct), strict=True))
        frames = alike([read[place] for place in places])
        sizes = {tuple(frame.shape[1:]) for frame in frames}
        if len(sizes) > 1:
            told = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
            raise UnreadableImageError(key, f"its frames differ in size: {told}")
        label = -1 if self.labels is None else self.labels[index]
        # Pixels stay interleaved, as decoders hand them out and resizing takes them.
        value = torch.stack([frame.permute(1, 2, 0) for frame in frames]).permute(3, 0, 1, 2)
        return Sample(value, label if self.multilabel else int(label), key)

    @abstractmethod
    def length(self, index: int) -> int:
        """Return the number of frames of video number `index`.

        Raises:
            UnreadableImageError: It is no video, or has none.
        """

    @abstractmethod
    def frames(self, index: int, places: Sequence[int]) -> list[Tensor]:
        """Return frames of video number `index` by their rising numbers, each (C, H, W).

        Raises:
            UnreadableImageError: One of them cannot be read.
        """

    def sampling(self) -> dict[str, Any]:
        """Return the settings by which clips are taken from videos."""
        sparse = {"clip_sampling": self.clip_sampling} if self.clip_sampling != "dense" else {}
        return {"clip_frames": self.clip_frames, "clip_stride": self.clip_stride, **sparse}

    def stamped(self, *parts: str) -> str:
        """Return a short hash of how clips are taken, and of what else is told."""
        how = f"{self.clip_frames} {self.clip_stride}" + (" sparse" if self.clip_sampling == "sparse" else "")
        digest = hashlib.sha256(how.encode())
        for part in parts:
            digest.update(part.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def index_of(self, number: int, data: Callable[[], Path | bytes]) -> VideoIndex:
        """Return when the frames of a video file are shown, which is found out once."""
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = look_through(data(), self.key(number))
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return found

    def frames_of(self, number: int, data: Path | bytes, places: Sequence[int]) -> list[Tensor]:
        """Return frames of a video file.

        Raises:
            UnreadableImageError: One cannot be decoded, or has other channels than are asked for.
        """
        key, grey = self.key(number), self.in_chans == 1
        frames = read_frames(data, key, self.index_of(number, lambda: data), places, grey and self.channels is None)
        if self.in_chans in (1, 3) and self.channels is None and self.values.is_natural("uint8"):
            return frames
        try:
            stored = (Stored(frame.numpy()) for frame in frames)
            return [to_tensor(one, self.in_chans, self.values, self.channels) for one in stored]
        except ValueError as error:
            raise UnreadableImageError(key, str(error)) from error


class DiskClips(ClipsSource):
    """Videos below a folder, each a folder of frames or a video file.

    Attributes:
        root: The folder.
        videos: Paths below it.
    """

    def set_videos(self, root: Path, videos: Sequence[tuple[str, Sequence[File]]], *stamps: str) -> None:
        """Settle which videos there are, as `FrameFolders` takes them, and what else the fingerprint depends on.

        Raises:
            MissingExtraError: There are video files, and PyAV is not installed.
        """
        self.root, self.videos = root, [name for name, _ in videos]
        self.folders = FrameFolders(root, videos)
        self._stamp = self.stamped(*stamps)
        if not self.folders.lengths.all():
            require_decoder()

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.videos)

    def key(self, index: int) -> str:
        """Return the path of video number `index` below the folder, as `patchloom.io.printable` writes it."""
        return printable(self.videos[index] or self.root.name)

    def length(self, index: int) -> int:
        """Return the number of frames of video number `index`."""
        count = int(self.folders.lengths[index])
        return count or len(self.index_of(index, lambda: self.root / self.videos[index]))

    def frames(self, index: int, places: Sequence[int]) -> list[Tensor]:
        """Return frames of video number `index`."""
        if self.folders.lengths[index]:
            return [self.folders.frame(self, index, place) for place in places]
        return self.frames_of(index, self.root / self.videos[index], places)

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of a frame in the middle of up to `count` folders of frames."""
        return self.folders.stored(count)

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times of the frames, and of how clips are taken from them."""
        return self._stamp


class ClipSource(DiskClips):
    """The videos below a folder: folders of frames and video files, in the order of their paths.

    How many folders of frames are shorter than a clip is said when the source is opened; video files are not looked
    into before they are read.

    Args:
        path: The folder.
        labels: `folder`: the top-level sub-folder is the class, and videos lie in it. `none`: no labels. `auto`: as
            `folder` when every video lies in one of at least two.
        in_chans: Channels the frames are read as.
        clip_frames: See `ClipsSource`.
        clip_stride: See `ClipsSource`.
        clip_sampling: See `ClipsSource`.
        include: Globs of the frames and files to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of frames and files to leave out.
        missing: Names of sub-folders, separated by commas, whose videos have no label.

    Raises:
        UsageError: There is no such folder, nothing in it, or a video outside the sub-folders with `folder`.
    """

    def __init__(
        self,
        path: str | Path,
        labels: Labels = "auto",
        in_chans: int = 3,
        clip_frames: int = FRAMES,
        clip_stride: int = STRIDE,
        clip_sampling: str = "dense",
        include: str | None = None,
        exclude: str | None = None,
        missing: str | None = None,
    ) -> None:
        super().__init__(f"clips:{printable(path)}", in_chans, clip_frames, clip_stride, clip_sampling)
        root = Path(path)
        if not root.is_dir():
            kind = "is a file" if root.exists() else "does not exist"
            raise UsageError(
                f"the folder of clips {path} {kind}; give the folder that holds video files or folders of frames, a "
                f".csv of them, or .tar shards"
            )
        videos = videos_below(root, include, exclude)
        if not videos:
            raise UsageError(f"no video file and no image in {root.resolve()} or below, so no frame of a clip")
        self.set_videos(root, videos, *(repr(file) for _, files in videos for file in files))
        self._label(labels, words(missing))
        lengths = self.folders.lengths
        if short := int(((lengths < self.span) & (lengths > 0)).sum()):
            spanned = f"{clip_frames} frames {clip_stride} apart span" if clip_sampling == "dense" else "a clip has"
            notice(
                f"{self.name}: {short} of {int((lengths > 0).sum())} folders of frames have fewer than the {self.span} "
                f"frames that {spanned}; "
                f"they go on with their last frame"
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


class ListedClips(DiskClips):
    """The videos that a table lists, each a video file or a folder of frames, with labels.

    Args:
        name: Path of the table, with `:SPLIT` behind it to take the rows of one split, see `LabelFileSource`.
        in_chans: Channels the frames are read as.
        clip_frames: See `ClipsSource`.
        clip_stride: See `ClipsSource`.
        clip_sampling: See `ClipsSource`.
        include: Globs of the rows to take; default: all.
        exclude: Globs of rows to leave out.
        missing: Words that stand for a missing label besides an empty cell, separated by commas.
        image_field: Column of the paths; default: file, path, video … (see `fields`).
        label_field: Column of the classes, or columns of several labels, separated by commas.

    Raises:
        UsageError: As `LabelFileSource`.
    """

    def __init__(
        self,
        name: str,
        in_chans: int = 3,
        clip_frames: int = FRAMES,
        clip_stride: int = STRIDE,
        clip_sampling: str = "dense",
        include: str | None = None,
        exclude: str | None = None,
        missing: str | None = None,
        image_field: str | None = None,
        label_field: str | None = None,
    ) -> None:
        super().__init__(f"clips:{printable(name)}", in_chans, clip_frames, clip_stride, clip_sampling)
        table = _ClipTable(
            name, None, in_chans, include, exclude, missing, image_field=image_field, label_field=label_field
        )
        self.labels, self.class_names, self.why_unlabelled = table.labels, table.class_names, table.why_unlabelled
        videos = [(video, frames_in(table.root / video, video)) for video in table.files]
        self.set_videos(table.root, videos, table.fingerprint())


class ShardedClips(ClipsSource):
    """The video files in shards, with labels, by number: shards are not compressed.

    Args:
        pattern: See `ShardSource`.
        in_chans: Channels the frames are read as.
        clip_frames: See `ClipsSource`.
        clip_stride: See `ClipsSource`.
        clip_sampling: See `ClipsSource`.
        missing: Words that stand for a missing label, separated by commas.
        image_field: What stands after the stem of videos, `mp4`; default: whatever is one.
        label_field: What stands after the stem of labels, or the key of .json files that holds them.

    Raises:
        UsageError: As `ShardSource`; or a shard is compressed.
    """

    def __init__(
        self,
        pattern: str | Path,
        in_chans: int = 3,
        clip_frames: int = FRAMES,
        clip_stride: int = STRIDE,
        clip_sampling: str = "dense",
        missing: str | None = None,
        image_field: str | None = None,
        label_field: str | None = None,
    ) -> None:
        super().__init__(f"clips:{printable(pattern)}", in_chans, clip_frames, clip_stride, clip_sampling)
        self.shards = ShardSource(
            pattern, missing=missing, image_field=image_field, label_field=label_field, suffixes=VIDEO_SUFFIXES
        )
        indexed = self.shards.by_index()
        self.labels, self.class_names = indexed.labels, indexed.class_names
        self.why_unlabelled = indexed.why_unlabelled
        self._held: tuple[int, bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the file that was read last behind."""
        return {**super().__getstate__(), "_held": None}

    def __len__(self) -> int:
        """Return the number of videos (damaged ones included)."""
        return self.shards.num_samples

    def key(self, index: int) -> str:
        """Return the name of video number `index` in its shard."""
        return self.shards.image_name(index)

    def length(self, index: int) -> int:
        """Return the number of frames of video number `index`."""
        return len(self.index_of(index, lambda: self._content(index)))

    def frames(self, index: int, places: Sequence[int]) -> list[Tensor]:
        """Return frames of video number `index`."""
        return self.frames_of(index, self._content(index), places)

    def _content(self, index: int) -> bytes:
        """Return the file of a video, kept until another is read: its length is asked for before its frames."""
        if self._held is None or self._held[0] != index:
            _, files = self.shards.files(index, ("image",))
            if "image" not in files:
                raise UnreadableImageError(self.key(index), "the shard is damaged or cut short here")
            self._held = index, files["image"][1]
        return self._held[1]

    def fingerprint(self) -> str:
        """Return a short hash of the shards, and of how clips are taken from them."""
        return self.stamped(self.shards.fingerprint())


def open_clips(
    path: str | Path,
    labels: Labels = "auto",
    in_chans: int = 3,
    clip_frames: int = FRAMES,
    clip_stride: int = STRIDE,
    clip_sampling: str = "dense",
    include: str | None = None,
    exclude: str | None = None,
    missing: str | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
) -> ClipsSource:
    """Return what `clips:PATH` names: a folder of videos, a table or shards of them.

    Args:
        path: Folder, `FILE.csv`, `FILE.csv:SPLIT`, or shards.
        labels: What the labels of a folder are, see `ClipSource`.
        in_chans: Channels the frames are read as.
        clip_frames: See `ClipsSource`.
        clip_stride: See `ClipsSource`.
        clip_sampling: See `ClipsSource`.
        include: Globs of what to take, of folders and tables.
        exclude: Globs of what to leave out, likewise.
        missing: What stands for a missing label.
        image_field: What holds the videos in tables and shards.
        label_field: What holds the labels, likewise.

    Raises:
        UsageError: There is no such thing, or an option that it cannot obey.
    """
    how: dict[str, Any] = {"clip_frames": clip_frames, "clip_stride": clip_stride, "clip_sampling": clip_sampling}
    fields: dict[str, Any] = {"image_field": image_field, "label_field": label_field}
    globs: dict[str, Any] = {"include": include, "exclude": exclude}
    name = str(path)
    if is_shards(name):
        _refuse(name, globs)
        return ShardedClips(name, in_chans, **how, missing=missing, **fields)
    if is_label_file(name):
        return ListedClips(name, in_chans, **how, **globs, missing=missing, **fields)
    _refuse(name, fields)
    return ClipSource(path, labels, in_chans, **how, **globs, missing=missing)


def _refuse(name: str, options: dict[str, str | None]) -> None:
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"{option} is {value!r}, which the source clips:{name} cannot obey; leave it out")


File = tuple[str, int, int]
"""Path below a folder, size and time of a file."""


class FrameFolders:
    """The frames of many folders: a million names in one block of bytes.

    Args:
        root: Folder that holds them.
        videos: Of each video its path below the root, and its frames in order (paths below the root); a video file has
            itself alone.

    Attributes:
        lengths: (n,) int64, the frames of each; 0 of a video file.
    """

    def __init__(self, root: Path, videos: Sequence[tuple[str, Sequence[File]]]) -> None:
        self.root = root
        self.folders = [name for name, _ in videos]
        frames = [[] if _is_file(name, files) else [file[0] for file in files] for name, files in videos]
        self.lengths = np.array([len(names) for names in frames], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)
        self.names = Packed([os.fsencode(PurePosixPath(name).name) for names in frames for name in names])

    def path(self, index: int, place: int) -> Path:
        """Return the path of a frame."""
        return self.root / self.folders[index] / self.names[int(self.ends[index] - self.lengths[index]) + place]

    def frame(self, source: ClipsSource, index: int, place: int) -> Tensor:
        """Return a frame, read as the source has it.

        Raises:
            UnreadableImageError: It cannot be decoded.
        """
        path = self.path(index, place)
        try:
            return decode_image(path, printable(path.name), source.in_chans, "invert", source.values, source.channels)
        except UnreadableImageError as error:
            raise UnreadableImageError(source.key(index), f"frame {error.key}: {error.reason}") from error

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of a frame in the middle of up to `count` folders."""
        filled = np.flatnonzero(self.lengths)
        for place in spread(len(filled), count):
            index = int(filled[place])
            path = self.path(index, int(self.lengths[index]) // 2)
            yield printable(path.relative_to(self.root).as_posix()), path


class _ClipTable(LabelFileSource):
    """A table whose rows name video files, or folders of frames."""

    file_field = CLIP_FIELD

    def places(self, name: str, root: Path, files: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Return the paths below the root, and their sizes and times."""
        stamps, missing = [], []
        for file in files:
            try:
                status = (root / file).stat()
                stamps.append((status.st_size, status.st_mtime_ns))
            except OSError:
                missing.append(file)
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise UsageError(
                f"{name}: {len(missing)} of {len(files)} videos listed are not below {root}: "
                f"{', '.join(map(printable, missing[:SHOWN]))}{more}"
            )
        return list(files), np.array(stamps, dtype=np.int64).reshape(-1, 2)


def videos_below(root: Path, include: str | None = None, exclude: str | None = None) -> list[tuple[str, list[File]]]:
    """Return the videos below a folder in the order of their paths, as `FrameFolders` takes them.

    Raises:
        UsageError: There are some, and globs choose none.
    """
    others: list[str] = []
    found = [*walk_images(root, Counter(), others.append)]
    for name in others:
        if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES:
            status = (root / name).stat()
            found.append((name, status.st_size, status.st_mtime_ns))
    if include is not None or exclude is not None:
        chosen = set(choose((printable(name) for name, _, _ in found), include, exclude))
        kept = [file for file in found if printable(file[0]) in chosen]
        if found and not kept:
            raise UsageError(f"include and exclude leave none of the {len(found)} files in {printable(root)}")
        found = kept
    is_video = {file for file in found if PurePosixPath(file[0]).suffix.lower() in VIDEO_SUFFIXES}
    frames = sorted((file for file in found if file not in is_video), key=lambda file: _in_order(file[0]))
    videos = [(folder, [*files]) for folder, files in groupby(frames, key=lambda file: file[0].rpartition("/")[0])]
    return sorted([*videos, *((file[0], [file]) for file in is_video)])


def frames_in(path: Path, video: str) -> list[File]:
    """Return the frames of a folder in their order, or the video file alone."""
    if not path.is_dir():
        return [(video, 0, 0)]
    files = [(f"{video}/{name}", size, time) for name, size, time in walk_images(path) if "/" not in name]
    return sorted(files, key=lambda file: _in_order(file[0]))


def _is_file(name: str, files: Sequence[File]) -> bool:
    return len(files) == 1 and files[0][0] == name


def _in_order(name: str) -> tuple[Any, ...]:
    """Return what sorts frames: by folder, and within it numbers by their value."""
    folder, _, file = name.rpartition("/")
    parts = re.split(r"(\d+)", file)
    return folder, [(int(part), "") if part.isdigit() else (-1, part) for part in parts], file
