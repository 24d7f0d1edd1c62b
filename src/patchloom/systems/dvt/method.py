"""Training the denoiser of DVT on stored features: the second stage, with no encoder in the loop.

>>> import patchloom as pl
>>> run = pl.clean("dvt_train", data="features", out="runs/denoiser")  # doctest: +SKIP
>>> run.summary["held_out_ratio"]  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.data import SubsetSource
from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.sample import Transform
from patchloom.encoders import Encoder
from patchloom.encoders.denoised import Denoiser, denoising_loss
from patchloom.errors import UsageError
from patchloom.systems.dvt.config import NO_ENCODER, DVTTrainConfig
from patchloom.systems.dvt.pairs import FeaturePairs, Pair
from patchloom.systems.dvt.saved import find_encoder, save_denoiser
from patchloom.training.method import Method
from patchloom.training.optim import adamw, parameter_groups

if TYPE_CHECKING:
    from patchloom.report import Section

SHOWN, SIDE = 6, 128
MOST_MEASURED = 500


def training_rate(step: int, steps: int, base: float, final: float, warmup: int) -> float:
    """Return the learning rate of a step, from 0: up in a line to `base`, then down along half a cosine to `final`.

    The last step of the warm-up has the whole rate, and so has the one behind it, as published.

    >>> [round(training_rate(step, 10, 1.0, 0.0, 3), 3) for step in (0, 1, 2, 3, 9)]
    [0.0, 0.5, 1.0, 1.0, 0.05]
    """
    if step < warmup:
        return base * step / max(1, warmup - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class DVTSchedule:
    """Mixed into a method: the rate goes with the square root of the batch, and rises over a share of the steps."""

    config: Any
    total_steps: int
    trainer: Any
    _trainer: Any

    def peak_lr(self) -> float:
        """Return the highest learning rate."""
        config = self.config
        if config.lr_base_batch is None:
            return float(config.lr)
        world = self.trainer.world_size if self._trainer is not None else 1
        return float(config.lr * math.sqrt(config.batch_size * config.accumulate * world / config.lr_base_batch))

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of a step."""
        config = self.config
        warmup, peak = int(config.warmup_share * self.total_steps), self.peak_lr()
        return training_rate(step, self.total_steps, peak, min(config.min_lr, peak), warmup), config.weight_decay


