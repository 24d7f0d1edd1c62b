"""What a detector of defects is worth on images with and without them.

A detector is any module from images (B, C, H, W) in [0, 1] to `anomaly_map` (B, 1, H, W) and `pred_score` (B,).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import nn

from patchloom.base.progress import track
from patchloom.data import make_loader
from patchloom.data.base import Source
from patchloom.data.defects import DefectSource
from patchloom.data.pixels import unit
from patchloom.errors import UsageError
from patchloom.evaluate.anomaly.metrics import PixelFigures, Ranking
from patchloom.statistics.intervals import Interval, bootstrap_interval
from patchloom.statistics.metrics import Score, auroc
from patchloom.systems.ear.data import MeasuredView
from patchloom.systems.ear.model import calibrate_threshold

Array = np.ndarray
NAN = float("nan")


@dataclass
class Scored:
    """Images as a detector sees them."""

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """0 for good, 1 for a defect."""
    kinds: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    maps: list[Array] = field(default_factory=list)
    """(H, W) float32 each."""
    masks: list[Array | None] = field(default_factory=list)
    """(H, W) bool each; None for good images, and where masks are not known."""
    has_masks: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    """Time the detector took, reading left out."""

    @property
    def peaks(self) -> list[float]:
        """Greatest value of each map."""
        return [float(one.max()) for one in self.maps]

    def forget_maps(self) -> None:
        """Keep the greatest value of each map alone: the maps of many images are large."""
        self.maps = [np.full((1, 1), peak, np.float32) for peak in self.peaks]


@torch.no_grad()
def score_images(
    detector: nn.Module,
    source: Source,
    size: tuple[int, int],
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    device: torch.device | None = None,
    what: str = "scoring",
    keep_maps: bool = True,
) -> Scored:
    """Return the scores and maps of all images of a source.

    Args:
        detector: See above; it is put into eval mode.
        source: The images; of a `DefectSource` labels and masks are kept.
        size: Height and width images are resized to; masks too, by the nearest pixel.
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: Where to compute.
        what: What the progress line says.
        keep_maps: Without, maps are left out once their greatest value is known (and are that value alone).

    Raises:
        UsageError: No image can be read.
    """
    has_masks = isinstance(source, DefectSource) and source.has_masks
    kind_of = (
        dict(zip(map(source.key, range(len(source))), source.kinds, strict=True))
        if isinstance(source, DefectSource)
        else {}
    )
    place = device or torch.device("cpu")
    detector = detector.to(place).eval()
    loader = make_loader(
        source, MeasuredView(size, has_masks), batch_size, seed=0, shuffle=False, num_workers=num_workers
    )
    found = Scored(has_masks=has_masks)
    for batch in track(loader, what, unit="batch"):
        found.skipped += batch["skipped"]
        if not batch["key"]:
            continue
        images = unit(batch["image"]).to(place)
        begun = time.perf_counter()
        said = detector(images)
        scores, maps = said["pred_score"].float().cpu(), said["anomaly_map"][:, 0].float().cpu()
        found.seconds += time.perf_counter() - begun
        found.scores += scores.tolist()
        found.maps += list((maps if keep_maps else maps.amax((1, 2), keepdim=True)).numpy())
        found.keys += batch["key"]
        found.labels += [int(label > 0) for label in batch["label"].tolist()]
        found.kinds += [kind_of.get(key, "") for key in batch["key"]]
        for mask in batch["mask"].bool().numpy() if has_masks else [None] * len(batch["key"]):
            found.masks.append(mask if mask is not None and mask.any() else None)
    if not found.keys:
        raise UsageError(f"{source.name} holds no readable image")
    return found


def thresholds_of(scored: Scored, labelled: bool) -> tuple[float, float]:
    """Return the thresholds of scores and of maps that images not learnt from give, see `calibrate_threshold`."""
    labels = scored.labels if labelled else None
    scores, peaks = (torch.tensor(values, dtype=torch.float64) for values in (scored.scores, scored.peaks))
    return calibrate_threshold(scores, labels), calibrate_threshold(peaks, labels)


def figures(scored: Scored, threshold: float, pixel_threshold: float) -> dict[str, Any]:
    """Return what scores and maps are worth.

    Args:
        scored: Images with and without defects.
        threshold: Score from which on an image counts as defect.
        pixel_threshold: Value of the map from which on a pixel does.

    Returns:
        `image_auroc`, `image_ap` (average precision), `image_f1` (at the threshold), `image_f1_max`; where masks are
        known `pixel_auroc`, `aupro` (false positive rates up to 0.3), `pixel_ap`, `pixel_f1`, `pixel_f1_max`;
        `intervals` of these, `per_kind` AUROC, counts, `milliseconds_per_image`, and `undefined`, a sentence where
        something is not defined. What is not defined is None.
    """
    labels, scores = np.array(scored.labels), np.array(scored.scores, dtype=np.float64)
    good, bad = int((labels == 0).sum()), int((labels == 1).sum())
    ranking = Ranking(scores[labels == 0], scores[labels == 1])
    called = (scores >= threshold).astype(np.int64)
    intervals: dict[str, Interval] = {}
    if ranking.defined:
        intervals["image_auroc"] = bootstrap_interval(auroc, scores, labels)
        intervals["image_ap"] = bootstrap_interval(average_precision, scores, labels, strata=labels)
        intervals["image_f1"] = bootstrap_interval(defect_f1, called, labels, strata=labels)
    found: dict[str, float] = {
        "image_auroc": ranking.auroc(),
        "image_ap": ranking.average_precision(),
        "image_f1": ranking.f1(threshold),
        "image_f1_max": ranking.best_f1(),
    }
    if scored.has_masks:
        pixels = PixelFigures(scored.maps, scored.masks)
        intervals |= pixels.intervals(pixel_threshold)
        found |= {name: intervals[name].value for name in ("pixel_auroc", "aupro", "pixel_ap", "pixel_f1")}
        found["pixel_f1_max"] = pixels.ranking.best_f1()
    missing = "good image" if not good else "image with a defect"
    return {
        **{name: None if isnan(value) else value for name, value in found.items()},
        "intervals": {name: interval.ends for name, interval in intervals.items()},
        "per_kind": _per_kind(scored, ranking.good),
        "test_images": {"good": good, "defect": bad},
        "threshold": threshold,
        "milliseconds_per_image": round(1000 * scored.seconds / len(scored.keys), 2),
        **(
            {}
            if ranking.defined
            else {"undefined": f"no {missing} to measure on, so AUROC and the like are not defined"}
        ),
    }


def _per_kind(scored: Scored, good: Array) -> dict[str, dict[str, Any]]:
    """Return of each kind of defect how many images there are, and the AUROC against the good ones."""
    told: dict[str, dict[str, Any]] = {}
    for kind in sorted({kind for kind, label in zip(scored.kinds, scored.labels, strict=True) if label}):
        own = np.array(
            [s for s, k, label in zip(scored.scores, scored.kinds, scored.labels, strict=True) if label and k == kind]
        )
        value = Ranking(good, own).auroc()
        told[kind] = {"images": len(own), "image_auroc": None if isnan(value) else value}
    return told


def _average_precision(scores: Array, truth: Array, weights: Array) -> Array:
    """Average precision of each row of weights, ties told together."""
    scores, truth = scores.reshape(len(scores), -1)[:, -1], truth.reshape(-1) > 0.5
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    drawn = weights[:, order].astype(np.float64)
    right = np.add.reduceat(drawn * truth[order], starts, axis=1)
    told = np.add.reduceat(drawn, starts, axis=1).cumsum(1)
    precision = right.cumsum(1) / np.maximum(told, 1e-12)
    total = right.sum(1)
    return np.where(total > 0, (right * precision).sum(1) / np.maximum(total, 1e-12), np.nan)


def _defect_f1(called: Array, truth: Array, weights: Array) -> Array:
    """F1 of defects of each row of weights."""
    right = weights @ ((called == 1) & (truth == 1))
    both = weights @ (called == 1) + weights @ (truth == 1)
    return np.where(both > 0, 2.0 * right / np.maximum(both, 1), np.nan)


average_precision = Score("average_precision", _average_precision, "scores")
defect_f1 = Score("defect_f1", _defect_f1, "classes")


def rows_of(scored: Scored, threshold: float, normalized: Sequence[float]) -> list[list[Any]]:
    """Return a row of `scores.csv` for each image: file, kind, label, score, the same in [0, 1], if called defect."""
    return [
        [key, kind, label, f"{score:.9g}", f"{part:.6g}", int(score >= threshold)]
        for key, kind, label, score, part in zip(
            scored.keys, scored.kinds, scored.labels, scored.scores, normalized, strict=True
        )
    ]
