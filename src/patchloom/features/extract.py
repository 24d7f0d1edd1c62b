"""One feature vector per image, for everything that measures or ships features.

>>> from patchloom.data import open_source
>>> features = extract(None, open_source("digits:test"), image_size=8, num_workers=0, limit=100)
>>> features.vectors.shape, features.labels.shape
(torch.Size([100, 192]), torch.Size([100]))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchloom.base.choices import Pool, Precision, View
from patchloom.base.progress import track
from patchloom.base.sizes import Size, compact, pair
from patchloom.data import SubsetSource, make_loader
from patchloom.data.base import Source, StreamSource
from patchloom.data.pixels import unit
from patchloom.encoders import (
    Encoder,
    Grid,
    input_size,
    intermediate_layers,
    normalize,
    num_prefix_tokens,
    pooled,
    set_image_size,
)
from patchloom.errors import UsageError, unknown_name
from patchloom.features.inputs import require_taken

PIXELS_SIDE = 32
TYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


# Reason in `Features.skipped` of an image that is left out where labels are needed.
NO_LABEL = "it has no label"


class Features(NamedTuple):
    """Features of a source, in its order; broken images are left out and listed."""

    vectors: Tensor
    """(n, D) float32, on the CPU."""
    labels: Tensor
    """(n,) int64, -1 where unknown; (n, L) float32, NaN where unknown, from a multi-label source."""
    keys: list[str]
    """Names of the n images."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that could not be read, or that an evaluation left out as they have no label."""


Take = Callable[[Tensor, Tensor, list[str]], bool]
Produce = Callable[[Take], list[tuple[str, str]]]


def extract(
    encoder: Encoder | None,
    source: Source | StreamSource,
    *,
    image_size: Size | None = None,
    batch_size: int = 128,
    num_workers: int = 2,
    device: str = "auto",
    pool: Pool = "auto",
    layers: Sequence[int] | None = None,
    precision: Precision = "32",
    view: View = "crop",
    progress: bool = True,
    limit: int | None = None,
    places: list[int] | None = None,
) -> Features:
    """Return the features of all images of a source, in its order.

    The encoder computes in eval mode, and is left as it was found: mode, device and image size.

    Args:
        encoder: The encoder, or None for raw pixels: the image itself as a vector, in [0, 1].
        source: Where the images come from. A stream read by several workers comes in their batches, in turn.
        image_size: Side images are resized and cropped to, or (height, width); default: the encoder's (32 for raw
            pixels).
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: `auto`, `cpu`, `cuda`, …
        pool: How tokens become a vector, see `encoders.pooled`.
        layers: Blocks whose output is taken, counted from 0, or from the end where negative; default: what the encoder
            gives out. With it the vectors of the blocks stand one after the other, see `vector_parts`.
        precision: Number format of the encoder's arithmetic.
        view: `crop`, the centre of the image, or `whole`, all of it out of proportion with each channel stretched.
        progress: Say how far it has come.
        limit: Take the first so many images only.
        places: Filled with the numbers of the images within the source.

    Raises:
        UsageError: No image could be read, the size does not fit the encoder, or there is no such device.
    """
    if limit is not None:
        source = _first(source, limit)
    options: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size, "num_workers": num_workers}
    options |= {"device": device, "pool": pool, "layers": layers, "precision": precision, "view": view}
    options |= {"progress": progress, "places": places}
    return rows_in_memory(lambda take: extract_into(take, encoder, source, **options), limit)


def rows_in_memory(produce: Produce, limit: int | None = None) -> Features:
    """Return the rows that `produce` hands on, the first so many of them with a limit."""
    vectors: list[Tensor] = []
    labels: list[Tensor] = []
    keys: list[str] = []

    def take(rows: Tensor, known: Tensor, names: list[str]) -> bool:
        vectors.append(rows)
        labels.append(known)
        keys.extend(names)
        return limit is None or len(keys) < limit

    skipped = produce(take)
    return Features(torch.cat(vectors)[:limit], torch.cat(labels)[:limit], keys[:limit], skipped)


