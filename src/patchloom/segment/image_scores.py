"""How good a segmentation is, image by image: overlap, borders, intervals over images, and which images are worst.

Of an image only numbers are kept, four for each class, so that what a set takes does not grow with its pixels.

>>> scores = ImageScores(["ground", "lung"])
>>> truth = torch.zeros(8, 8, dtype=torch.uint8)
>>> truth[2:6, 2:6] = 1
>>> scores.update(0, truth, truth)
>>> scores.update(3, torch.zeros_like(truth), truth)
>>> scores.figures()["miou"], scores.figures()["boundary_f"], scores.worst(1)
(0.6071428571428572, 0.5, [3])
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.segment.boundary import boundary_f
from patchloom.segment.metrics import IGNORED, Areas, areas, segmentation_scores
from patchloom.segment.overlap import interval_of, plain, right_score, scores_with_intervals


class ImageScores:
    """Scores of a set of images with masks.

    Args:
        class_names: K names.
    """

    def __init__(self, class_names: list[str]) -> None:
        self.class_names = class_names
        self.indices: list[int] = []
        self._areas: list[np.ndarray] = []
        self._borders: list[np.ndarray] = []

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def update(self, index: int, predicted: Tensor, target: Tensor) -> None:
        """Count an image.

        Args:
            index: Its number, by which `worst` names it.
            predicted: (H, W) classes; 255 where there is none, which is wrong.
            target: (H, W) classes, 255 where unknown.

        Raises:
            UsageError: Shapes differ, or a class is none of K.
        """
        count = len(self.class_names)
        self.indices.append(index)
        self._areas.append(torch.stack(list(counted(predicted, target, count))).numpy())
        self._borders.append(boundary_f(predicted, target, count).numpy())

    @property
    def areas(self) -> Areas:
        """Areas (n, K) of each image."""
        return Areas(*torch.from_numpy(np.stack(self._areas)).unbind(1))

    def figures(self, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
        """Return all figures, as they go into `summary.json`; of no image, none.

        Args:
            seed: Of the draws of intervals.
            draws: How many.

        Returns:
            `miou` with its `interval`, `pixel_accuracy_test`, `class_accuracy`, `per_class_iou`, `boundary_f` (the mean
            over classes and images) and `per_class_boundary_f`, each with `…_interval` (95 %, over images; of
            `per_class_iou` it is `per_class_interval`); `classes_not_in_test`. None: not defined.
        """
        if not len(self):
            return {}
        names = self.class_names
        found = scores_with_intervals(self.areas, names, seed=seed, draws=draws)
        kept = ("miou", "interval", "per_class_iou", "per_class_interval", "class_accuracy", "classes_not_in_test")
        result: dict[str, Any] = {name: found[name] for name in kept}
        for name in ("pixel_accuracy", "pixel_accuracy_interval"):
            result[name.replace("accuracy", "accuracy_test")] = found[name]
        tables = self._border_tables()
        result["boundary_f"] = plain(_mean(tables))
        result["boundary_f_interval"] = interval_of(right_score, tables, draws, seed)
        each = {name: tables[:, :, number] for number, name in enumerate(names)}
        result["per_class_boundary_f"] = {name: plain(_mean(part)) for name, part in each.items()}
        result["per_class_boundary_f_interval"] = {
            name: interval_of(right_score, part, draws, seed) for name, part in each.items() if part[:, 2].any()
        }
        return result

    def values(self) -> dict[str, Any]:
        """Return figures without intervals: `miou`, `pixel_accuracy_test`, `boundary_f`, and `per_class_iou`, known."""
        if not len(self):
            return {}
        found = segmentation_scores(self.areas.total())
        known = {n: v for n, v in zip(self.class_names, found["iou"], strict=True) if v == v}
        result = {"miou": found["miou"], "pixel_accuracy_test": found["pixel_accuracy"], "per_class_iou": known}
        return result | {"boundary_f": plain(_mean(self._border_tables()))}

    def _border_tables(self) -> np.ndarray:
        """Return scores of borders and where there are any (n, 3, K), in the form of areas, which intervals are of."""
        scores = np.stack(self._borders)
        known = ~np.isnan(scores)
        return np.stack([np.where(known, scores, 0), known, known], 1).astype(np.float64)

    def worst(self, count: int) -> list[int]:
        """Return the numbers of the images with the largest share of wrong pixels, the worst first."""
        sums = np.stack(self._areas).sum(2) if self._areas else np.zeros((0, 3))
        wrong = 1 - sums[:, 0] / sums[:, 2].clip(min=1)
        wrong[sums[:, 2] == 0] = 0.0  # nothing is known of it
        return [self.indices[place] for place in np.argsort(-wrong, kind="stable")[:count]]


def counted(predicted: Tensor, truth: Tensor, num_classes: int) -> Areas:
    """Return the areas of each class in an image; pixels of no class (255) are wrong."""
    nothing = torch.where(predicted == IGNORED, num_classes, predicted.long())
    return Areas(*(area[:num_classes] for area in areas(nothing, truth, num_classes + 1)))


def errors_of(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Return what to draw of mistakes, (H, W) uint8: K where right, K + 1 where wrong, 255 where nothing is known."""
    drawn = torch.where(predicted.long() == truth.long(), num_classes, num_classes + 1)
    return torch.where(truth == IGNORED, IGNORED, drawn).to(torch.uint8)


def _mean(table: np.ndarray) -> float:
    """Return the mean of what there is in tables (n, 3, …)."""
    total = table[:, 2].sum()
    return float(table[:, 0].sum() / total) if total else float("nan")
