"""What training does to clouds and spectrograms (ViT-Lens, arXiv 2311.16081, appendix)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchloom.systems.clip.text import tokenize

MOST_DROPPED, SCALES, SHIFT, WOBBLE, MOST_WOBBLE = 0.875, (0.8, 1.25), 0.1, 0.06, 0.18


def varied_cloud(points: Tensor, generator: torch.Generator) -> Tensor:
    """Return a cloud (N, 3) with points dropped, larger or smaller, moved, and turned, most about the third axis.

    Dropped points become copies of the first, so that there are as many.
    """

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    share = float(between(0.0, MOST_DROPPED))
    dropped = torch.rand(len(points), generator=generator) <= share
    points = torch.where(dropped[:, None], points[:1], points)
    points = points * between(*SCALES) + between(-SHIFT, SHIFT, 3)
    angles = (WOBBLE * torch.randn(3, generator=generator)).clamp(-MOST_WOBBLE, MOST_WOBBLE)
    angles[2] += between(0.0, 2 * math.pi)
    return points @ rotation(angles).T


def rotation(angles: Tensor) -> Tensor:
    """Return the matrix (3, 3) of turns about the first, the second, then the third axis, in radians."""
    (cx, cy, cz), (sx, sy, sz) = angles.cos().tolist(), angles.sin().tolist()
    about_x = torch.tensor([[1.0, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = torch.tensor([[cy, 0, sy], [0, 1.0, 0], [-sy, 0, cy]])
    about_z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1.0]])
    return about_z @ about_y @ about_x


def varied_spectrogram(values: Tensor, generator: torch.Generator, tones: int = 12, frames: int = 48) -> Tensor:
    """Return a spectrogram (bins, T) with a band of tones and a stretch of time set to 0 (SpecAugment)."""
    values = values.clone()
    for axis, most in ((0, tones), (1, frames)):
        length = int(torch.randint(min(most, values.shape[axis] - 1) + 1, (), generator=generator))
        start = int(torch.randint(values.shape[axis] - length + 1, (), generator=generator))
        values.narrow(axis, start, length).zero_()
    return values


class SenseView:
    """A sample of a sense, varied or as it is; its caption goes into the batch as tokens.

    Args:
        kind: Name of the kind, under which the sample goes into the batch.
        context_length: Tokens of a caption; None: captions are not read.
        varied: Whether it is varied.
    """

    def __init__(self, kind: str, context_length: int | None, varied: bool) -> None:
        self.kind, self.context_length, self.varied = kind, context_length, varied
        self.reads = () if context_length is None else ("caption",)

    def __call__(self, value: Tensor, generator: torch.Generator, *, caption: str = "") -> dict[str, Any]:
        """Return the sample and, where captions are read, `tokens`, `text_id` and `cut`."""
        if self.varied:
            value = (varied_cloud if self.kind == "points" else varied_spectrogram)(value, generator)
        made: dict[str, Any] = {self.kind: value}
        if self.context_length is not None:
            text = tokenize(caption, self.context_length)
            made |= {"tokens": text.tokens, "text_id": text.text_id, "cut": text.cut}
        return made
