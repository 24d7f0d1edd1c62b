"""One sample of a source: a tensor of the source's kind, and what belongs to it, by name.

A mask, a caption, the spacing of a volume's voxels: each stands in `named` under its own name, and a transform says by
`reads` which of them it takes.

>>> import torch
>>> from patchloom.data.transforms import EvalTransform
>>> sample = Sample(torch.zeros(3, 80, 120, dtype=torch.uint8), 1, "a.png", {"words": torch.tensor([4, 2])})
>>> views = transformed(WithNamed(EvalTransform(64), "words"), sample, torch.Generator())
>>> views["image"].shape, views["words"]
(torch.Size([3, 64, 64]), tensor([4, 2]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UsageError

Transform = Callable[..., dict[str, Any]]
"""`(value, generator) -> what a batch is stacked of, by name`; one that has `reads` takes those by keyword, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sample as it leaves a source."""

    value: Tensor
    """What the source is of, with the axes of its kind; of an image (C, H, W), uint8, or float32 in [0, 1] where it is
    stored deeper than 8 bits."""
    label: int | np.ndarray
    """Class index, -1 when unknown; of a multi-label source (L,) float32 in [0, 1], NaN where unknown."""
    key: str
    """Name of the sample within its source: a relative path (as `patchloom.io.printable` writes it) or a stable id."""
    named: Mapping[str, Tensor | str] = field(default_factory=dict)
    """What else belongs to it: `mask` ((H, W) uint8, 255 where unknown), `caption` (empty where an image of a source
    with captions has none), `spacing` …"""

    @property
    def image(self) -> Tensor:
        """The value, of a source of images.

        Raises:
            UsageError: It is no image.
        """
        if self.value.ndim != 3:
            raise UsageError(f"images are taken here, and '{self.key}' has {self.value.ndim} axes in place of three")
        return self.value


def transformed(transform: Transform, sample: Sample, generator: torch.Generator) -> dict[str, Any]:
    """Return what a transform makes of a sample: of its value, and of what it `reads` besides.

    Raises:
        UsageError: The sample lacks something that the transform reads.
    """
    wanted: tuple[str, ...] = getattr(transform, "reads", ())
    if missing := [name for name in wanted if name not in sample.named]:
        raise UsageError(f"'{sample.key}' has no {missing[0]}, which is needed here")
    return transform(sample.value, generator, **{name: sample.named[name] for name in wanted})


class OnDemand(Mapping[str, Any]):
    """What is named, made when it is asked for: most transforms read none of it.

    >>> OnDemand(caption=lambda: "a cat")["caption"]
    'a cat'
    """

    def __init__(self, **makers: Callable[[], Tensor | str]) -> None:
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor | str:
        """Make what is named."""
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self.makers)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.makers)


def at_hand(sample: Sample, transform: Transform) -> Sample:
    """Return a sample with what a transform reads made, so that what cannot be read is found here.

    Raises:
        UnreadableImageError: Something that belongs to the sample cannot be read.
    """
    if not isinstance(sample.named, OnDemand):
        return sample
    wanted = [name for name in getattr(transform, "reads", ()) if name in sample.named]
    return replace(sample, named={name: sample.named[name] for name in wanted})


class WithNamed:
    """A transform of the value; what is named goes into the batch as it is.

    Args:
        view: Transform of the value.
        names: What to hand on.
    """

    def __init__(self, view: Transform, *names: str) -> None:
        self.view, self.reads = view, names

    def __call__(self, value: Tensor, generator: torch.Generator, **named: Tensor | str) -> dict[str, Any]:
        """Return the views of the value, and what was named."""
        return {**self.view(value, generator), **named}
