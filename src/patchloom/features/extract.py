"""One feature vector per image, for everything that measures or ships features."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from patchloom.data import EvalTransform, MemorySource, make_loader
from patchloom.data.base import Sample, Source, StreamSource
from patchloom.encoders import Encoder, normalize, pooled
from patchloom.encoders import image_size as size_of
from patchloom.errors import UsageError


class Features(NamedTuple):
    """Features of a source, in its order; broken images are left out and listed."""

    vectors: Tensor
    """(n, D) float32, on the CPU."""
    labels: Tensor
    """(n,) int64, -1 where unknown."""
    keys: list[str]
    """Names of the n images."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that could not be read."""


@torch.no_grad()
def extract(
    encoder: Encoder | None,
    source: Source | StreamSource,
    *,
    image_size: int | None = None,
    batch_size: int = 128,
    num_workers: int = 2,
    device: str = "auto",
    pool: Any = "auto",
    progress: bool = True,
    limit: int | None = None,
) -> Features:
    """Return the features of all images of a source, in its order.

    Args:
        encoder: The encoder, or None for raw pixels: the image itself as a vector, in [0, 1].
        source: Where the images come from.
        image_size: Side images are resized and cropped to; default: the encoder's (32 for raw pixels).
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: `auto`, `cpu`, `cuda`, …; the encoder is moved there and back.
        pool: How tokens become a vector, see `encoders.pooled`.
        progress: Show a bar on a terminal.
        limit: Take the first so many images of a stream only.

    Raises:
        UsageError: No image could be read.
    """
    if limit is not None and isinstance(source, StreamSource):
        read = islice(source.samples(epoch=0, seed=0, shuffle=False), limit)
        source = MemorySource(source.name, [sample for sample in read if isinstance(sample, Sample)])
    side = image_size or (32 if encoder is None else size_of(encoder)[0])
    loader = make_loader(source, EvalTransform(side), batch_size, seed=0, shuffle=False, num_workers=num_workers)
    target = _device(device)
    vectors, labels, keys, skipped = [], [], [], []
    with _Evaluating(encoder, target):
        shown = tqdm(loader, desc="features", disable=not (progress and sys.stderr.isatty()), leave=False)
        for batch in shown:
            skipped += batch["skipped"]
            if not batch["key"]:
                continue
            images = batch["image"].to(target).float().div_(255)
            found = images.flatten(1) if encoder is None else pooled(encoder, normalize(images, encoder), pool)
            vectors.append(found.float().cpu())
            labels.append(batch["label"])
            keys += batch["key"]
    if not vectors:
        raise UsageError(f"{source.name} holds no readable image")
    return Features(torch.cat(vectors), torch.cat(labels), keys, skipped)


class _Evaluating:
    """Puts an encoder on a device in eval mode, and back as it was."""

    def __init__(self, encoder: Encoder | None, device: torch.device) -> None:
        self.encoder = encoder
        self.device = device

    def __enter__(self) -> None:
        if self.encoder is not None:
            self.training = self.encoder.training
            self.before = next(self.encoder.parameters()).device
            self.encoder.eval().to(self.device)

    def __exit__(self, *error: object) -> None:
        if self.encoder is not None:
            self.encoder.train(self.training).to(self.before)


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
