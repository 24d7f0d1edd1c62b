"""Settings that fit how much there is to learn from, and a plain word where it is too little.

What a user gives stays as it is. The recipe's batch, made for a million images, becomes smaller where an epoch would
have only a few steps; its epochs become more where the whole run would. Both are settled once, said and written down.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as lp
from lightning.pytorch.callbacks import Callback

from patchloom.base.sizes import size_text
from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.survey import notice
from patchloom.encoders import input_size

if TYPE_CHECKING:
    from patchloom.training.config import Config, TrainConfig
    from patchloom.training.method import Method

STEPS_PER_EPOCH = 8
"""Fewest optimiser steps of an epoch that the recipe's batch is kept for."""
SMALLEST_BATCH = 8
STEPS = 500
"""Fewest optimiser steps of a run that the recipe's epochs are kept for."""
TOO_FEW_STEPS, ENOUGH_STEPS = 100, 1000
FEW_IMAGES, LOOKED_AT, BLOWN_UP = 10, 8, 8


def fit_to_data(config: Config, images: int | None, given: Collection[str]) -> Config:
    """Return the settings with batch size and epochs that suit the number of images, where they were left open.

    The learning rate follows the batch by the recipe's own rule (`lr_base_batch`).

    Args:
        config: The settings.
        images: Images to learn from; None where nobody knows.
        given: Names of the settings that the user chose.
    """
    if not images:
        return config
    settled: dict[str, Any] = {}
    if "batch_size" not in given and config.batch_size != (batch := batch_for(images, config)):
        settled["batch_size"] = batch
    now = dataclasses.replace(config, **settled)
    if not {"epochs", "max_steps"} & set(given) and now.max_steps is None:
        per_epoch = steps_per_epoch(images, now)
        if now.epochs * per_epoch < STEPS:
            settled["epochs"] = math.ceil(STEPS / per_epoch)
    if not settled:
        return config
    now = dataclasses.replace(config, **settled)
    words = [f"{name} {_short(new)} in place of {_short(getattr(config, name))}" for name, new in settled.items()]
    steps = _counted(steps_per_epoch(images, now), "step")
    notice(f"settings for {_counted(images, 'image')}: {', '.join(words)} ({steps} an epoch)")
    return now


def batch_for(images: int, config: TrainConfig) -> int:
    """Return the recipe's batch, or the largest power of two that leaves enough steps in an epoch."""
    others = _at_once(config)
    if images >= STEPS_PER_EPOCH * config.batch_size * others:
        return config.batch_size
    fitting = 2 ** int(math.log2(max(1, images // (STEPS_PER_EPOCH * others))))
    return min(config.batch_size, max(fitting, SMALLEST_BATCH), max(1, images // others))


def largest_batch(images: int, config: TrainConfig) -> int:
    """Return the largest power of two that leaves enough steps in an epoch."""
    others = _at_once(config)
    return max(
        min(SMALLEST_BATCH, max(1, images // others)), 2 ** int(math.log2(max(1, images // (STEPS_PER_EPOCH * others))))
    )


def steps_per_epoch(images: int, config: TrainConfig) -> int:
    """Return the optimiser steps of an epoch, about: incomplete batches are left out."""
    return max(1, images // (config.batch_size * _at_once(config)))


class Advice(Callback):
    """Says at the start of a run what it cannot do with what there is; and that it was too short again at its end.

    Attributes:
        lines: The sentences.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_start(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Say it."""
        if trainer.is_global_zero and not cast("Method", pl_module).measures:
            self.lines = advice(cast("Method", pl_module))
            for line in self.lines:
                notice(f"note: {line}")

    def on_train_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Say again that the run was too short."""
        for line in self.lines[:1] if cast("Method", pl_module).total_steps < TOO_FEW_STEPS else []:
            notice(f"note: {line}")


def advice(method: Method) -> list[str]:
    """Return what a run cannot do with what there is, in plain sentences; none where all is well."""
    config, source = method.config, method.source
    advices = []
    images = len(source) if isinstance(source, Source) else None
    if method.total_steps < TOO_FEW_STEPS:
        advices.append(
            f"{_counted(method.total_steps, 'step')} in all: too few to learn; try {_longer(config, images)}."
        )
    if images == 1:
        advices.append("One image is all there is: what is learnt holds for nothing else.")
    elif images is not None and images < FEW_IMAGES:
        advices.append(f"{images} images are all there is: too few to learn anything that holds for others.")
    side, (*_, height, width) = _usual_side(source), input_size(method.encoder)
    if side is not None and side * BLOWN_UP <= max(height, width):
        advices.append(
            f"The {source.kind.plural} are about {side} pixels wide or high and are blown up to "
            f"{size_text((height, width))}: most of what the encoder sees was made up by the enlargement; a smaller "
            f"--image_size fits them."
        )
    return advices


def _longer(config: TrainConfig, images: int | None) -> str:
    if config.max_steps is not None:
        return f"--max_steps {ENOUGH_STEPS}"
    if images is None:
        return f"--epochs {_round_up(config.epochs * ENOUGH_STEPS / TOO_FEW_STEPS)}"
    batch = batch_for(images, config)
    epochs = _round_up(ENOUGH_STEPS / steps_per_epoch(images, dataclasses.replace(config, batch_size=batch)))
    return f"--epochs {epochs}" + (f" --batch_size {batch}" if batch != config.batch_size else "")


def _usual_side(source: Source | StreamSource) -> int | None:
    """Return the median of the longer sides of a few images, in pixels; None for what has no sides, and streams."""
    if not isinstance(source, Source) or source.kind.axes[-2:] != ("H", "W") or not len(source):
        return None
    sides = []
    for index in range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            sides.append(max(source.read(index).value.shape[-2:]))
        except UnreadableImageError:
            continue
        if len(sides) == LOOKED_AT:
            break
    return round(median(sides)) if sides else None


def _at_once(config: TrainConfig) -> int:
    """Return how many batches a step takes; `devices=0`, all there are, counts as one."""
    return config.accumulate * max(1, config.devices) * config.nodes


def _round_up(value: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50 …"""
    power = 10 ** math.floor(math.log10(max(value, 1)))
    return next(round(step * power) for step in (1, 2, 5, 10) if step * power >= value)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
