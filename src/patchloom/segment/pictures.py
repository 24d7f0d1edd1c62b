"""Which images a report shows, the worst and some at random, and where a segmentation of them is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from patchloom.data.base import UnreadableImageError
from patchloom.report.masks import segmentation_figure
from patchloom.report.page import Figure, Section
from patchloom.segment.image_scores import ImageScores, errors_of
from patchloom.segment.words import between, rate, told

RIGHT, WRONG = (225, 225, 225), (214, 39, 40)
BY_CLASS = {
    "IoU": ("per_class_iou", "per_class_interval"),
    "boundary F": ("per_class_boundary_f", "per_class_boundary_f_interval"),
    "PQ": ("pq_per_class", ""),
    "mask AP": ("mask_ap_per_class", ""),
}
EACH = 3
"""Images of each choice."""


class Segmented(NamedTuple):
    """An image, its mask, and what a model says of it."""

    image: Tensor
    """(C, h, w) in [0, 1]."""
    truth: Tensor
    """(H, W) classes, 255 where unknown."""
    predicted: Tensor
    """(H, W) classes."""


def choose_shown(scores: ImageScores | None, count: int, seed: int = 0) -> dict[str, list[int]]:
    """Return the numbers of images to show, by what they are: the worst, and others at random.

    Args:
        scores: Of the images; None or empty: some from all over the list.
        count: Images in all.
        seed: Of the draw.
    """
    if scores is None or not len(scores):
        places = {round(place) for place in np.linspace(0, count - 1, min(count, 2 * EACH))}
        return {"from all over the list": sorted(places)}
    worst = scores.worst(EACH)
    others = [index for index in scores.indices if index not in worst]
    drawn = np.random.default_rng(seed).permutation(len(others))[:EACH]
    found = {"the worst, by the share of wrong pixels": worst, "at random": [others[place] for place in sorted(drawn)]}
    return {name: indices for name, indices in found.items() if indices}


def error_figures(
    shown: Mapping[str, Sequence[int]],
    segmented: Callable[[int], Segmented],
    palette: Sequence[tuple[int, int, int]],
    class_names: Sequence[str],
) -> list[Figure]:
    """Return a picture for each choice of images, a row for each: image, truth, prediction, error.

    Args:
        shown: Numbers of images by what they are; those that cannot be read are left out.
        segmented: Gives an image by its number.
        palette: (R, G, B) by class.
        class_names: Names by class.
    """
    figures = []
    for name, indices in shown.items():
        rows = []
        for index in indices:
            try:
                rows.append(segmented(index))
            except UnreadableImageError:
                continue
        if not rows:
            continue
        masks = {
            "truth": [row.truth for row in rows],
            "prediction": [row.predicted for row in rows],
            "error": [errors_of(row.predicted, row.truth, len(class_names)) for row in rows],
        }
        pictures = [row.image[:3] if len(row.image) >= 3 else row.image[:1] for row in rows]
        legend = [*class_names, "right", "wrong"]
        figures.append(
            segmentation_figure(pictures, masks, [*palette, RIGHT, WRONG], legend, caption=f"Images {name}.")
        )
    return figures


def figures_section(figures: Mapping[str, Any], class_names: Sequence[str], more: str = "") -> Section:
    """Return mean IoU, pixel accuracy and boundary F in words, and what there is of each class as a table.

    Args:
        figures: Those of `ImageScores`, and what else is told by class.
        class_names: Names by class.
        more: Further sentences.
    """
    table: list[dict[str, object]] = []
    for name in class_names:
        row: dict[str, object] = {"class": name}
        for column, (key, ends) in BY_CLASS.items():
            if (value := figures.get(key, {}).get(name)) is not None:
                row[column] = rate(value) + between(figures.get(ends, {}).get(name))
        table.append(row)
    return Section(
        title="Figures on test images", text=f"{told(figures)} Intervals are over images. {more}".strip(), table=table
    )
