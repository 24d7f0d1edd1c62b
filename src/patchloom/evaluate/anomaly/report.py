"""The report's part on defects: figures beside the baselines', ROC curves, pictures of what was found and missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from patchloom.data.defects import DefectSource
from patchloom.data.pixels import unit
from patchloom.data.sample import transformed
from patchloom.evaluate.anomaly.measure import Scored
from patchloom.report import Section, curves
from patchloom.systems.ear.data import MeasuredView
from patchloom.systems.ear.report import recovery_figure
from patchloom.systems.ear.saved import SavedEAR

SHOWN = 6
COLUMNS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1": "image F1",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "pixel_ap": "pixel AP",
    "pixel_f1": "pixel F1",
}


def report_sections(
    saved: SavedEAR, test: DefectSource, scored: Mapping[str, Scored], found: Mapping[str, Mapping[str, Any]]
) -> list[Section]:
    """Return figures and pictures of the images measured on.

    Args:
        saved: The model.
        test: The images.
        scored: What each detector says of them; the first is the model.
        found: The figures of each.
    """
    own = next(iter(scored))
    counts = found[own]["test_images"]
    text = (
        f"{counts['good']} good images and {counts['defect']} with a defect; 95 % intervals in brackets. F1 is at the "
        f"threshold set before, on images that were not measured on. {found[own].get('undefined', '')}"
    )
    table = [{"detector": name, **_row(each)} for name, each in found.items()]
    sections = [Section(title="Defects found", text=text.strip(), table=table, figures=_roc(scored))]
    if len(found[own]["per_kind"]) > 1:
        kinds: list[dict[str, object]] = [
            {"kind": kind, "images": each["images"], "image AUROC": _short(each["image_auroc"])}
            for kind, each in found[own]["per_kind"].items()
        ]
        sections.append(Section(title="Kinds of defects", table=kinds))
    return [*sections, *_galleries(saved, test, scored[own], found[own]["threshold"])]


def _row(found: Mapping[str, Any]) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, column in COLUMNS.items():
        if name not in found:
            continue
        ends = found["intervals"].get(name) or [None, None]
        between = "" if None in ends or found[name] is None else f" ({ends[0]:.3f} to {ends[1]:.3f})"
        row[column] = f"{_short(found[name])}{between}"
    return {**row, "ms an image": found["milliseconds_per_image"]}


def _short(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _roc(scored: Mapping[str, Scored]) -> list[Any]:
    """Return the ROC curve of each detector's image scores."""
    lines = {}
    for name, each in scored.items():
        scores, labels = np.array(each.scores), np.array(each.labels)
        if len(set(each.labels)) < 2:
            return []
        limits = np.concatenate([[np.inf], np.unique(scores)[::-1]])
        false = [(scores[labels == 0] >= limit).mean() for limit in limits]
        true = [(scores[labels == 1] >= limit).mean() for limit in limits]
        lines[name] = ([float(x) for x in false], [float(y) for y in true])
    return [curves(lines, x_label="good images called defect", y_label="defects found", title="ROC of images")]


def _galleries(saved: SavedEAR, test: DefectSource, scored: Scored, threshold: float) -> list[Section]:
    """Return pictures of defects found and missed, and of good images called defect."""
    scores, labels = np.array(scored.scores), np.array(scored.labels)
    rising = np.argsort(scores, kind="stable")
    defects, good = rising[labels[rising] == 1], rising[labels[rising] == 0][::-1]
    parts = {
        "Defects found": (defects[scores[defects] >= threshold][::-1], "from the highest score down"),
        "Defects missed": (defects[scores[defects] < threshold], "from the lowest score up"),
        "Good images called defect": (good[scores[good] >= threshold], "from the highest score down"),
        "Good images": (good[scores[good] < threshold], "from the highest score down"),
    }
    highest = float(max(scored.peaks))
    sections = []
    for title, (numbers, order) in parts.items():
        if not len(numbers):
            continue
        chosen = numbers[:SHOWN]
        text = f"{len(numbers)} images; shown {order}. Maps are drawn to one scale."
        sections.append(
            Section(
                title=f"Pictures: {title.lower()}", text=text, figures=[_pictures(saved, test, scored, chosen, highest)]
            )
        )
    return sections


@torch.no_grad()
def _pictures(saved: SavedEAR, test: DefectSource, scored: Scored, chosen: Any, highest: float) -> Any:
    view = MeasuredView(saved.image_size, test.has_masks)
    places = {test.key(index): index for index in range(len(test))}
    device = saved.model.threshold.device
    pictures, found, truth, titles = [], [], [], []
    for number in chosen:
        views = transformed(view, test.read(places[scored.keys[number]]), torch.Generator())
        pictures.append(unit(views["image"]))
        found.append({name: value.cpu() for name, value in saved.model(pictures[-1][None].to(device)).items()})
        truth.append(views.get("mask"))
        titles.append(f"{scored.kinds[number]} {scored.scores[number]:.3g}")
    known = truth if test.has_masks else None
    return recovery_figure(pictures, found, truth=known, titles=titles, highest=highest)
