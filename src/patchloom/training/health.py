"""An eye on the encoder while it trains: a collapse is named within 200 steps, not at the end of the epoch."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import lightning.pytorch as lp
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from patchloom.data.base import Sample, Source, UnreadableImageError
from patchloom.data.subset import MemorySource
from patchloom.features.extract import extract, side_of
from patchloom.features.health import Start, has_collapsed, mean_pairwise_cosine, rankme, verdict
from patchloom.training.method import Method

MOST_IMAGES = 64


class CollapseWatch(Callback):
    """Every so many steps: do the features of the encoder in training still tell a few held-out images apart?

    Looks at the encoder itself, not at its moving average, which follows it into collapse late. Prints a line when the
    features collapse and when they recover; the figures go to the log as `encoder_rankme` and `encoder_mean_cosine`.

    Args:
        source: Held-out images.
        every: Optimiser steps between looks; 0 for none.
        batch_size: Images at a time.

    Attributes:
        collapsed: Whether they had collapsed when last looked at.
    """

    def __init__(self, source: Source, every: int, batch_size: int) -> None:
        self.source = source
        self.every = every
        self.batch_size = batch_size
        self.images: MemorySource | None = None
        self.before: Start | None = None
        self.collapsed = False

    def on_train_start(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Look at the untrained encoder: one that starts with constant features has not collapsed by training."""
        assert isinstance(pl_module, Method)
        if self._looks(trainer, pl_module) and pl_module.step == 0 and pl_module.total_steps >= self.every:
            begun = self.figures(pl_module)
            self.before = begun["encoder_rankme"], begun["encoder_mean_cosine"]

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look where it is due, after whole optimiser steps."""
        assert isinstance(pl_module, Method)
        due = self.every and pl_module.step % self.every == 0
        if due and pl_module.at_step_end() and self._looks(trainer, pl_module):
            self.look(trainer, pl_module)

    def look(self, trainer: lp.Trainer, method: Method) -> None:
        """Measure, log, and say so where the features collapsed or recovered."""
        figures = self.figures(method)
        width, images = int(figures.pop("width")), len(self._images(method))
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=method.step)
        rank, cosine = figures["encoder_rankme"], figures["encoder_mean_cosine"]
        collapsed = has_collapsed(rank, cosine, width, images)
        if collapsed == self.collapsed:
            return
        self.collapsed = collapsed
        words = verdict(rank, cosine, width, images, start=self.before, labelled=method.needs_labels)
        text = f"step {method.step}: health of the encoder: rankme {rank:.3g}  mean cosine {cosine:.4g}"
        tqdm.write(f"{text}  ({words})", file=sys.stderr)

    def figures(self, method: Method) -> dict[str, float]:
        """Return `encoder_rankme`, `encoder_mean_cosine` and the width of the features."""
        vectors = extract(
            method.encoder,
            self._images(method),
            batch_size=self.batch_size,
            num_workers=0,
            device=str(method.device),
            progress=False,
        ).vectors
        return {
            "encoder_rankme": rankme(vectors),
            "encoder_mean_cosine": mean_pairwise_cosine(vectors),
            "width": float(vectors.shape[1]),
        }

    def _looks(self, trainer: lp.Trainer, method: Method) -> bool:
        """Return whether this process looks at all: one does, and none at a model whose parts are on several."""
        return bool(self.every) and trainer.is_global_zero and method.config.strategy != "fsdp"

    def _images(self, method: Method) -> MemorySource:
        """Return the images, read once, at the size the encoder takes."""
        if self.images is None:
            kind, generator = self.source.kind, torch.Generator()
            transform = kind.eval_view("crop", side_of(method.encoder, None))
            samples = (self._read(index) for index in range(0, len(self.source), self._stride()))
            images = list(islice((sample for sample in samples if sample is not None), MOST_IMAGES))
            resized = [
                Sample(transform(sample.value, generator)[kind.name], sample.label, sample.key) for sample in images
            ]
            self.images = MemorySource(self.source.name, resized, kind=kind)
        return self.images

    def _stride(self) -> int:
        return max(1, len(self.source) // MOST_IMAGES)

    def _read(self, index: int) -> Sample | None:
        try:
            return self.source.read(index)
        except UnreadableImageError:
            return None
