"""Classes of volumes by an encoder of images: every slice is an image, and slices are pooled.

As the code of the DINOv2 radiology benchmark (Baharoon et al. 2023, arXiv 2312.02366) does: slice features and their
mean, here for logistic regression; attention over slices (ABMIL, arXiv 1802.04712) as the stronger head.

>>> import patchloom as pl
>>> pl.evaluate("volumes", encoder="runs/mine/model", train="scans/train", test="scans/test")  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.progress import track
from patchloom.base.source_options import refuse_untaken
from patchloom.data.base import UnreadableImageError
from patchloom.data.groups import read_groups
from patchloom.data.volumes import Volume, VolumeSource, Window, as_images, open_volumes
from patchloom.encoders import Encoder, image_size, in_chans, normalize, pooled, set_image_size
from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.logistic import fit_logistic
from patchloom.evaluate.slides.fit import FitSettings, fit, predict_logits
from patchloom.evaluate.slides.tasks import Task
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.target import encoder_name, resolve_encoder
from patchloom.evaluate.volumes_config import VolumesConfig
from patchloom.features.cache import cache_folder, kept_rows
from patchloom.features.extract import Features, Take, rows_in_memory, torch_device
from patchloom.features.fingerprint import weights_hash
from patchloom.features.inputs import require_image_encoder
from patchloom.statistics.metrics import accuracy, balanced_accuracy


class Bags(NamedTuple):
    """Volumes as bags of slice features."""

    bags: list[Tensor]
    """(S_i, D) float32 of each volume."""
    labels: np.ndarray
    """(n,) int64."""
    keys: list[str]
    skipped: list[tuple[str, str]]


class Volumes:
    """Volumes sorted into classes by their slices: mean, maximum or attention over slice features."""

    config_class = VolumesConfig
    kinds = ("volume",)

    def __init__(self, config: VolumesConfig) -> None:
        self.config = config
        self.predictions: Predictions | None = None

    def run(self) -> dict[str, Any]:
        """Return the mean AUROC over classes with its interval over volumes, accuracy, and what goes with them."""
        start, config = time.perf_counter(), self.config
        encoder = resolve_encoder(config)
        if encoder is None:
            raise UsageError("volumes need an encoder; raw pixels of slices of all sizes make no features")
        require_image_encoder(encoder, "evaluate volumes")
        refuse_untaken(open_volumes, config.train, config.source_options())
        train, test = (
            open_volumes(name, plane=config.plane, channel=config.channel) for name in (config.train, config.test)
        )
        names = _classes(train, test)
        device = torch_device(config.device)
        if config.image_size is not None:
            encoder = set_image_size(copy.deepcopy(encoder), config.image_size)
        learnt, measured = (slice_features(encoder, source, config, device) for source in (train, test))
        if len(set(learnt.labels.tolist())) < 2:
            raise UsageError(f"{config.train} has readable volumes of one class only; a classifier needs two")
        scores = self._scores(learnt, measured.bags, len(names))
        predicted = scores.argmax(1)
        about = {"encoder": str(config.encoder)[:200], "test": config.test, "slice_pool": config.slice_pool}
        groups = None if config.groups is None else read_groups(config.groups, measured.keys)
        self.predictions = Predictions(
            measured.keys, predicted, measured.labels, "mean_auroc", names, scores, about, groups
        )
        drawn: dict[str, Any] = {"draws": config.draws, "seed": config.seed, "resample": config.resample}
        area = self.predictions.interval(**drawn)
        right = self.predictions.interval(accuracy, **drawn)
        skipped = learnt.skipped + measured.skipped
        return {
            "score": _finite(area.value),
            "score_name": "mean_auroc",
            "interval": [_finite(area.low), _finite(area.high)],
            "mean_auroc": _finite(area.value),
            "accuracy": right.value,
            "accuracy_interval": right.ends,
            "balanced_accuracy": balanced_accuracy(predicted, measured.labels),
            "majority_share": float(np.bincount(measured.labels).max() / len(measured.labels)),
            **({"notes": doubts} if (doubts := self.predictions.doubts()) else {}),
            "per_class_accuracy": {
                name: float((predicted[measured.labels == number] == number).mean())
                for number, name in enumerate(names)
                if (measured.labels == number).any()
            },
            "n": len(measured.keys),
            "train_volumes": len(learnt.keys),
            "slices": {"train": sum(map(len, learnt.bags)), "test": sum(map(len, measured.bags))},
            "dim": int(measured.bags[0].shape[1]),
            "slice_pool": config.slice_pool,
            "unreadable_images": len(skipped),
            "skipped": [{"file": key, "reason": reason} for key, reason in skipped],
            "seconds": round(time.perf_counter() - start, 2),
        }

    def _scores(self, learnt: Bags, bags: Sequence[Tensor], classes: int) -> np.ndarray:
        """Return the probability of each class, (n, classes)."""
        config = self.config
        if config.slice_pool == "attention":
            task = Task("multiclass", tuple(str(number) for number in range(classes)))
            settings = FitSettings(
                head="abmil", epochs=config.epochs, lr=config.lr, batch_size=min(16, len(learnt.bags)), seed=config.seed
            )
            # Features of one scale, whatever the encoder's norm.
            mean, scale = _moments(torch.cat(learnt.bags))
            head, _ = fit([(bag - mean) / scale for bag in learnt.bags], learnt.labels, task, settings)
            return F.softmax(torch.from_numpy(predict_logits(head, [(bag - mean) / scale for bag in bags])), 1).numpy()
        x, y = (torch.stack([pool_slices(bag, config.slice_pool) for bag in part]) for part in (learnt.bags, bags))
        model = fit_logistic(x.double(), torch.from_numpy(learnt.labels), classes, c=config.c)
        logits = ((y.double() - model.mean) / model.scale) @ model.weight.T + model.bias
        return logits.softmax(1).numpy()


def slice_encode(
    encoder: Encoder,
    volumes: Tensor,
    lengths: Sequence[int] | Tensor | None = None,
    *,
    pool: Any = "auto",
    batch_size: int = 64,
) -> list[Tensor]:
    """Return the features of the slices of a batch of volumes.

    Args:
        encoder: The encoder, in eval mode.
        volumes: (B, S, C, H, W), normalised, padded with any slices at the end.
        lengths: (B,) true number of slices of each; default: all.
        pool: How the tokens of a slice become a vector, see `encoders.pooled`.
        batch_size: Slices at a time.

    Returns:
        (S_i, D) for each volume; padding is never encoded.

    Raises:
        UsageError: A length outside 1 … S.
    """
    counts = [volumes.shape[1]] * len(volumes) if lengths is None else [int(n) for n in lengths]
    if len(counts) != len(volumes) or any(not 1 <= n <= volumes.shape[1] for n in counts):
        raise UsageError(f"lengths {counts} do not fit {len(volumes)} volumes of up to {volumes.shape[1]} slices")
    flat = torch.cat([volume[:count] for volume, count in zip(volumes, counts, strict=True)])
    encoded = torch.cat([pooled(encoder, part, pool) for part in flat.split(batch_size)])
    return list(encoded.split(counts))


def pool_slices(features: Tensor, how: str) -> Tensor:
    """Return one vector (D,) of slice features (S, D): their mean or maximum.

    Raises:
        UsageError: Unknown pooling.
    """
    if how not in ("mean", "max"):
        raise unknown_name("pooling of slices", how, ("mean", "max"))
    return features.mean(0) if how == "mean" else features.amax(0)


def slice_features(encoder: Encoder, source: VolumeSource, config: VolumesConfig, device: torch.device) -> Bags:
    """Return the slice features of every readable volume; from disk where the same were computed before.

    Raises:
        UsageError: None is readable, or features are not finite.
    """
    encoder = copy.deepcopy(encoder).eval().to(device)

    @torch.no_grad()
    def produce(take: Take) -> list[tuple[str, str]]:
        skipped = []
        for index in track(range(len(source)), "volumes", unit="volume"):
            try:
                volume = source.volume(index)
            except UnreadableImageError as error:
                skipped.append((error.key, error.reason))
                continue
            images = encoder_images(volume, config.window, image_size(encoder), in_chans(encoder), config.slices)
            normalised = normalize(images.to(device), encoder)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                encoded = slice_encode(encoder, normalised[None], pool=config.pool, batch_size=config.batch_size)[0]
            if not bool(torch.isfinite(encoded).all()):
                raise UsageError(
                    f"the features of {volume.key} are not finite; the encoder was saved from a diverged run"
                )
            # The label of a slice is its volume's number: what class that is may be renamed without computing anew.
            take(encoded.float().cpu(), torch.full((len(encoded),), index), [volume.key] * len(encoded))
        if len(skipped) == len(source):
            raise UsageError(f"no volume of {source.name} is readable; the first is {skipped[0][0]!r}: {skipped[0][1]}")
        return skipped

    how = {"slices": config.slices, "window": config.window, "pool": config.pool, "precision": config.precision}
    about = {
        "format": 1,
        "encoder": weights_hash(encoder),
        "source": source.fingerprint(),
        "how": {**how, "plane": source.plane, "channel": source.channel, "side": list(image_size(encoder))},
    }
    root = cache_folder(config.cache)
    rows = None if root is None else kept_rows(root, about, encoder_name(config), source.name, produce)
    return _bags(rows_in_memory(produce) if rows is None else rows, source)


def _bags(rows: Features, source: VolumeSource) -> Bags:
    numbers, counts = torch.unique_consecutive(rows.labels, return_counts=True)
    assert source.labels is not None
    bags = [torch.from_numpy(np.array(bag)) for bag in rows.vectors.split(counts.tolist())]
    keys = [source.key(number) for number in numbers.tolist()]
    return Bags(bags, source.labels[numbers.numpy()], keys, rows.skipped)


def encoder_images(
    volume: Volume, window: Window, size: tuple[int, int], channels: int, slices: int | None = None
) -> Tensor:
    """Return slices as an encoder takes images: (S, channels, H, W) float in [0, 1].

    Slices keep their proportions: pixels are made square, then the slice is fitted into the size and padded with zeros
    all round.

    Args:
        volume: The volume.
        window: How grey values become [0, 1].
        size: (H, W) wanted.
        channels: Channels wanted; grey is repeated.
        slices: Most slices, evenly spaced.
    """
    images = as_images(volume, window)
    if slices is not None and len(images) > slices:
        chosen = torch.linspace(0, len(images) - 1, slices).round().long()
        images = images[chosen]
    factor = min(size[0] / images.shape[-2], size[1] / images.shape[-1])
    inner = [max(1, min(side, round(old * factor))) for side, old in zip(size, images.shape[-2:], strict=True)]
    grey = F.interpolate(images.float() / 255, size=inner, mode="bilinear", align_corners=False, antialias=True)
    down, across = size[0] - inner[0], size[1] - inner[1]
    framed = F.pad(grey, (across // 2, across - across // 2, down // 2, down - down // 2))
    return framed.expand(-1, channels, -1, -1)


def _classes(train: VolumeSource, test: VolumeSource) -> list[str]:
    for source in (train, test):
        if source.labels is None:
            raise UsageError(f"{source.name} has no classes; put the volumes of each in a sub-folder of its own")
    known = train.class_names or []
    unknown = [name for name in test.class_names or [] if name not in known]
    if unknown:
        raise UsageError(f"{test.name} has the class {unknown[0]}, which {train.name} does not have; name them alike")
    if train.fingerprint() == test.fingerprint():
        raise UsageError(f"train {train.name} and test {test.name} are the same volumes; measure on others")
    assert test.labels is not None
    test.labels = np.array([known.index((test.class_names or [])[label]) for label in test.labels], dtype=np.int64)
    return list(known)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    deviation = x.std(0, correction=0)
    return x.mean(0), torch.where(deviation > 0, deviation, 1)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
