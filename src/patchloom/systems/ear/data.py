"""The images of an EAR run: opened, their shape settled once, and how they come to the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.sizes import Size, compact, size_text
from patchloom.data import make_loader
from patchloom.data.base import Source, UnreadableImageError, spread
from patchloom.data.defects import DefectSets, DefectSource, open_defects, open_tested
from patchloom.data.pixels import resize, unit
from patchloom.data.reading import reading_options
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.models.bundle import read_reading
from patchloom.systems.ear.config import NO_ENCODER, EARConfig

SIDE = 256
MULTIPLE = 8
"""Sides of oblong images are multiples of this, so that nothing is cut off on the way up."""
SQUARE = 1.1
"""Images whose sides differ less than this are taken for square."""
LOOKED_AT = 32
MODULE = "anomalib:"
"""What the name of a data module of anomalib begins with; one is handed over from Python, and opened by no name."""


def open_sets(config: EARConfig) -> tuple[DefectSets, EARConfig]:
    """Return the images to learn from and to measure on, and the settings with what was settled about them.

    Raises:
        UsageError: They cannot be opened or read as asked.
    """
    if config.data.startswith(MODULE):
        raise UsageError(
            f"data is {config.data}, a data module of anomalib, which no name opens; hand it to patchloom.anomaly(…, "
            f"data=module), with resume=True to go on"
        )
    sets = open_defects(
        config.data,
        test=config.probe_data,
        masks=config.masks,
        good=config.good,
        test_share=config.test_share,
        seed=config.seed,
        **asked_of(config),
    )
    return sets, settled(config, sets)


def asked_of(config: EARConfig) -> dict[str, Any]:
    """Return the options that images are opened with: those of the settings, else how the encoder's were read."""
    return {**_of_encoder(config.encoder), **config.source_options(), "in_chans": config.in_chans}


def settled(config: EARConfig, sets: DefectSets) -> EARConfig:
    """Return the settings with the value range and the shape of the images.

    Raises:
        UsageError: No image can be read.
    """
    found: dict[str, Any] = reading_options(sets.good)
    if config.image_size is None:
        found["image_size"] = usual_shape(sets.good)
        if found["image_size"] != SIDE:
            notice(f"{sets.good.name}: images are resized to {size_text(found['image_size'])}, their usual shape")
    return dataclasses.replace(config, **found)


def open_validation(config: EARConfig, good: Source) -> DefectSource | None:
    """Return the images that `val_data` names, read as the good ones are; None where it names none."""
    if config.val_data is None:
        return None
    options = {**config.source_options(), **reading_options(good), "in_chans": config.in_chans}
    return open_tested(config.val_data, good=config.good, masked=False, **options)


def usual_shape(source: Source) -> Size:
    """Return 256, or the height and width of about as many pixels that images of a source usually have the shape of.

    Raises:
        UsageError: No image can be read.
    """
    ratios = []
    for index in spread(len(source), LOOKED_AT):
        try:
            height, width = source.read(index).value.shape[-2:]
        except UnreadableImageError:
            continue
        ratios.append(height / width)
    if not ratios:
        raise UsageError(f"{source.name} holds no readable image")
    ratio = float(np.median(ratios))
    if 1 / SQUARE <= ratio <= SQUARE:
        return SIDE
    height, width = (max(MULTIPLE, MULTIPLE * round(SIDE * r / MULTIPLE)) for r in (ratio**0.5, ratio**-0.5))
    return compact((height, width))


class GoodView:
    """An image at the size of the network, out of proportion where it is of another shape.

    Args:
        size: (height, width).
        texture: Mirror and turn it at random, by quarter turns where it is square.
    """

    def __init__(self, size: tuple[int, int], texture: bool = False) -> None:
        self.size, self.texture = size, texture

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, *size)}, of the type of the image (C, H, W)."""
        view = resize(image, self.size, "bilinear")
        if self.texture:
            mirrored, turns = torch.rand(2, generator=generator).tolist()
            steps = 1 if self.size[0] == self.size[1] else 2
            view = torch.rot90(view.flip(-1) if mirrored < 0.5 else view, int(turns * 4 / steps) * steps, (-2, -1))
        return {"image": view.contiguous()}


class MeasuredView:
    """An image and its mask at the size of the network; the mask by the nearest pixel.

    Args:
        size: (height, width).
        masked: Whether there are masks.
    """

    def __init__(self, size: tuple[int, int], masked: bool) -> None:
        self.size, self.masked = size, masked
        self.reads = ("mask",) if masked else ()

    def __call__(self, image: Tensor, generator: torch.Generator, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"image": (C, *size)[, "mask": size uint8]} of an image (C, H, W) and its mask (H, W)."""
        views = {"image": resize(image, self.size, "bilinear")}
        if mask is not None:
            nearest = torch.nn.functional.interpolate(mask[None, None].float(), self.size, mode="nearest")
            views["mask"] = nearest[0, 0].to(torch.uint8)
        return views


def good_views(
    source: Source, size: tuple[int, int], batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, list[str], list[int]]]:
    """Yield images (B, C, H, W) in [0, 1] of a size, with their names and labels, in the order of the source.

    Raises:
        UsageError: None can be read.
    """
    loader = make_loader(
        source, MeasuredView(size, masked=False), batch_size, seed=0, shuffle=False, num_workers=num_workers
    )
    read = 0
    for batch in loader:
        if batch["key"]:
            read += len(batch["key"])
            yield unit(batch["image"]), batch["key"], batch["label"].tolist()
    if not read:
        raise UsageError(f"{source.name} holds no readable image")


def _of_encoder(name: str) -> dict[str, Any]:
    """Return how the images of an encoder on disk were read, which holds where the settings say nothing."""
    return read_reading(name) if name != NO_ENCODER and Path(name).exists() else {}
