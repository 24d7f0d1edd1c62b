"""What a point segmenter is worth on images with masks: overlap, borders, objects, and what its classes cost it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.progress import track
from patchloom.data.base import UnreadableImageError
from patchloom.data.mask_values import IGNORED
from patchloom.data.pixels import unit
from patchloom.data.segmentation import MaskSource
from patchloom.segment.image_scores import ImageScores, counted
from patchloom.segment.metrics import Areas, iou
from patchloom.segment.objects import MaskAP, PanopticScores, has_pycocotools
from patchloom.systems.vit_p.proposals import components
from patchloom.systems.vit_p.sampling import PointSampler
from patchloom.systems.vit_p.segmenter import PointSegmenter, oracle_logits

POINTS = 250
"""Points of an image that accuracy is measured at."""


@torch.no_grad()
def measure(
    model: PointSegmenter, source: MaskSource, seed: int = 0, scores: ImageScores | None = None
) -> dict[str, Any]:
    """Return figures of a segmenter on images with masks, as they go into `summary.json`.

    Args:
        model: In eval mode.
        source: Images with masks of the model's classes.
        seed: Of points and of the draws of intervals.
        scores: Where images are counted, for one who asks which are worst; default: nowhere that lasts.

    Returns:
        `miou` with its `interval`, `per_class_iou`, `boundary_f`, `point_accuracy` (of points drawn with every class as
        often as any other), `oracle_miou` (each mask given the class it overlaps most: what the masks allow); where
        objects are told apart also `pq` and `mask_ap` with intervals.
    """
    names = model.class_names
    scores = ImageScores(names) if scores is None else scores
    best, right = [], [0, 0, 0]
    sampler = PointSampler(POINTS)
    numbers = set(range(len(names)))
    quality = PanopticScores(model.thing_numbers, numbers - model.thing_numbers) if model.things else None
    precision = MaskAP() if model.things and has_pycocotools() else None
    for index in track(range(len(source)), "segmenting test images"):
        try:
            sample = source.read(index)
        except UnreadableImageError:
            continue
        image, truth = unit(sample.image), torch.as_tensor(sample.named["mask"])
        generator = torch.Generator().manual_seed(seed + index)
        points, classes = sampler.from_mask(truth, generator)
        if int(classes[0]) >= 0:
            top = model.point_logits(image, points).cpu().topk(min(5, len(names)), 1).indices
            hits = top == classes[:, None]
            right = [right[0] + int(hits[:, 0].sum()), right[1] + int(hits.sum()), right[2] + len(classes)]
        proposals, logits = model.scored(image)
        said = model.labels(proposals, logits)
        scores.update(index, said, truth)
        oracle = oracle_logits(proposals, truth, len(names))
        best.append(counted(model.labels(proposals, oracle), truth, len(names)))
        if quality is not None:
            panoptic = model.panoptic(proposals, logits)
            quality.update(classes_of(panoptic.ids, panoptic.segments), panoptic.ids, *true_objects(truth, model))
        if precision is not None:
            objects = model.instances(proposals, logits)
            precision.update(objects._asdict(), true_instances(truth, model))
    if not len(scores):
        return {}
    result: dict[str, Any] = scores.figures(seed)
    totals = Areas(*(sum(column) for column in zip(*best, strict=True)))
    result["oracle_miou"] = float(iou(totals).nanmean())
    if right[2]:
        result |= {"point_accuracy": right[0] / right[2], "point_accuracy_top5": right[1] / right[2]}
    if quality is not None:
        kept = quality.compute(seed)
        by_number = kept.pop("pq_per_class")
        result |= {name: _plain(value) if isinstance(value, float) else value for name, value in kept.items()}
        result["pq_per_class"] = {names[number]: _plain(value) for number, value in sorted(by_number.items())}
    if precision is not None:
        found = precision.compute(seed)
        by_number = found.pop("map_per_class")
        result |= {f"mask_{name.replace('map', 'ap')}": value for name, value in found.items()}
        result["mask_ap_per_class"] = {names[number]: _plain(value) for number, value in sorted(by_number.items())}
    return result


def classes_of(ids: Tensor, segments: Sequence[dict[str, Any]]) -> Tensor:
    """Return the class (H, W) of the segments of a panoptic map, 255 where there is none."""
    table = torch.full((len(segments) + 1,), IGNORED)
    for segment in segments:
        table[segment["id"]] = segment["category_id"]
    return table[ids.long()]


def true_objects(truth: Tensor, model: PointSegmenter) -> tuple[Tensor, Tensor]:
    """Return classes and numbers of objects of a mask (H, W): the connected parts of things, stuff as one."""
    numbers, _ = components(truth)
    things = torch.isin(truth.long(), torch.tensor(sorted(model.thing_numbers)))
    return truth.long(), torch.where(things, numbers + 1, 0)


def true_instances(truth: Tensor, model: PointSegmenter) -> dict[str, Tensor]:
    """Return `masks` (n, H, W) and `labels` (n,) of the connected parts of things in a mask (H, W)."""
    classes, numbers = true_objects(truth, model)
    ids = numbers.unique()
    ids = ids[ids > 0]
    masks = numbers == ids[:, None, None]
    labels = [int(classes[mask][0]) for mask in masks]
    return {"masks": masks, "labels": torch.tensor(labels, dtype=torch.int64)}


def nearest(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a mask (H, W) at another size."""
    return F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
