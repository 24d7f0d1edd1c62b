"""From masks and the classes of their points to segmentations: points, fusion, and three kinds of answers.

Shahabodini et al. 2025 (arXiv 2505.19795); what is made of fused scores is OneFormer's and Mask2Former's inference.

>>> mask_points(torch.tensor([[[0.0, 1.0], [3.0, 2.0]]])).tolist()
[[[0.0, -1.0]]]
>>> query, point = torch.zeros(1, 3), torch.tensor([[2.0, 0.0]])
>>> fuse_mask_scores(query, point, alpha=1.0).softmax(-1).tolist()[0][2]
0.3333333432674408
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.errors import UsageError, unknown_name

PointMode = Literal["argmax", "distance", "centroid"]
Task = Literal["semantic", "panoptic", "instance"]
MODES = ("argmax", "distance", "centroid")
TINY = 1e-8
LEAST = -1e4
"""Of logarithms: what no class is given is shared out, instead of being no number."""


class Instances(NamedTuple):
    """Objects of an image, best first."""

    masks: Tensor
    """(n, H, W) bool."""
    labels: Tensor
    """(n,) int64 classes."""
    scores: Tensor
    """(n,) in [0, 1]."""


class Panoptic(NamedTuple):
    """A segment for each pixel."""

    ids: Tensor
    """(H, W) int32, 0 where there is none."""
    segments: list[dict[str, Any]]
    """For each of them `id`, `category_id` (the class) and `isthing`, as panoptic COCO has it."""


def mask_points(masks: Tensor, mode: PointMode = "argmax", size: tuple[int, int] | None = None) -> Tensor:
    """Return the point of each mask that its class is asked at, (Q, 2) as (row, column) in [-1, 1].

    Args:
        masks: (Q, H, W), logits or bool.
        mode: `argmax`, the first highest value (published; of a mask of constant value, the first pixel); for bool
            masks `distance`, the pixel farthest from the mask's border, or `centroid`, its pixel nearest to its centre
            of mass. An empty mask has the first pixel.
        size: (H, W) that rows and columns are fractions of; default: that of the masks.

    Raises:
        UsageError: Unknown mode, NaN, or logits for a mode of bool masks.
    """
    if mode not in MODES:
        raise unknown_name("point_mode", mode, MODES)
    height, width = masks.shape[-2:]
    if masks.is_floating_point() and bool(torch.isnan(masks).any()):
        raise UsageError("masks hold NaN; what made them has diverged")
    if mode == "argmax":
        if not len(masks):
            return torch.zeros(0, 2, device=masks.device)
        index = masks.flatten(1).to(torch.uint8 if masks.dtype == torch.bool else masks.dtype).argmax(1)
        places = torch.stack([index // width, index % width], dim=1)
    else:
        if masks.dtype != torch.bool:
            raise UsageError(
                f"point_mode={mode} is for masks of yes or no; use argmax for soft ones, or threshold them"
            )
        rows = [inner_pixel(mask, mode) for mask in masks.cpu().numpy()]
        places = torch.tensor(rows, device=masks.device).reshape(-1, 2)
    return places.float() / places.new_tensor(size or (height, width)).float() * 2 - 1


def inner_pixel(mask: np.ndarray, mode: PointMode = "distance") -> tuple[int, int]:
    """Return the row and column of a point inside a mask (H, W) bool, the first of several; (0, 0) of an empty one."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    if mode == "centroid":
        places = np.argwhere(part)
        nearest = ((places - places.mean(0)) ** 2).sum(1).argmin()
        row, column = places[nearest]
    else:  # what lies outside the image is background
        distance = distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(int(distance.argmax()), part.shape)
    return top + int(row), left + int(column)


