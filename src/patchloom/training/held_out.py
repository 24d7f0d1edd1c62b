"""Images that a run measures on and does not learn from, where its method measures more than an encoder's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchloom.base.sizes import Size
from patchloom.data import EvalTransform, open_source
from patchloom.data.base import Sample, Source, StreamSource, UnreadableImageError
from patchloom.data.pixels import alike
from patchloom.data.reading import reading_options
from patchloom.data.subset import MemorySource, SubsetSource
from patchloom.data.survey import notice
from patchloom.errors import UsageError

if TYPE_CHECKING:
    from patchloom.training.config import TrainConfig

STREAMED = 64


class HeldOut(NamedTuple):
    """What is learned from, and what is measured on."""

    learnt: Source | StreamSource
    source: Source
    apart: bool
    """Whether no image is in both."""


def hold_images_out(source: Source | StreamSource, config: TrainConfig, most: int) -> HeldOut:
    """Return the images to learn from, and up to `most` to measure on: of `probe_data`, else a tenth of the source.

    Of a stream, and of fewer than ten images, those measured on are learned from as well.

    Raises:
        UsageError: `probe_data` cannot be opened, or a stream gives no image.
    """
    if config.probe_data is not None:
        options = {**config.source_options(), **reading_options(source)}
        named = open_source(config.probe_data, in_chans=config.in_chans, seed=config.seed, **options)
        if not isinstance(named, Source):
            raise UsageError(f"probe_data {config.probe_data} is a stream; name a folder or a set of images")
        chosen = np.unique(np.linspace(0, len(named) - 1, min(most or len(named), len(named))).round().astype(int))
        return HeldOut(source, SubsetSource(named, chosen), True)
    if isinstance(source, StreamSource):
        drawn = source.samples(epoch=0, seed=config.seed, count=STREAMED)
        samples = [sample for sample in drawn if isinstance(sample, Sample)]
        if not samples:
            raise UsageError(f"{source.name} holds no readable image")
        notice(f"{source.name} is a stream: measured on {len(samples)} of its images, which are learned from as well")
        return HeldOut(source, MemorySource(source.name, samples, source.class_names, source.kind), False)
    count = min(most, len(source) // 10)
    if not count:
        return HeldOut(source, source, False)
    order = np.random.default_rng(config.seed).permutation(len(source))
    held_out = SubsetSource(source, np.sort(order[:count]))
    return HeldOut(SubsetSource(source, np.sort(order[count:])), held_out, True)


def read_views(source: Source, size: Size) -> tuple[Tensor, Tensor]:
    """Return all readable images of a source, centred at a size, (n, C, H, W), and their labels (n,), -1: none.

    Raises:
        UsageError: None can be read.
    """
    view, images, labels = EvalTransform(size, crop_pct=1.0), [], []
    for index in range(len(source)):
        try:
            sample = source.read(index)
        except UnreadableImageError:
            continue
        images.append(view(sample.image)["image"])
        labels.append(sample.label if isinstance(sample.label, int) else -1)
    if not images:
        raise UsageError(f"no image of {source.name} to measure on can be read")
    return torch.stack(alike(images)), torch.tensor(labels)
