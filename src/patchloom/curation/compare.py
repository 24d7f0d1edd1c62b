"""By what images are compared, patterns or an encoder's features, and from which similarity on they are copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.curation.config import LookOptions
from patchloom.curation.look import Look, copies_of, look_at, pattern
from patchloom.data import MemorySource, Sample, open_source
from patchloom.data.base import Source, StreamSource, UnreadableImageError, spread
from patchloom.data.reading import reading_options
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, in_chans
from patchloom.features.extract import extract
from patchloom.models.bundle import open_encoder

SAMPLE, FOUND, LOWEST = 200, 0.05, 0.5
"""Images that copies are made of; share of their copies that may fall below the threshold, which is this at least."""
PAIRS, ALIKE = 100_000, 1e-3
"""Random pairs that are drawn; share of them, in a large pile, that may be as similar as copies are."""


@dataclass
class Compared:
    """Images with the vectors they are compared by."""

    source: Source | StreamSource
    look: Look
    vectors: Tensor
    """(n, d), of length 1, or 0 where an image has no pattern."""
    threshold: float
    """Cosine similarity from which on two images are near-duplicates."""
    facts: dict[str, Any] = field(default_factory=dict)
    """How the threshold was found."""
    encoder: Encoder | None = None

    def of(self, name: str, config: LookOptions) -> Compared:
        """Return other images, read and compared as these are."""
        options = {**config.source_options(), **reading_options(self.source)}
        source = open_source(name, in_chans=self.source.in_chans, by_index=True, **options)
        look = look_at(source, batch_size=config.batch_size, num_workers=config.num_workers, what=name)
        if self.encoder is None:
            return Compared(source, look, self.look.compared(look.patterns), self.threshold)
        return Compared(source, look, _features(self.encoder, source, config), self.threshold, encoder=self.encoder)


def compared(config: LookOptions) -> Compared:
    """Look at the images of a command, and settle from which similarity on two of them are copies.

    Raises:
        UsageError: No such data or encoder, or no image opens.
    """
    encoder = None if config.encoder is None else open_encoder(config.encoder)
    channels = config.in_chans if encoder is None else in_chans(encoder)
    source = open_source(config.data, in_chans=channels, by_index=True, model=encoder, **config.source_options())
    look = look_at(source, batch_size=config.batch_size, num_workers=config.num_workers)
    vectors = look.compared() if encoder is None else _features(encoder, source, config)
    result = Compared(source, look, vectors, config.threshold or 1.0, encoder=encoder)
    strangers = _strangers(vectors, config.seed)
    # A copy or two of each image is no sign that images are alike, and in a small pile many of the random pairs.
    level = max(ALIKE, 2 / len(vectors))
    by = "pattern of light and dark" if encoder is None else "features of the encoder"
    result.facts = {"compared_by": by}
    if config.threshold is None:
        copies = _similarity_of_copies(result, config)
        # Images that are much alike must not all pass for copies because copies of tiny ones look unlike.
        alike = float(strangers.quantile(1 - level)) if len(strangers) else 0.0
        result.threshold = min(1.0, max(LOWEST, alike, float(np.quantile(copies, FOUND)) if len(copies) else 0.99))
        found = float((copies >= result.threshold).mean()) if len(copies) else None
        result.facts |= {"copies_made": len(copies), "copies_found": found}
    above = float((strangers >= result.threshold).float().mean()) if len(strangers) else 0.0
    result.facts |= {"threshold": result.threshold, "random_pairs_above": above}
    if above > 0.9 * level:
        notice(
            f"{above:.1%} of random pairs of {source.name} are as similar as copies are (threshold "
            f"{result.threshold:.3f}): the images are much alike, or the {by} cannot tell them apart; "
            f"set --threshold higher{' or give an --encoder' if encoder is None else ''}"
        )
    return result


def _features(encoder: Encoder, source: Source | StreamSource, config: LookOptions) -> Tensor:
    features = extract(
        encoder, source, batch_size=config.batch_size, num_workers=config.num_workers, device=config.device
    )
    return F.normalize(features.vectors, dim=1)


def _similarity_of_copies(images: Compared, config: LookOptions) -> np.ndarray:
    """Return how similar copies made of a sample of the images are to them, by the vectors in use."""
    source, look = images.source, images.look
    if isinstance(source, StreamSource):
        notice(f"{source.name} can only be read from front to back: no copies are made to find the threshold")
        return np.zeros(0)
    plain = look.plain
    chosen = [place for place in spread(len(look), 4 * SAMPLE) if not plain[place]][:SAMPLE]
    originals, copies = [], []
    for place in chosen:
        try:
            image = source.read(int(look.places[place])).image
        except UnreadableImageError:
            continue
        made = copies_of(image)
        originals += [place] * len(made)
        copies += made
    if not copies:
        return np.zeros(0)
    if images.encoder is None:
        vectors = look.compared(torch.stack([pattern(copy) for copy in copies]))
    else:
        held = MemorySource("copies", [Sample(copy, -1, str(number)) for number, copy in enumerate(copies)])
        vectors = F.normalize(
            extract(images.encoder, held, num_workers=0, device=config.device, progress=False).vectors, dim=1
        )
    return (vectors * images.vectors[originals]).sum(1).numpy()


def _strangers(vectors: Tensor, seed: int) -> Tensor:
    """Return the similarities of random pairs of different images."""
    if len(vectors) < 2:
        return torch.zeros(0)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(vectors), (PAIRS,), generator=generator)
    second = (first + torch.randint(1, len(vectors), (PAIRS,), generator=generator)) % len(vectors)
    pairs = zip(first.split(8192), second.split(8192), strict=True)
    return torch.cat([(vectors[one] * vectors[other]).sum(1) for one, other in pairs])
