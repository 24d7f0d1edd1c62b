"""What is evaluated, and on what: the settings every evaluation shares, and the features it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from patchloom.bundle import made_from, open_encoder
from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import View
from patchloom.encoders import Encoder, create_backbone, in_chans
from patchloom.encoders import image_size as size_of
from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.predictions import check_free
from patchloom.features.cache import cached_features
from patchloom.features.extract import Features, Pool, Precision
from patchloom.features.fingerprint import source_hash

PIXELS = "pixels"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings every evaluation shares."""

    encoder: Any
    """Bundle, run, timm model with published weights, or the word pixels for raw pixels; from Python also a module"""
    train: str
    """Labelled images to learn from: a folder with a sub-folder per class, photos, torchvision:NAME …"""
    test: str
    """Labelled images to measure on; their classes are among those of train"""
    untrained: bool = False
    """Give the encoder fresh weights first: what training has to beat"""
    image_size: int | None = None
    """Side images are resized and cropped to; default: the encoder's (32 for raw pixels)"""
    view: View = "crop"
    """What is shown of an image: crop, its centre; whole, all of it, out of proportion, each channel stretched to its
    full range (radiology)"""
    pool: Pool = "auto"
    """How tokens become one vector: as the encoder does, class token, mean over patches, or both"""
    precision: Precision = "32"
    """Number format of the encoder's arithmetic"""
    batch_size: int = 128
    """Images at a time"""
    num_workers: int = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the encoder computes: auto, cpu, cuda or cuda:1"""
    seed: int = 0
    """Seed of fresh weights and of whatever is drawn"""
    draws: int = 1000
    """Bootstrap draws behind the 95 % interval of each score"""
    groups: str | None = None
    """CSV file (columns key, group): test images of one group (patient, slide, scene) are not independent, so intervals
    and comparisons draw whole groups"""
    cache: str = "auto"
    """Folder where features are kept for the next evaluation (see patchloom cache); auto is its usual place, none keeps
    nothing"""
    predictions: str | None = None
    """Also write what was said of each test image to this .npz file, for patchloom evaluate compare"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.num_workers < 0:
            raise UsageError(f"num_workers is {self.num_workers}; it must be at least 0")
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"image_size is {self.image_size}; it must be at least 1")
        choices = (("pool", self.pool, Pool), ("precision", self.precision, Precision), ("view", self.view, View))
        for kind, value, known in choices:
            if value not in get_args(known):
                raise unknown_name(kind, value, get_args(known))
        if self.draws < 2:
            raise UsageError(f"draws is {self.draws}; a bootstrap needs at least 2, and 1000 for a steady interval")
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
        if self.predictions is not None:
            check_free(Path(self.predictions))
        if self.untrained and not isinstance(self.encoder, nn.Module) and str(self.encoder) == PIXELS:
            raise UsageError("raw pixels have no weights to leave untrained; drop untrained")