class DVTTrainMethod(DVTSchedule, Method):
    """A transformer block learns to take the artefacts out of an encoder's features (DVT, second stage).

    Attributes:
        held_out: Pairs that are measured on.
        features: What the index of the first stage says of the features.
    """

    config_class = DVTTrainConfig
    config: DVTTrainConfig
    source: Source
    probed = False

    def __init__(self, config: DVTTrainConfig, source: Source | StreamSource) -> None:
        pairs = cast(FeaturePairs, source)
        learnt, held_out = split_pairs(pairs, config)
        super().__init__(config, learnt)
        self.held_out: Source = held_out
        self.lost = pairs.lost
        self.features: dict[str, Any] = {k: v for k, v in pairs.folder.index.items() if k != "images"}

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the pairs; an encoder that the settings name has to be that of the features."""
        pairs = FeaturePairs(config.data)
        if config.encoder == NO_ENCODER:
            return pairs, dataclasses.replace(config, encoder=pairs.folder.index["encoder"])
        if not config.resume:
            find_encoder(pairs.folder.index, config.encoder)
        return pairs, config

    @classmethod
    def images_to_learn_from(cls, config: Any, source: Source | StreamSource) -> int | None:
        """Return how many pairs remain to learn from."""
        return len(split_pairs(cast(FeaturePairs, source), config)[0])

    def build_encoder(self) -> Encoder:
        """Return the denoiser, which stands where other methods have their encoder."""
        folder = cast(FeaturePairs, cast(SubsetSource, self.source).source).folder
        made: Any = Denoiser(folder.width, folder.grid, self.config.num_blocks, self.config.pos_embed)
        made.pretrained_cfg = {"input_size": (folder.width, *folder.grid)}
        return cast(Encoder, made)

    def transform(self) -> Transform:
        """Return the features as they are."""
        return Pair()

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return how far the denoised features are from those of the first stage."""
        raw, target = (batch[name].permute(0, 2, 3, 1) for name in ("image", "denoised"))
        return denoising_loss(self.encoder(raw), target)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to everything, as published."""
        return True

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        config = self.config
        groups = parameter_groups(self, decay=self.decays)
        return adamw(groups, betas=config.betas, eps=config.eps, fused=config.precision != "16-mixed")

    @torch.no_grad()
    def measured(self) -> dict[str, Any]:
        """Return how far denoised features of held-out images are from the first stage's, beside the raw ones."""
        model = self.encoder
        training = model.training
        model.eval()
        rows = []
        for raw, target in self._held_out(MOST_MEASURED):
            made = model(raw[None])[0]
            rows.append([F.mse_loss(made, target), F.mse_loss(raw, target), *_cosines(made, raw, target)])
        model.train(training)
        if not rows:
            return {}
        mse, raw_mse, cosine, raw_cosine = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        return {
            "held_out_images": len(rows),
            "held_out_mse": mse,
            "raw_mse": raw_mse,
            "held_out_ratio": mse / max(raw_mse, 1e-12),
            "held_out_cosine": cosine,
            "raw_cosine": raw_cosine,
        }

    def _held_out(self, most: int) -> Any:
        """Yield raw and denoised features (H, W, C) of held-out images, on the device of the run."""
        for index in range(min(most, len(self.held_out))):
            try:
                sample = self.held_out.read(index)
            except UnreadableImageError:
                continue
            both = (sample.value, cast(Tensor, sample.named["denoised"]))
            yield tuple(each.permute(1, 2, 0).to(self.device) for each in both)

    def summary(self) -> dict[str, Any]:
        """Return the figures on held-out images."""
        return {**self.measured(), "images_left_out": len(self.lost)}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the denoiser, with the name of its encoder."""
        save_denoiser(cast(Denoiser, model), path, self.features, lineage)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return features of held-out images: raw, of the first stage, of the denoiser."""
        from patchloom.report import Section
        from patchloom.report.figures import image_grid, pca_colours

        self.encoder.eval()
        pairs = list(self._held_out(SHOWN))
        if not pairs:
            return []
        raw, target = (torch.stack(each) for each in zip(*pairs, strict=True))
        made = self.encoder(raw)
        grid = (raw.shape[1], raw.shape[2])
        maps = torch.cat([raw, target, made]).flatten(1, 2).cpu()
        colours = F.interpolate(
            pca_colours(maps, grid), scale_factor=float(max(1, SIDE // max(grid))), mode="nearest"
        ).chunk(3)
        figures = self.measured()
        text = (
            f"Features of held-out images as colours. The denoiser's are {figures['held_out_ratio']:.2f} times as far "
            f"from the first stage's as the raw ones are (mean squared error {figures['held_out_mse']:.3g} and "
            f"{figures['raw_mse']:.3g}; cosine {figures['held_out_cosine']:.3f} and {figures['raw_cosine']:.3f})."
        )
        rows = dict(zip(("raw", "first stage", "denoiser"), colours, strict=True))
        return [Section(title="Denoised features", text=text, figures=[image_grid(rows)])]

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the denoiser."""
        count = sum(parameter.numel() for parameter in self.encoder.parameters())
        denoiser = cast(Denoiser, self.encoder)
        return {
            "encoder": f"denoiser of {Path(str(self.features['encoder'])).name}",
            "width": denoiser.feat_dim,
            "depth": len(denoiser.blocks),
            "parameters": count,
            "trained_parameters": count,
        }


def split_pairs(pairs: FeaturePairs, config: DVTTrainConfig) -> tuple[Source, Source]:
    """Return the pairs to learn from, and those to measure on, drawn by the seed.

    Raises:
        UsageError: There is only one.
    """
    if len(pairs) < 2:
        raise UsageError(f"{pairs.name} has one image, and one is held out; decompose more of them")
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    count = min(len(pairs) - 1, max(1, round(config.held_out * len(pairs))))
    return SubsetSource(pairs, np.sort(order[count:])), SubsetSource(pairs, np.sort(order[:count]))


def _cosines(made: Tensor, raw: Tensor, target: Tensor) -> list[Tensor]:
    return [F.cosine_similarity(each, target, dim=-1).mean() for each in (made, raw)]
