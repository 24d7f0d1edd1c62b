"""Segmentation of volumes by an encoder of images: a decoder on the slices, scores of whole volumes.

The decoders are those of the DINOv2 radiology benchmark (arXiv 2312.02366). Dice is taken per volume and averaged over
volumes, background (class 0) apart; the 95 % Hausdorff distance is in mm, by each volume's own spacing.

>>> import patchloom as pl
>>> pl.evaluate("volume_segmentation", encoder="runs/mine/model", train="scans/train", test="scans/test",
...             masks="masks")  # doctest: +SKIP
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchloom.base.progress import track
from patchloom.base.source_options import refuse_untaken
from patchloom.data.base import UnreadableImageError
from patchloom.data.mask_transforms import resized_size
from patchloom.data.pixels import resize as resize_image
from patchloom.data.volumes import (
    SliceSource,
    Volume,
    VolumeSource,
    as_images,
    open_volumes,
    save_mask,
)
from patchloom.encoders import in_chans, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.decoders import Trained, train_decoder
from patchloom.evaluate.mask_reading import report_masks
from patchloom.evaluate.target import resolve_encoder
from patchloom.evaluate.volume_segmentation_config import VolumeSegmentationConfig
from patchloom.features.inputs import require_image_encoder
from patchloom.segment.inference import SlidingWindowSegmenter
from patchloom.segment.layers import resize
from patchloom.segment.metrics import Areas, areas, dice, hausdorff
from patchloom.segment.overlap import (
    by_foreground_class,
    counted_areas,
    nanmean,
    plain,
    scores_with_intervals,
)
from patchloom.statistics.intervals import bootstrap_interval
from patchloom.statistics.metrics import mean_value


class Case(NamedTuple):
    """What came out on one volume."""

    key: str
    areas: Areas
    dice: Tensor
    """(K,), NaN where a class is neither there nor predicted."""
    distance: list[float]
    """95 % Hausdorff distance of each class but background, mm; infinite where it is missed or made up."""


class VolumeSegmentation:
    """Decoder on the slices of volumes: Dice per volume and 95 % Hausdorff distance."""

    config_class = VolumeSegmentationConfig
    kinds = ("volume",)

    def __init__(self, config: VolumeSegmentationConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return the mean Dice over volumes and foreground classes with its interval, and what goes with it."""
        start, config = time.perf_counter(), self.config
        encoder = resolve_encoder(config)  # type: ignore[arg-type]  # asks for four settings, which these have too
        if encoder is None:
            raise UsageError("segmentation needs an encoder with patch tokens; raw pixels have none")
        require_image_encoder(encoder, "evaluate volume_segmentation")
        refuse_untaken(open_volumes, config.train, config.source_options())
        train = open_volumes(config.train, plane=config.plane, channel=config.channel, settings=config)
        test = open_volumes(config.test, plane=config.plane, channel=config.channel, coding=train.coding)
        if test.masks is None or test.shares is None:
            raise UsageError(f"{test.name} has no masks to measure against; put them in a folder masks beside images")
        slices = SliceSource(train, config.window, in_chans(encoder))
        assert train.coding is not None
        assert train.shares is not None
        if len(train.class_names or []) < 2:
            raise UsageError(f"the masks of {train.name} hold background only; there is nothing to learn")
        if train.fingerprint() == test.fingerprint():
            raise UsageError(f"train {train.name} and test {test.name} are the same volumes; measure on others")
        masks = report_masks(train.coding, (train.name, train.shares), (test.name, test.shares))
        trained = train_decoder(encoder, slices, config, "volume_segmentation")
        cases, skipped = self.measure(trained, test)
        return {
            **masks,
            **case_scores(cases, train.class_names or [], config.seed),
            "train_volumes": len(train) - len(slices.broken),
            "train_slices": len(slices),
            "head": config.head,
            "layers": list(trained.module.backbone.layers),
            "decoder_parameters": trained.parameters,
            "as_published": config.as_published,
            "unreadable_images": len(skipped) + len(slices.broken) + len(trained.skipped),
            "skipped": [{"file": key, "reason": reason} for key, reason in slices.broken + trained.skipped + skipped],
            "seconds": round(time.perf_counter() - start, 2),
        }

    def measure(self, trained: Trained, test: VolumeSource) -> tuple[list[Case], list[tuple[str, str]]]:
        """Return the scores of every readable volume, and the names and reasons of the others."""
        config, cases, skipped = self.config, [], []
        classes = len(test.class_names or [])
        for index in track(range(len(test)), "segmenting", unit="volume"):
            try:
                volume = test.volume(index)
            except UnreadableImageError as error:
                skipped.append((error.key, error.reason))
                continue
            assert volume.mask is not None
            predicted = segment_volume(trained, volume, config)
            if config.masks is not None:
                name = Path(volume.key).name.removesuffix(".gz").removesuffix(".nii")
                save_mask(predicted, volume, config.plane, Path(config.masks) / f"{name}.nii.gz")
            truth = volume.mask
            volume_areas = areas(predicted, truth, classes)
            scored = dice(counted_areas(predicted, truth, classes, config.as_published))
            cases.append(Case(volume.key, volume_areas, scored, self._distances(predicted, truth, volume, classes)))
        if not cases:
            raise UsageError(f"no volume of {test.name} is readable; the first is {skipped[0][0]!r}: {skipped[0][1]}")
        return cases, skipped

    def _distances(self, predicted: Tensor, truth: Tensor, volume: Volume, classes: int) -> list[float]:
        if not self.config.hausdorff:
            return []
        predicted = torch.where(truth == 255, 0, predicted)
        return [hausdorff(predicted == number, truth == number, volume.spacing) for number in range(1, classes)]