def resolve_encoder(config: EvaluationConfig) -> Encoder | None:
    """Return the encoder meant, or None for raw pixels.

    Raises:
        UsageError: There is no such encoder, or it has no trained weights and `untrained` is not set.
    """
    if not isinstance(config.encoder, nn.Module) and str(config.encoder) == PIXELS:
        return None
    if not config.untrained:
        return open_encoder(config.encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if not isinstance(config.encoder, nn.Module) and not Path(str(config.encoder)).exists():
            return create_backbone(str(config.encoder), image_size=config.image_size)
        return _fresh(open_encoder(config.encoder), config.image_size)


def labelled_features(
    config: EvaluationConfig,
    *,
    several: bool = False,
    may_be_same: bool = False,
    layers: Sequence[int] | None = None,
    pool: Pool | None = None,
) -> tuple[Features, Features, list[str]]:
    """Return training features, test features and the names of the classes; images without label are left out.

    Args:
        config: What is evaluated, and on what.
        several: Images have several labels each: `Features.labels` is (n, L), NaN where unknown, in both.
        may_be_same: Test images may be the training images; the two features are then the same object.
        layers: Blocks whose output is taken, see `features.extract`.
        pool: Instead of the pooling of the settings.

    Raises:
        UsageError: A source without labels, or with labels of the other kind; a test class that training does not
            know; the same images twice; features that are not finite.
    """
    encoder = resolve_encoder(config)
    channels = 3 if encoder is None else in_chans(encoder)
    train, test = (open_source(name, in_chans=channels, seed=config.seed) for name in (config.train, config.test))
    for source in (train, test):
        _check_labels(source, several)
    same = source_hash(train) == source_hash(test)
    if not may_be_same and train.fingerprint() == test.fingerprint():
        raise UsageError(
            f"train {config.train} and test {config.test} are the same images; measure on images apart from them"
        )
    numbers = _common_classes(train, test)
    learnt = _labelled(config, encoder, train, layers, pool)
    measured = learnt if same else _labelled(config, encoder, test, layers, pool)
    if numbers is not None and not same:
        measured = measured._replace(labels=_renumbered(measured.labels, numbers, len(train.class_names or [])))
    if several:
        names = train.class_names or [str(number) for number in range(learnt.labels.shape[1])]
        return learnt, measured, list(names)
    highest = int(torch.cat([learnt.labels, measured.labels]).max())
    class_names = train.class_names or test.class_names or [str(number) for number in range(highest + 1)]
    return learnt, measured, list(class_names)


def encoder_name(config: EvaluationConfig) -> str | None:
    """Return what the user calls the encoder, with its whole path; None for a module."""
    if isinstance(config.encoder, nn.Module):
        return None
    name = str(config.encoder)
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return f"{name}, untrained, seed {config.seed}" if config.untrained else name


def _fresh(trained: Encoder, image_size: int | None) -> Encoder:
    """Return an encoder like another, with new weights."""
    made = made_from(trained)
    arguments = dict(made["model_args"])
    arguments.pop("img_size", None)
    size, channels = image_size or size_of(trained), arguments.pop("in_chans")
    fresh = create_backbone(made["architecture"], image_size=size, in_chans=channels, **arguments)
    fresh.pretrained_cfg = {**trained.pretrained_cfg, "input_size": fresh.pretrained_cfg["input_size"]}
    return fresh


def _common_classes(train: Source | StreamSource, test: Source | StreamSource) -> torch.Tensor | None:
    """Return the number among the training classes of each test class, or None where numbers are all there is."""
    if train.class_names is None or test.class_names is None:
        return None
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in test.class_names if name not in numbers]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(
            f"{test.name} has classes that {train.name} does not have: {', '.join(unknown[:3])}{more}; "
            f"name the folders of both alike"
        )
    return torch.tensor([numbers[name] for name in test.class_names])


def _check_labels(source: Source | StreamSource, several: bool) -> None:
    # The labels of a stream come with its images.
    if isinstance(source, Source) and source.labels is None:
        raise UsageError(f"{source.name} has no labels; put each class in a folder of its own")
    if source.multilabel and not several:
        raise UsageError(
            f"{source.name} has several labels per image and this evaluation compares classes; "
            f"patchloom evaluate multilabel measures the mean AUROC of labels"
        )
    if several and not source.multilabel:
        raise UsageError(
            f"{source.name} has one class per image and this evaluation is for several labels each; use linear or knn"
        )


def _renumbered(labels: torch.Tensor, numbers: torch.Tensor, classes: int) -> torch.Tensor:
    """Return test labels in the training classes' order; a label that the test images lack is unknown for them."""
    if labels.ndim == 1:
        return torch.where(labels >= 0, numbers[labels.clamp_min(0)], labels)
    ordered = torch.full((len(labels), classes), torch.nan)
    ordered[:, numbers] = labels.float()
    return ordered


def _labelled(
    config: EvaluationConfig,
    encoder: Encoder | None,
    source: Source | StreamSource,
    layers: Sequence[int] | None,
    pool: Pool | None,
) -> Features:
    """Return the features of the labelled images of a source."""
    features = cached_features(
        encoder,
        source,
        cache=config.cache,
        name=encoder_name(config),
        image_size=config.image_size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=config.device,
        pool=config.pool if pool is None else pool,
        layers=layers,
        precision=config.precision,
        view=config.view,
    )
    _check_finite(features, source, config)
    known = features.labels >= 0 if features.labels.ndim == 1 else ~features.labels.isnan().all(1)
    if not bool(known.any()):
        raise UsageError(f"{source.name} has no labelled image")
    if bool(known.all()):
        return features
    keys = [key for key, keep in zip(features.keys, known.tolist(), strict=True) if keep]
    return Features(features.vectors[known], features.labels[known], keys, features.skipped)


def _check_finite(features: Features, source: Source | StreamSource, config: EvaluationConfig) -> None:
    bad = torch.cat([~torch.isfinite(part).all(1) for part in features.vectors.split(2**14)])
    if not bool(bad.any()):
        return
    first = features.keys[int(bad.nonzero()[0])]
    remedy = "set precision to 32" if config.precision == "16" else "its weights are broken, or training has diverged"
    raise UsageError(
        f"{int(bad.sum())} of the {len(bad)} features of {source.name} hold NaN or infinity, the first those of "
        f"{first}; {remedy}"
    )
