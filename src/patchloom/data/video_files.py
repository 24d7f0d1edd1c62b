"""Frames of a video file by their number: MP4, WebM, GIF, AVI, Matroska, QuickTime, through PyAV (extra `video`).

A file is looked through once without decoding it: the time stamps of its packets say how many frames there are and
when each is shown. Numbers count evenly in time. Where frames are not shown equally long (variable frame rate), number
k is the frame nearest to the k-th of as many equal steps. To read a few, decoding begins at the key frame before them.

>>> index = look_through("film.mp4", "film.mp4")  # doctest: +SKIP
>>> frames = read_frames("film.mp4", "film.mp4", index, [0, 4, 8])  # doctest: +SKIP
>>> frames[0].shape  # doctest: +SKIP
torch.Size([3, 240, 320])
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from patchloom.data.base import UnreadableImageError
from patchloom.errors import MissingExtraError

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif", ".avi", ".mpg", ".mpeg", ".ogv"})


@dataclass(frozen=True)
class VideoIndex:
    """When the frames of a file are shown."""

    stamps: np.ndarray
    """(n,) int64, rising: time stamps of frames, evenly spaced as far as there are such; see the module."""
    keys: np.ndarray
    """(k,) int64, rising: time stamps at which decoding may begin."""

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.stamps)


def look_through(data: Path | bytes | str, key: str) -> VideoIndex:
    """Return when the frames of a video file are shown; nothing is decoded.

    Args:
        data: The file's path, or its content.
        key: Name of the video, for the error.

    Raises:
        UnreadableImageError: No video, one without frames, or one that is cut short.
        MissingExtraError: PyAV is not installed.
    """
    with _opened(data, key) as (container, stream):
        told = int(stream.frames)
        packets = [
            (packet.pts if packet.pts is not None else packet.dts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
    shown = sorted((int(stamp), is_key) for stamp, is_key in packets if stamp is not None)
    if not shown:
        raise UnreadableImageError(key, "it has no frames")
    if len(packets) < told:
        raise UnreadableImageError(key, f"it is cut short: {len(packets)} of {told} frames are there")
    stamps = np.unique([stamp for stamp, _ in shown])
    keys = np.array([stamp for stamp, is_key in shown if is_key] or [shown[0][0]], dtype=np.int64)
    return VideoIndex(evenly(stamps), np.unique(keys))


def evenly(stamps: np.ndarray) -> np.ndarray:
    """Return, for as many equal steps in time as there are frames, the time stamp of the nearest frame.

    >>> evenly(np.array([0, 10, 20, 60])).tolist()  # steps of 20
    [0, 20, 20, 60]
    """
    times = np.linspace(stamps[0], stamps[-1], len(stamps))
    after = np.searchsorted(stamps, times).clip(1, len(stamps) - 1) if len(stamps) > 1 else np.zeros(1, int)
    before = np.maximum(after - 1, 0)
    nearest: np.ndarray = np.where(times - stamps[before] < stamps[after] - times, stamps[before], stamps[after])
    return nearest


def read_frames(
    data: Path | bytes | str, key: str, index: VideoIndex, places: Sequence[int], grey: bool = False
) -> list[Tensor]:
    """Return frames of a video file by their numbers.

    Args:
        data: The file's path, or its content.
        key: Name of the video, for the error.
        index: What `look_through` found.
        places: Numbers of frames, in any order.
        grey: Read grey frames, not RGB.

    Returns:
        Of each a tensor (3 or 1, H, W) uint8, upright and with square pixels.

    Raises:
        UnreadableImageError: A frame cannot be decoded, or sizes change on the way.
    """
    asked = index.stamps[np.asarray(places)]
    found: dict[int, Tensor] = {}
    with _opened(data, key) as (container, stream):
        frames = _from_key_frames(container, stream, np.unique(asked), index.keys)
        for stamp, frame in frames:
            if frame is None:
                raise UnreadableImageError(key, f"the frame at {float(stamp * stream.time_base):.2f} s is missing")
            found[int(stamp)] = _as_tensor(frame, stream.sample_aspect_ratio, grey)
    return [found[int(stamp)] for stamp in asked]


def _from_key_frames(container: Any, stream: Any, stamps: np.ndarray, keys: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yield each of rising time stamps with the frame shown from it on, None where there is none.

    Groups of frames of which none is wanted are jumped over.
    """
    decoded: Iterator[Any] | None = None
    group, last = 0, None
    for stamp in stamps.tolist():
        wanted = int(np.searchsorted(keys, stamp, "right")) - 1
        if decoded is None or wanted > group + 1:
            if wanted > 0 and container.format.name != "gif":
                container.seek(int(keys[wanted]), stream=stream)
            decoded = container.decode(stream)
        group = wanted
        if last is None or last.pts is None or last.pts < stamp:
            last = next((frame for frame in decoded if frame.pts is not None and frame.pts >= stamp), None)
        if wanted > 0 and last is not None and last.pts > stamp:  # the jump led too far
            container.seek(int(keys[0]), stream=stream)
            decoded = container.decode(stream)
            last = next((frame for frame in decoded if frame.pts is not None and frame.pts >= stamp), None)
        yield stamp, last


def _as_tensor(frame: Any, aspect: Any, grey: bool) -> Tensor:
    """Return a decoded frame as (C, H, W) uint8, upright, with square pixels."""
    width = frame.width
    if aspect and aspect != 1:
        width = max(1, round(width * float(aspect)))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=frame.height)
    if turns := round(getattr(frame, "rotation", 0) / 90) % 4:
        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return F.rgb_to_grayscale(image) if grey else image


def require_decoder() -> Any:
    """Return the module of PyAV.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video", "reading video files") from error
    return av


@contextmanager
def _opened(data: Path | bytes | str, key: str) -> Iterator[tuple[Any, Any]]:
    """Open a file and its pictures; whatever goes wrong inside is told as an unreadable video."""
    av = require_decoder()
    av.logging.set_level(av.logging.PANIC)  # damage is told by errors, not on the error stream
    try:
        with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                raise UnreadableImageError(key, "it has no frames")
            streams[0].codec_context.thread_count = 1  # data workers share the cores among them
            yield container, streams[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableImageError(key, f"not a video that can be decoded ({reason.lower()})") from error


def _is_cover(stream: Any) -> bool:
    """Return whether a stream is the picture of a cover."""
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()
