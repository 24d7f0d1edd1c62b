"""Which frames of a video a clip holds: numbers of frames, drawn or fixed. Nothing here reads a video.

Dense: frames so many apart, in one window (VideoMAE on Kinetics). Sparse: a frame from each of equal parts of the whole
video (temporal segments: Wang et al. 2016, arXiv 1608.00859; VideoMAE on Something-Something).

>>> middle_window(100, frames=4, stride=8)
[37, 45, 53, 61]
>>> middle_segments(100, frames=4)
[12, 37, 62, 87]
>>> dense_views(300, frames=16, stride=4, count=5)[1][:3]
[56, 60, 64]
"""

from __future__ import annotations

import torch


def window(length: int, frames: int, stride: int, start: int) -> list[int]:
    """Return the frames of a window from `start` on; beyond the end the last frame is repeated."""
    return [min(start + number * stride, length - 1) for number in range(frames)]


def middle_window(length: int, frames: int, stride: int) -> list[int]:
    """Return the window in the middle of a video."""
    return window(length, frames, stride, max(0, length - span(frames, stride)) // 2)


def drawn_window(length: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """Return a window that begins anywhere it fits."""
    room = max(0, length - span(frames, stride))
    return window(length, frames, stride, int(torch.randint(room + 1, (), generator=generator)))


def span(frames: int, stride: int) -> int:
    """Return how many frames of a video a window covers."""
    return (frames - 1) * stride + 1


def middle_segments(length: int, frames: int) -> list[int]:
    """Return the frame in the middle of each of equal parts of a video."""
    part = length / frames
    return [min(int(part / 2 + part * number), length - 1) for number in range(frames)]


def drawn_segments(length: int, frames: int, generator: torch.Generator) -> list[int]:
    """Return a frame from anywhere in each of equal parts of a video, in order."""
    shares = torch.rand(frames, generator=generator).tolist()
    part = length / frames
    return [min(int(part * (number + share)), length - 1) for number, share in enumerate(shares)]


def dense_views(length: int, frames: int, stride: int, count: int) -> list[list[int]]:
    """Return windows evenly spaced over a video, as VideoMAE tests: of every stride-th frame `frames` in a row.

    Where these are too few the last is repeated. One window alone is the one in the middle.
    """
    sampled = list(range(0, length, stride))
    sampled += sampled[-1:] * (frames - len(sampled))
    room = len(sampled) - frames
    starts = [room // 2] if count == 1 else [int(number * max(room / (count - 1), 0)) for number in range(count)]
    return [sampled[start : start + frames] for start in starts]


def sparse_views(length: int, frames: int, count: int) -> list[list[int]]:
    """Return interleaved clips of a video cut into frames * count parts: clip k has the parts k, k + count, …"""
    places = middle_segments(length, frames * count)
    return [places[number::count] for number in range(count)]
