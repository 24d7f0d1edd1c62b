"""Which images the probe looks at: a fixed few, so that its figures are comparable over the run."""

from __future__ import annotations

import numpy as np

from patchloom.data import open_source
from patchloom.data.base import Sample, Source, StreamSource
from patchloom.data.subset import MemorySource, SubsetSource
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.features.inputs import kinds_of, require_taken
from patchloom.training.callbacks import ProbeData
from patchloom.training.config import TrainConfig

MOST_REFERENCE, MOST_QUERIES, MOST_STREAMED = 1000, 500, 256


def choose_probe_data(source: Source | StreamSource, config: TrainConfig, encoder: Encoder) -> ProbeData:
    """Return the reference and query samples of a run's probe; neither where the encoder embeds no such samples.

    With `probe_data`, queries come from there and references from the training images. Without, both come from
    the training images (no image is in both). Without labels, or with several per image, there are queries only.

    Raises:
        UsageError: `probe_data` cannot be opened, or its classes are not those of the training images.
    """
    if source.kind.name not in kinds_of(encoder):
        return ProbeData(None, None)
    training = _labelled(_at_hand(source, config.seed))
    if config.probe_data is None:
        order = np.random.default_rng(config.seed).permutation(len(training))[: MOST_REFERENCE + MOST_QUERIES]
        share = min(MOST_QUERIES, max(1, len(order) // 3))
        rest = SubsetSource(training, order[share:])
        labelled = _in_classes(training) and len(rest) > 0
        return ProbeData(rest if labelled else None, SubsetSource(training, order[:share]))
    options = config.source_options()
    apart = open_source(config.probe_data, in_chans=config.in_chans, seed=config.seed, **options)
    require_taken(apart, encoder)
    held_out = _labelled(_at_hand(apart, config.seed))
    queries = _some(held_out, MOST_QUERIES, config.seed)
    if not _in_classes(training) or not _in_classes(held_out):
        return ProbeData(None, queries)
    if training.class_names != held_out.class_names:
        raise UsageError(
            f"probe_data {config.probe_data} has other classes than {config.data}: "
            f"{held_out.class_names} and {training.class_names}"
        )
    return ProbeData(_some(training, MOST_REFERENCE, config.seed), queries)


def _at_hand(source: Source | StreamSource, seed: int) -> Source:
    """Return the source, or some images from all over a stream."""
    if isinstance(source, Source):
        return source
    stream = source.samples(epoch=0, seed=seed, count=MOST_STREAMED)
    samples = [sample for sample in stream if isinstance(sample, Sample)]
    if not samples:
        raise UsageError(f"{source.name} holds no readable {source.kind.name}")
    return MemorySource(source.name, samples, source.class_names, source.kind)


def _in_classes(source: Source) -> bool:
    """Return whether every image has one label, as the k-NN probe needs."""
    return not source.multilabel and bool(source.labelled().all())


def _labelled(source: Source) -> Source:
    """Return the images that have a label, or all where none has."""
    known = source.labelled()
    return SubsetSource(source, np.flatnonzero(known)) if known.any() and not known.all() else source


def _some(source: Source, most: int, seed: int) -> Source:
    if len(source) <= most:
        return source
    order = np.random.default_rng(seed).permutation(len(source))[:most]
    return SubsetSource(source, np.sort(order))