@torch.no_grad()
def extract_into(
    take: Callable[[Tensor, Tensor, list[str]], bool],
    encoder: Encoder | None,
    source: Source | StreamSource,
    *,
    image_size: Size | None = None,
    batch_size: int = 128,
    num_workers: int = 2,
    device: str = "auto",
    pool: Pool = "auto",
    layers: Sequence[int] | None = None,
    precision: Precision = "32",
    view: View = "crop",
    progress: bool = True,
    places: list[int] | None = None,
) -> list[tuple[str, str]]:
    """Hand the features of a source on batch by batch, so that they need never be in memory together.

    Args:
        take: Called with vectors (B, D) float32 on the CPU, labels and keys of each batch; returning False ends the
            reading.
        encoder: As for `extract`, like all that follow.
        source: Where the images come from.
        image_size: Side of the images, or (height, width).
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: `auto`, `cpu`, `cuda`, …
        pool: How tokens become a vector.
        layers: Blocks whose output is taken.
        precision: Number format of the encoder's arithmetic.
        view: What the encoder is shown of an image.
        progress: Say how far it has come.
        places: Filled with the numbers of the images within the source.

    Returns:
        Name and reason of images that could not be read.

    Raises:
        UsageError: As for `extract`.
    """
    if precision not in TYPES:
        raise unknown_name("precision", precision, TYPES)
    if layers is not None and encoder is None:
        raise UsageError("raw pixels have no layers; leave layers out")
    require_taken(source, encoder)
    if encoder is not None:
        encoder = _at_size(encoder, image_size)
    target = torch_device(device)
    loader = make_loader(
        source,
        source.kind.eval_view(view, side_of(encoder, None if encoder is not None else image_size)),
        batch_size,
        seed=0,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=target.type == "cuda",
    )
    skipped: list[tuple[str, str]] = []
    # On a GPU the vectors of a batch are fetched while the next one is computed.
    behind = 1 if target.type == "cuda" else 0
    held: list[tuple[Tensor, Tensor, list[str]]] = []
    going, read = True, 0
    with _Evaluating(encoder, target), _arithmetic(target, precision):
        for batch in track(loader, "features", unit="batch", show=progress):
            skipped += batch["skipped"]
            if not batch["key"]:
                continue
            images = unit(batch[source.kind.name].to(target, non_blocking=True))
            vectors = images.flatten(1) if encoder is None else _vectors(encoder, images, pool, layers)
            held.append((vectors, batch["label"], batch["key"]))
            read += len(batch["key"])
            if places is not None:
                places += batch["index"].tolist()
            if len(held) > behind:
                going = _hand_on(held.pop(0), take)
            if not going:
                break
        while going and held:
            going = _hand_on(held.pop(0), take)
    if not read:
        raise UsageError(f"{source.name} holds no readable {source.kind.name}")
    return skipped


def _hand_on(batch: tuple[Tensor, Tensor, list[str]], take: Callable[[Tensor, Tensor, list[str]], bool]) -> bool:
    vectors, labels, keys = batch
    return take(vectors.float().cpu(), labels, keys)


def side_of(encoder: Encoder | None, image_size: Size | None) -> int | Grid:
    """Return the side, or the sides without channels, in pixels at which `extract` shows samples to an encoder."""
    size: int | Grid = image_size or (input_size(encoder) if encoder is not None else PIXELS_SIDE)
    return compact((size[0], size[1])) if not isinstance(size, int) and len(size) == 2 else size


def vector_parts(encoder: Encoder, pool: Pool, layers: Sequence[int]) -> list[tuple[int, str]]:
    """Return the block and the kind (`cls` or `avg`) of each part, of the encoder's width, of a vector of `layers`.

    `auto` takes the class token, or the mean over patches where the encoder has none. Each block's output goes through
    the encoder's final norm.

    Raises:
        UsageError: `cls` for an encoder without class token.
    """
    has_class_token = num_prefix_tokens(encoder) > 0
    kinds = (["cls"] if has_class_token else ["avg"]) if pool == "auto" else pool.split("+")
    if "cls" in kinds and not has_class_token:
        raise UsageError(f"the encoder has no class token, so pool={pool} cannot be; use pool=avg")
    return [(layer, kind) for layer in layers for kind in kinds]


def _vectors(encoder: Encoder, images: Tensor, pool: Pool, layers: Sequence[int] | None) -> Tensor:
    images = normalize(images, encoder)
    if layers is None:
        return pooled(encoder, images, pool)
    tapped = dict(zip(layers, intermediate_layers(encoder, images, list(layers)), strict=True))
    parts = [
        tapped[layer].prefix[:, 0] if kind == "cls" else tapped[layer].patches.mean(1)
        for layer, kind in vector_parts(encoder, pool, layers)
    ]
    return torch.cat(parts, 1)


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


def _at_size(encoder: Encoder, size: Size | None) -> Encoder:
    """Return the encoder set up for images of a size: itself where it is, else a copy."""
    if size is None or pair(size) == input_size(encoder)[-2:]:
        return encoder
    return set_image_size(copy.deepcopy(encoder), size)


def _first(source: Source | StreamSource, limit: int) -> Source | StreamSource:
    """Return what to read for the first images; a stream, which comes in order, is left off in time."""
    if limit < 1:
        raise UsageError(f"limit is {limit}; take at least one image, or leave it out to take all")
    return source if isinstance(source, StreamSource) else SubsetSource(source, np.arange(min(limit, len(source))))


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
