"""What a point segmenter is worth on images with masks: overlap, borders, objects, and what its classes cost it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom import registry
from patchloom.base.progress import track
from patchloom.data.base import UnreadableImageError
from patchloom.data.mask_values import IGNORED
from patchloom.data.pixels import unit
from patchloom.data.segmentation import MaskSource
from patchloom.segment.boundary import boundary_f
from patchloom.segment.metrics import Areas, areas, iou
from patchloom.segment.objects import MaskAP, PanopticScores, has_pycocotools
from patchloom.systems.vit_p.proposals import components
from patchloom.systems.vit_p.sampling import PointSampler
from patchloom.systems.vit_p.segmenter import PointSegmenter, oracle_logits

POINTS = 250
"""Points of an image that accuracy is measured at."""


@torch.no_grad()
def measure(model: PointSegmenter, source: MaskSource, seed: int = 0) -> dict[str, Any]:
    """Return figures of a segmenter on images with masks, as they go into `summary.json`.

    Args:
        model: In eval mode.
        source: Images with masks of the model's classes.
        seed: Of points and of the draws of intervals.

    Returns:
        `miou` with its `interval`, `per_class_iou`, `boundary_f`, `point_accuracy` (of points drawn with every class as
        often as any other), `oracle_miou` (each mask given the class it overlaps most: what the masks allow); where
        objects are told apart also `pq` and `mask_ap` with intervals.
    """
    names = model.class_names
    found, best, borders, right = [], [], [], [0, 0, 0]
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
        found.append(counted(said, truth, len(names)))
        oracle = oracle_logits(proposals, truth, len(names))
        best.append(counted(model.labels(proposals, oracle), truth, len(names)))
        borders.append(boundary_f(said, truth, len(names)))
        if quality is not None:
            panoptic = model.panoptic(proposals, logits)
            quality.update(classes_of(panoptic.ids, panoptic.segments), panoptic.ids, *true_objects(truth, model))
        if precision is not None:
            objects = model.instances(proposals, logits)
            precision.update(objects._asdict(), true_instances(truth, model))
    if not found:
        return {}
    stacked = Areas(*(torch.stack(list(column)) for column in zip(*found, strict=True)))
    # By its place: measuring stands above systems.
    figures = registry.load("evaluate.statistics.overlap:scores_with_intervals")(stacked, names, seed=seed)
    kept = ("miou", "interval", "per_class_iou", "per_class_interval", "class_accuracy", "classes_not_in_test")
    result: dict[str, Any] = {name: figures[name] for name in kept}
    result["pixel_accuracy_test"] = figures["pixel_accuracy"]
    totals = Areas(*(sum(column) for column in zip(*best, strict=True)))
    result["oracle_miou"] = float(iou(totals).nanmean())
    by_class = torch.stack(borders)
    result["boundary_f"] = float(by_class.nanmean())
    result["boundary_f_interval"] = _mean_interval(by_class.nanmean(1))
    result["per_class_boundary_f"] = {n: _plain(v) for n, v in zip(names, by_class.nanmean(0).tolist(), strict=True)}
    if right[2]:
        result |= {"point_accuracy": right[0] / right[2], "point_accuracy_top5": right[1] / right[2]}
    if quality is not None:
        scores = quality.compute(seed)
        by_number = scores.pop("pq_per_class")
        result |= {name: _plain(value) if isinstance(value, float) else value for name, value in scores.items()}
        result["pq_per_class"] = {names[number]: _plain(value) for number, value in sorted(by_number.items())}
    if precision is not None:
        scores = precision.compute(seed)
        by_number = scores.pop("map_per_class")
        result |= {f"mask_{name.replace('map', 'ap')}": value for name, value in scores.items()}
        result["mask_ap_per_class"] = {names[number]: _plain(value) for number, value in sorted(by_number.items())}
    return result


def counted(said: Tensor, truth: Tensor, num_classes: int) -> Areas:
    """Return the areas of each class in an image; pixels without a mask are of no class, which is wrong."""
    nothing = torch.where(said == IGNORED, num_classes, said.long())
    return Areas(*(area[:num_classes] for area in areas(nothing, truth, num_classes + 1)))


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


def errors_of(said: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Return what to draw of mistakes, (H, W) uint8: K where right, K + 1 where wrong, 255 where nothing is known."""
    drawn = torch.where(said.long() == truth.long(), num_classes, num_classes + 1)
    return torch.where(truth == IGNORED, IGNORED, drawn).to(torch.uint8)


def nearest(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a mask (H, W) at another size."""
    return F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]


def _mean_interval(values: Tensor) -> list[float | None]:
    """Return the 95 % interval of a mean over images, by Student's t."""
    known = values[~values.isnan()].double()
    if len(known) < 2:
        return [None, None]
    from scipy.stats import t

    half = float(t.ppf(0.975, len(known) - 1)) * float(known.std()) / math.sqrt(len(known))
    return [float(known.mean()) - half, float(known.mean()) + half]


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
