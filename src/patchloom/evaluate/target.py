"""What is evaluated: an encoder by name, path or module, the same one untrained, or raw pixels."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder, create_encoder
from patchloom.errors import UsageError
from patchloom.features.extract import Features, extract

PIXELS = "pixels"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings every evaluation shares."""

    encoder: Any
    """Bundle, run, name of a timm model, or the word pixels for raw pixels; from Python also a module"""
    train: str
    """Labelled images to learn from: a folder with a sub-folder per class, photos, torchvision:NAME …"""
    test: str
    """Labelled images to measure on"""
    untrained: bool = False
    """Give the encoder fresh weights first: what training has to beat"""
    image_size: int | None = None
    """Side images are resized and cropped to; default: the encoder's (32 for raw pixels)"""
    pool: Literal["auto", "cls", "avg", "cls+avg"] = "auto"
    """How tokens become one vector: as the encoder does, class token, mean over patches, or both"""
    batch_size: int = 128
    """Images at a time"""
    num_workers: int = 2
    """Processes that read images"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    seed: int = 0
    """Seed of fresh weights and of whatever is drawn"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.num_workers < 0:
            raise UsageError(f"num_workers is {self.num_workers}; it must be at least 0")


def resolve_encoder(config: EvaluationConfig) -> Encoder:
    """Return the encoder meant, or None for raw pixels.

    Raises:
        UsageError: There is no such encoder.
    """
    if isinstance(config.encoder, nn.Module):
        return config.encoder
    name = str(config.encoder)
    if name == PIXELS:
        if config.untrained:
            raise UsageError("raw pixels have no weights to leave untrained; drop untrained")
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if not Path(name).exists():
            return create_encoder(name, image_size=config.image_size)
        from patchloom.bundle import load

        saved = load(name)
        if not config.untrained:
            return saved
        made = saved.patchloom_args
        arguments = {k: v for k, v in made["model_args"].items() if k not in ("img_size", "in_chans", "num_classes")}
        size = tuple(saved.patch_embed.img_size)
        channels = made["model_args"].get("in_chans", 3)
        return create_encoder(made["architecture"], image_size=size, in_chans=channels, **arguments)


def labelled_features(config: EvaluationConfig) -> tuple[Features, Features, list[str]]:
    """Return training features, test features and the names of the classes.

    Raises:
        UsageError: A source without labels, or two with different classes.
    """
    encoder = resolve_encoder(config)
    channels = 3 if encoder is None else int(encoder.patch_embed.proj.weight.shape[1])
    sources = [open_source(name, in_chans=channels, seed=config.seed) for name in (config.train, config.test)]
    for source in sources:
        if source.class_names is None:
            raise UsageError(f"{source.name} has no labels; put each class in a folder of its own")
    if sources[0].class_names != sources[1].class_names:
        raise UsageError(
            f"{config.train} and {config.test} have different classes: "
            f"{sources[0].class_names} and {sources[1].class_names}"
        )
    train, test = (_known(extract_with(config, encoder, source), source) for source in sources)
    return train, test, list(sources[0].class_names or [])


def extract_with(config: EvaluationConfig, encoder: Encoder | None, source: Source | StreamSource) -> Features:
    """Return the features of a source under the settings of an evaluation."""
    return extract(
        encoder,
        source,
        image_size=config.image_size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=config.device,
        pool=config.pool,
    )


def figures(said: Tensor, test: Features, class_names: list[str]) -> dict[str, Any]:
    """Return accuracy with its 95 % interval, balanced and per-class accuracy.

    Args:
        said: (n,) predicted classes.
        test: The features they were made from, with the true classes.
        class_names: Names by class.
    """
    right = (said == test.labels).double()
    n, share = len(right), float(right.mean())
    per_class = {
        name: float(right[test.labels == number].mean())
        for number, name in enumerate(class_names)
        if bool((test.labels == number).any())
    }
    return {
        "accuracy": share,
        "interval": wilson(share, n),
        "balanced_accuracy": float(np.mean(list(per_class.values()))),
        "per_class_accuracy": per_class,
        "test_images": n,
        "dim": int(test.vectors.shape[1]),
        "unreadable_images": len(test.skipped),
    }


def wilson(share: float, n: int) -> list[float]:
    """Return Wilson's 95 % interval of a share measured on n images."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _known(features: Features, source: Source | StreamSource) -> Features:
    """Drop images without a label."""
    known = features.labels >= 0
    if not bool(known.any()):
        raise UsageError(f"{source.name} has no labelled image")
    keys = [key for key, keep in zip(features.keys, known.tolist(), strict=True) if keep]
    return Features(features.vectors[known], features.labels[known], keys, features.skipped)
