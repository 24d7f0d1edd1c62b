"""Segmenting whole volumes in windows that overlap, a slab at a time.

The windows and their plain mean are those of MONAI's `sliding_window_inference` (constant blending), and so are the
logits. What is kept is the slab of planes that windows still to come reach into, instead of the logits and counts of
the whole volume.

>>> windows = window_starts(100, 96, 48), window_starts(256, 96, 48)
>>> windows
([0, 4], [0, 48, 96, 144, 160])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError

Model = Callable[[Tensor], Tensor]


def window_starts(side: int, window: int, step: int) -> list[int]:
    """Return where windows begin along an axis; the last one is moved back to end where the axis does."""
    count = -(-max(side - window, 0) // step) + 1
    return [min(number * step, max(side - window, 0)) for number in range(count)]


def window_steps(window: Sequence[int], overlap: float) -> tuple[int, ...]:
    """Return the steps between windows that overlap by a share of their sides.

    Raises:
        UsageError: The share is not in [0, 1).
    """
    if not 0 <= overlap < 1:
        raise UsageError(f"overlap is {overlap}; it must be at least 0 and below 1")
    return tuple(max(1, int(side * (1 - overlap))) for side in window)


@torch.inference_mode()
def slabs(
    model: Model, volume: Tensor, window: Sequence[int], overlap: float = 0.5, batch_size: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of a volume from its first plane to its last, so many planes at a time.

    Args:
        model: Volumes (B, C, *window) to logits (B, K, *window).
        volume: (C, D, H, W), normalised; one that is smaller than a window is padded with zeros all round.
        window: Sides of the windows.
        overlap: Overlap of neighbours, as a share of their sides; where several windows see a voxel, the mean of their
            logits counts.
        batch_size: Windows at a time.

    Yields:
        The planes, and their logits (K, d, H, W) float32, which the next turn overwrites.
    """
    sides = tuple(volume.shape[1:])
    short = [max(have - side, 0) for have, side in zip(window, sides, strict=True)]
    if any(short):
        volume = F.pad(volume, [part for missing in reversed(short) for part in (missing // 2, missing - missing // 2)])
    padded = tuple(volume.shape[1:])
    steps = window_steps(window, overlap)
    deep, *plane = (window_starts(*axis) for axis in zip(padded, window, steps, strict=True))
    across = _counts(padded[1], window[1], plane[0])[:, None] * _counts(padded[2], window[2], plane[1])
    down = _counts(padded[0], window[0], deep)
    kept = [slice(missing // 2, missing // 2 + side) for missing, side in zip(short, sides, strict=True)]
    held: Tensor | None = None
    for number, top in enumerate(deep):
        places = list(itertools.product(*plane))
        for first in range(0, len(places), batch_size):
            chunk = places[first : first + batch_size]
            crops = [volume[:, top : top + window[0], y : y + window[1], x : x + window[2]] for y, x in chunk]
            logits = model(torch.stack(crops) if len(crops) > 1 else crops[0][None])
            if held is None:
                held = at_least_float32(logits).new_zeros(logits.shape[1], window[0], *padded[1:])
            for (y, x), part in zip(chunk, logits, strict=True):
                held[:, :, y : y + window[1], x : x + window[2]] += part
            del logits, crops
        assert held is not None
        ready = (deep[number + 1] if number + 1 < len(deep) else padded[0]) - top
        share = (down[top : top + ready, None, None] * across).reciprocal().to(held)
        start, end = max(top, kept[0].start), min(top + ready, kept[0].stop)
        if end > start:
            done = held[:, start - top : end - top]
            done *= share[start - top : end - top]
            yield slice(start - kept[0].start, end - kept[0].start), done[:, :, kept[1], kept[2]]
        rest = window[0] - ready
        for each in held if rest else ():  # class by class: the planes that stay move to the front
            each[:rest] = each[ready:].clone()
        held[:, rest:] = 0


def sliding_logits(
    model: Model, volume: Tensor, window: Sequence[int], overlap: float = 0.5, batch_size: int = 1
) -> Tensor:
    """Return the logits (K, D, H, W) of a volume (C, D, H, W), see `slabs`."""
    found: Tensor | None = None
    for planes, logits in slabs(model, volume, window, overlap, batch_size):
        if found is None:
            found = logits.new_empty(len(logits), *volume.shape[1:])
        found[:, planes] = logits
    assert found is not None
    return found


def sliding_classes(
    model: Model, volume: Tensor, window: Sequence[int], overlap: float = 0.5, batch_size: int = 1
) -> Tensor:
    """Return the class of every voxel, (D, H, W) uint8 on the CPU, of a volume (C, D, H, W), see `slabs`."""
    classes = torch.empty(tuple(volume.shape[1:]), dtype=torch.uint8)
    for planes, logits in slabs(model, volume, window, overlap, batch_size):
        classes[planes] = logits.argmax(0).to(torch.uint8).cpu()
    return classes


def _counts(side: int, window: int, starts: Sequence[int]) -> Tensor:
    """Return how many windows see each place along an axis, (side,) float32."""
    counts = torch.zeros(side)
    for start in starts:
        counts[start : start + window] += 1
    return counts
