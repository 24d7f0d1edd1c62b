"""Less than full masks: boxes around the parts of each class, or a few points of it, made of the masks at hand.

What cheaper labels would be worth is measured so before anybody draws them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Sample, Source
from patchloom.data.order import draw_seed
from patchloom.data.segmentation import MaskSource
from patchloom.systems.vit_p.proposals import components


class WeakSource(Source):
    """Images of a source with masks, of which boxes or points alone are known.

    Args:
        source: The images with their masks.
        labels: `boxes`: around each connected component of each class; `points`: so many of each class in an image.
        per_class: How many points.
        seed: Of their places, which are the same every time an image is read.
    """

    class_names: list[str]

    def __init__(self, source: MaskSource, labels: str, per_class: int = 20, seed: int = 0) -> None:
        self.source, self.known, self.per_class, self.seed = source, labels, per_class, seed
        self.name, self.class_names = source.name, source.class_names
        self.in_chans, self.values, self.channels = source.in_chans, source.values, source.channels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def key(self, index: int) -> str:
        """Return the name of image number `index`."""
        return self.source.key(index)

    def fingerprint(self) -> str:
        """Return a short hash of the images and their masks."""
        return self.source.fingerprint()

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and files of up to `count` images."""
        return self.source.stored(count)

    def read(self, index: int) -> Sample:
        """Return image number `index` with its `boxes` and `box_classes`, or `points` and `point_classes`."""
        sample = self.source.read(index)
        mask: Any = sample.named["mask"]
        if self.known == "boxes":
            named: Mapping[str, Tensor] = dict(zip(("boxes", "box_classes"), boxes_of(mask), strict=True))
        else:
            generator = torch.Generator().manual_seed(draw_seed(self.seed, 0, 0, index))
            places = points_of(mask, self.per_class, generator)
            named = dict(zip(("points", "point_classes"), places, strict=True))
        return Sample(sample.value, sample.label, sample.key, named)


def boxes_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes (n, 4), left, top, right, bottom, of the connected components of a mask (H, W), and classes."""
    from scipy.ndimage import find_objects

    numbers, _ = components(mask)
    values = mask.numpy()
    boxes, classes = [], []
    for number, (rows, columns) in enumerate(find_objects(numbers.numpy() + 1)):
        inside = numbers[rows, columns].numpy() == number
        row, column = np.argwhere(inside)[0]
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
        classes.append(int(values[rows.start + row, columns.start + column]))
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(classes, dtype=torch.int64)


def points_of(mask: Tensor, per_class: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return up to `per_class` points (n, 2), row and column, of each class in a mask (H, W), and their classes."""
    places, classes = [], []
    for value in mask.unique().tolist():
        if value == 255:
            continue
        found = (mask == value).nonzero()
        chosen = torch.randperm(len(found), generator=generator)[:per_class]
        places.append(found[chosen].float())
        classes += [value] * len(chosen)
    return torch.cat([torch.zeros(0, 2), *places]), torch.tensor(classes, dtype=torch.int64)