@torch.no_grad()
def segment_volume(trained: Trained, volume: Volume, config: VolumeSegmentationConfig) -> Tensor:
    """Return the class of each voxel, (S, H, W) uint8, at the volume's own resolution."""
    module, device = trained.module.eval(), trained.device
    encoder = module.backbone.encoder
    segmenter = SlidingWindowSegmenter(module, trained.crop, trained.stride, config.batch_size)
    images = as_images(volume, config.window)
    size = trained.resize or resized_size((images.shape[-2], images.shape[-1]), config.short_side)
    if size != tuple(images.shape[-2:]):
        kind = "bilinear" if trained.resize is None else "bicubic"
        images = torch.stack([resize_image(image, size, kind) for image in images])
    predicted = []
    for part in images.split(max(1, config.batch_size)):
        pixels = part.to(device).float().div(255).expand(-1, in_chans(encoder), -1, -1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            logits = segmenter(normalize(pixels, encoder))
        predicted.append(resize(logits.float(), volume.slices.shape[1:]).argmax(1).to(torch.uint8).cpu())
    return torch.cat(predicted)


def case_scores(cases: list[Case], class_names: list[str], seed: int = 0) -> dict[str, Any]:
    """Return the scores over volumes: means with intervals, by class and by volume.

    Args:
        cases: One per volume.
        class_names: Names by class, the background first.
        seed: Seed of the draws.
    """
    table = torch.stack([case.dice for case in cases])[:, 1:].double().numpy()

    def interval(values: np.ndarray) -> list[float | None]:
        """Return the interval of the mean over volumes; those where nothing is to be found do not count."""
        known = values[~np.isnan(values)]
        if not len(known):
            return [None, None]
        return bootstrap_interval(mean_value, known, np.zeros(len(known)), seed=seed).ends

    per_case = nanmean(table, 1)
    mean = nanmean(per_case[None], 1)[0]
    together = Areas(*(torch.stack(rows) for rows in zip(*(case.areas for case in cases), strict=True)))
    pooled = scores_with_intervals(together, class_names, seed)
    width = max((len(case.distance) for case in cases), default=0)
    distances = np.full((len(cases), width), np.nan)
    for row, case in zip(distances, cases, strict=True):
        row[: len(case.distance)] = case.distance
    return {
        "score": plain(mean),
        "score_name": "dice",
        "dice": plain(mean),
        "interval": interval(per_case),
        "per_class_dice": by_foreground_class(nanmean(table, 0), class_names),
        "per_class_interval": {name: interval(table[:, number]) for number, name in enumerate(class_names[1:])},
        "hausdorff95": plain(nanmean(np.where(np.isinf(distances), np.nan, distances).reshape(1, -1), 1)[0])
        if width
        else None,
        "per_class_hausdorff95": {
            class_names[1 + number]: plain(nanmean(np.where(np.isinf(column), np.nan, column)[None], 1)[0])
            for number, column in enumerate(distances.T)
        },
        "missed_or_made_up": int(np.isinf(distances).sum()),
        "miou": pooled["miou"],
        "pixel_accuracy": pooled["pixel_accuracy"],
        "classes_not_in_test": pooled["classes_not_in_test"],
        "cases": {case.key: plain(value) for case, value in zip(cases, per_case, strict=True)},
        "n": len(cases),
    }