def fuse_mask_scores(
    query_logits: Tensor | None,
    point_logits: Tensor,
    alpha: float = 0.4,
    renormalize: bool = True,
    void: Tensor | None = None,
) -> Tensor:
    """Return class logits (Q, K + 1), the last "no object", of what two classifiers say of each mask.

    With p and q the classes' probabilities of the two, g = p^(1 - α) q^α and v the probability of no object, they are
    log([g / Σ g · (1 - v), v] + 1e-8), as in the published OneFormer; without `renormalize` g itself, as in the
    published Mask2Former.

    Args:
        query_logits: (Q, K + 1) of what drew the masks; None: it names no classes, and points alone count.
        point_logits: (Q, K).
        alpha: Weight of the points, in [0, 1]; published: 0.4.
        renormalize: As above.
        void: (Q,) probability of no object, where there are no query logits; default: 0.

    Raises:
        UsageError: α outside its range, or other numbers of masks or classes.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha is {alpha}; it must be in [0, 1]")
    point = point_logits.float() if point_logits.dtype in (torch.float16, torch.bfloat16) else point_logits
    shares = F.log_softmax(_finite(point), -1)
    if query_logits is None:
        v = shares.new_zeros(len(shares), 1) if void is None else void.to(shares)[:, None]
        g = shares
    else:
        count = point_logits.shape[-1]
        if len(query_logits) != len(point_logits) or query_logits.shape[-1] != count + 1:
            raise UsageError(
                f"masks come with logits of shape {tuple(query_logits.shape)} and points of "
                f"{tuple(point_logits.shape)}; there is one row for each mask, and the former have one class more, "
                f"no object"
            )
        query = query_logits.to(shares)
        v = query.softmax(-1)[:, -1:]
        # 0 · -inf is 0 here: a classifier of no weight has no say.
        of_query = F.log_softmax(_finite(query[:, :-1]), -1) * (1 - alpha) if alpha < 1 else torch.zeros_like(shares)
        g = of_query + (shares * alpha if alpha > 0 else 0)
    g = g.clamp(min=LEAST)
    r = g.softmax(-1) if renormalize else g.exp()
    return torch.log(torch.cat([r * (1 - v), v], dim=-1) + TINY)


def _finite(logits: Tensor) -> Tensor:
    """Return logits with the least finite number for those of no probability."""
    return logits.masked_fill(torch.isneginf(logits), torch.finfo(logits.dtype).min)


def semantic_inference(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Return scores (K, H, W) of each class: Σ over masks of its probability times that of the mask.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, H, W).
    """
    return torch.einsum("qc,qhw->chw", class_logits.softmax(-1)[:, :-1], mask_logits.sigmoid())


def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    things: Collection[int],
    object_mask_threshold: float = 0.0,
    overlap_threshold: float = 0.8,
) -> Panoptic:
    """Return a segment for each pixel: masks of enough score share the image, stuff of one class is one segment.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, H, W).
        things: Classes of which objects are told apart.
        object_mask_threshold: Least score of a mask; published: 0.8 on COCO and Cityscapes, 0.5 on ADE20K.
        overlap_threshold: Least share of a mask that is left to it by the others.
    """
    scores, labels = class_logits.softmax(-1).max(-1)
    keep = (labels != class_logits.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, labels, masks = scores[keep], labels[keep], mask_logits[keep].sigmoid()
    ids = torch.zeros(mask_logits.shape[-2:], dtype=torch.int32, device=mask_logits.device)
    segments: list[dict[str, Any]] = []
    if not len(masks):
        return Panoptic(ids, segments)
    owner = (scores[:, None, None] * masks).argmax(0)
    owned = owner.flatten().bincount(minlength=len(masks))
    whole = (masks >= 0.5).flatten(1).sum(1)
    stuff: dict[int, int] = {}
    for number, label in enumerate(labels.tolist()):
        mask = (owner == number) & (masks[number] >= 0.5)
        if not int(owned[number]) or not int(whole[number]) or not bool(mask.any()):
            continue
        if int(owned[number]) / int(whole[number]) < overlap_threshold:
            continue
        thing = label in things
        if not thing and label in stuff:
            ids[mask] = stuff[label]
            continue
        segments.append({"id": len(segments) + 1, "category_id": label, "isthing": thing})
        ids[mask] = len(segments)
        if not thing:
            stuff[label] = len(segments)
    return Panoptic(ids, segments)


def instance_inference(
    class_logits: Tensor, mask_logits: Tensor, top_k: int = 100, things: Collection[int] | None = None
) -> Instances:
    """Return objects: the best pairs of mask and class, scored by class times the mean of the mask within itself.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, H, W).
        top_k: Most of them; published: 150 or 250.
        things: Classes that count as objects; None: all.

    Returns:
        In the order of the class's probability, before the mask's is multiplied in.
    """
    shares = class_logits.softmax(-1)[:, :-1]
    flat = shares.flatten()
    order = flat.argsort(descending=True, stable=True)[:top_k]
    count = max(1, shares.shape[-1])
    labels, queries = order % count, order // count
    if things is not None:
        wanted = torch.tensor(sorted(things), device=labels.device, dtype=labels.dtype)
        keep = torch.isin(labels, wanted)
        order, labels, queries = order[keep], labels[keep], queries[keep]
    used, place = queries.unique(return_inverse=True)
    inside = mask_logits[used] > 0
    mean = (mask_logits[used].sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return Instances(inside[place], labels, flat[order] * mean[place])
