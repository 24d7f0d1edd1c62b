"""How well objects are told apart: panoptic quality and mask AP, by torchmetrics, with intervals over images.

Kirillov et al. 2019 (arXiv 1801.00868) and COCO's average precision (pycocotools, extra `detection`).

>>> quality = PanopticScores(things={1}, stuff={0})
>>> truth = torch.tensor([[0, 0, 1], [0, 0, 1]])
>>> ids = torch.tensor([[0, 0, 1], [0, 0, 1]])
>>> quality.update(truth, ids, truth, ids)
>>> quality.compute()["pq"]
1.0
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import PanopticQuality

from patchloom.errors import MissingExtraError

STATES = ("iou_sum", "true_positives", "false_positives", "false_negatives")
DRAWS, FEW_DRAWS = 1000, 40
BOXES = ("map", "map_50", "map_75")


class PanopticScores:
    """Panoptic quality of a set, its parts kept by image.

    Args:
        things: Classes of which objects are told apart.
        stuff: All others.
    """

    def __init__(self, things: Collection[int], stuff: Collection[int]) -> None:
        self.things, self.stuff = set(things), set(stuff)
        self.parts: list[Tensor] = []

    def update(self, said: Tensor, said_ids: Tensor, truth: Tensor, true_ids: Tensor) -> None:
        """Count an image.

        Args:
            said: (H, W) predicted classes; others than those known are none.
            said_ids: (H, W) numbers of the objects among them.
            truth: (H, W) classes; others than those known are void: they count nowhere.
            true_ids: (H, W) numbers of the objects.
        """
        metric = PanopticQuality(self.things, self.stuff, allow_unknown_preds_category=True)
        pairs = [torch.stack([a.long(), b.long()], -1)[None] for a, b in ((said, said_ids), (truth, true_ids))]
        metric.update(*pairs)
        self.order = {int(c): place for c, place in metric.cat_id_to_continuous_id.items()}
        self.parts.append(torch.stack([getattr(metric, name).double() for name in STATES]))

    def compute(self, seed: int = 0) -> dict[str, Any]:
        """Return `pq` with its `pq_interval`, `pq_things`, `pq_stuff`, and `pq_per_class` by number; NaN: undefined."""
        parts = torch.stack(self.parts).numpy() if self.parts else np.zeros((0, 4, 1))
        places = [self.order[c] for c in sorted(self.things) if self.parts]
        others = [self.order[c] for c in sorted(self.stuff) if self.parts]
        by_class = _quality(parts.sum(0))
        drawn = _drawn(len(parts), DRAWS, seed) @ parts.reshape(len(parts), -1)
        means = np.array([_mean(_quality(one)) for one in drawn.reshape(-1, *parts.shape[1:])])
        return {
            "pq": _mean(by_class),
            "pq_interval": _ends(means),
            "pq_things": _mean(by_class[places]),
            "pq_stuff": _mean(by_class[others]),
            "pq_per_class": {number: float(by_class[place]) for number, place in getattr(self, "order", {}).items()},
        }


def _quality(sums: np.ndarray) -> np.ndarray:
    """Return PQ by class of sums (4, K), NaN where a class is neither there nor predicted."""
    total = sums[1] + 0.5 * sums[2] + 0.5 * sums[3]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(total > 0, sums[0] / total, math.nan)
    return found


class MaskAP:
    """COCO's average precision of objects of a set, by masks or boxes, with intervals over its images.

    Args:
        kind: `segm` or `bbox`.

    Raises:
        MissingExtraError: pycocotools is not installed.
    """

    def __init__(self, kind: str = "segm") -> None:
        if not has_pycocotools():
            raise MissingExtraError("pycocotools", "detection", "average precision")
        self.kind = kind
        self.said: list[dict[str, Tensor]] = []
        self.truth: list[dict[str, Tensor]] = []

    def update(self, said: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        """Count an image.

        Args:
            said: `labels` (n,), `scores` (n,) and `masks` (n, H, W) bool, or `boxes` (n, 4).
            truth: `labels` and `masks` or `boxes`.
        """
        self.said.append(said)
        self.truth.append(truth)

    def compute(self, seed: int = 0) -> dict[str, Any]:
        """Return `map`, `map_50`, `map_75`, `map_interval` and `map_per_class` by number; NaN: undefined.

        The interval is that of a few draws of the images: their spread about the value.
        """
        whole = self._of(range(len(self.said)), per_class=True)
        figures: dict[str, Any] = {name: _known(whole[name]) for name in BOXES}
        classes = whole["classes"].reshape(-1).tolist()
        values = whole["map_per_class"].reshape(-1).tolist()
        figures["map_per_class"] = {int(c): _known(v) for c, v in zip(classes, values, strict=False)}
        count, ends = len(self.said), [math.nan, math.nan]
        if count > 1 and not math.isnan(figures["map"]):
            draws = np.random.default_rng(seed).integers(0, count, (FEW_DRAWS, count))
            found = np.array([_known(self._of(rows)["map"]) for rows in draws])
            spread = 2.02 * float(np.nanstd(found, ddof=1)) * math.sqrt(count / (count - 1))  # Student's t, 39 degrees
            ends = [max(0.0, figures["map"] - spread), min(1.0, figures["map"] + spread)]
        return figures | {"map_interval": ends}

    def _of(self, rows: Any, per_class: bool = False) -> dict[str, Any]:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(iou_type=self.kind, class_metrics=per_class)  # type: ignore[arg-type]
        metric.warn_on_many_detections = False
        metric.update([self.said[row] for row in rows], [self.truth[row] for row in rows])
        found: dict[str, Any] = metric.compute()
        return found


def has_pycocotools() -> bool:
    """Return whether what average precision is computed by is installed."""
    return importlib.util.find_spec("pycocotools") is not None


def _known(value: Any) -> float:
    """Return a number of torchmetrics, which has -1 where there is none."""
    return math.nan if float(value) < 0 else float(value)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _drawn(count: int, draws: int, seed: int) -> np.ndarray:
    """Return how often each of `count` images comes in each of so many draws."""
    if not count:
        return np.zeros((0, 0))
    weights: np.ndarray = np.random.default_rng(seed).multinomial(count, [1 / count] * count, draws).astype(np.float64)
    return weights


def _ends(values: np.ndarray) -> list[float]:
    known = values[~np.isnan(values)] if len(values) else values
    return [float(x) for x in np.percentile(known, [2.5, 97.5])] if len(known) else [math.nan, math.nan]
