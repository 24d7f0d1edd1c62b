"""One feature vector per image, for everything that measures or ships features.

>>> from patchloom.data import open_source
>>> features = extract(None, open_source("digits:test"), image_size=8, num_workers=0, limit=100)
>>> features.vectors.shape, features.labels.shape
(torch.Size([100, 192]), torch.Size([100]))
"""

from __future__ import annotations

import copy
import sys
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchloom.data import EvalTransform, SubsetSource, make_loader
from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder, normalize, pooled, set_image_size
from patchloom.encoders import image_size as size_of
from patchloom.errors import UsageError, unknown_name

Pool = Literal["auto", "cls", "avg", "cls+avg"]
Precision = Literal["32", "bf16", "16"]

PIXELS_SIDE = 32
TYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


class Features(NamedTuple):
    """Features of a source, in its order; broken images are left out and listed."""

    vectors: Tensor
    """(n, D) float32, on the CPU."""
    labels: Tensor
    """(n,) int64, -1 where unknown; (n, L) float32, NaN where unknown, from a multi-label source."""
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
    pool: Pool = "auto",
    precision: Precision = "32",
    progress: bool = True,
    limit: int | None = None,
) -> Features:
    """Return the features of all images of a source, in its order.

    The encoder computes in eval mode, and is left as it was found: mode, device and image size.

    Args:
        encoder: The encoder, or None for raw pixels: the image itself as a vector, in [0, 1].
        source: Where the images come from. A stream read by several workers comes in their batches, in turn.
        image_size: Side images are resized and cropped to; default: the encoder's (32 for raw pixels).
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: `auto`, `cpu`, `cuda`, …
        pool: How tokens become a vector, see `encoders.pooled`.
        precision: Number format of the encoder's arithmetic.
        progress: Show a bar on a terminal.
        limit: Take the first so many images only.

    Raises:
        UsageError: No image could be read, the size does not fit the encoder, or there is no such device.
    """
    if precision not in TYPES:
        raise unknown_name("precision", precision, TYPES)
    if limit is not None:
        source, num_workers = _first(source, limit, num_workers)
    if encoder is not None:
        encoder = _at_size(encoder, image_size)
    side = size_of(encoder)[0] if encoder is not None else image_size or PIXELS_SIDE
    target = torch_device(device)
    loader = make_loader(
        source,
        EvalTransform(side),
        batch_size,
        seed=0,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=target.type == "cuda",
    )
    vectors, labels, keys, skipped = [], [], [], []
    with _Evaluating(encoder, target), _arithmetic(target, precision):
        for batch in tqdm(loader, desc="features", disable=not (progress and sys.stderr.isatty()), leave=False):
            skipped += batch["skipped"]
            if not batch["key"]:
                continue
            images = batch["image"].to(target, non_blocking=True).float().div_(255)
            found = images.flatten(1) if encoder is None else pooled(encoder, normalize(images, encoder), pool)
            vectors.append(found.float().cpu())
            labels.append(batch["label"])
            keys += batch["key"]
            if limit is not None and len(keys) >= limit:
                break
    if not vectors:
        raise UsageError(f"{source.name} holds no readable image")
    return Features(torch.cat(vectors)[:limit], torch.cat(labels)[:limit], keys[:limit], skipped)


class _Evaluating:
    """Puts an encoder on a device in eval mode, and back as it was: a part that was frozen in eval mode stays so."""

    def __init__(self, encoder: Encoder | None, device: torch.device) -> None:
        self.encoder = encoder
        self.device = device

    def __enter__(self) -> None:
        if self.encoder is not None:
            self.modes = [(module, module.training) for module in self.encoder.modules()]
            self.before = next(self.encoder.parameters()).device
            self.encoder.eval().to(self.device)

    def __exit__(self, *error: object) -> None:
        if self.encoder is not None:
            for module, training in self.modes:
                module.training = training
            self.encoder.to(self.before)


def _at_size(encoder: Encoder, side: int | None) -> Encoder:
    """Return the encoder set up for square images of a side: itself where it is, else a copy."""
    height, width = size_of(encoder)
    if side is None and height != width:
        raise UsageError(f"the encoder takes images of {height}x{width}; set image_size, features need a square one")
    if side is None or (side, side) == (height, width):
        return encoder
    return set_image_size(copy.deepcopy(encoder), side)


def _first(source: Source | StreamSource, limit: int, num_workers: int) -> tuple[Source | StreamSource, int]:
    """Return what to read for the first images, and by how many workers: what a stream has first, one has to say."""
    if limit < 1:
        raise UsageError(f"limit is {limit}; take at least one image, or leave it out to take all")
    if isinstance(source, StreamSource):
        return source, min(num_workers, 1)
    return SubsetSource(source, np.arange(min(limit, len(source)))), num_workers


def _arithmetic(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    # Also entered for 32, so that a caller's own autocast has no part in what a feature is.
    return torch.autocast(device.type, dtype=TYPES[precision], enabled=precision != "32")


def torch_device(name: str) -> torch.device:
    """Return the device named: `auto` is a GPU where there is one.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"there is no device {name!r} here; use auto, cpu or cuda") from error
