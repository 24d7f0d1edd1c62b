"""The report of attacks: the table, the layers, curves, and pictures of what was changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchloom.attack.craft import TITLES
from patchloom.attack.subjects import Subjects
from patchloom.explain.render import Tile, grid
from patchloom.report.page import Figure, Section
from patchloom.report.plots import bars, curves
from patchloom.systems.dta.config import DTAConfig

SAID = (
    "ASR, the attack success rate, is the share of the images a victim had right that it has wrong on the attacked "
    "image; clean and robust accuracy, error and flips (another answer than before) are of all images. All in percent, "
    "with 95 % intervals. White-box PGD knows the victim and is no transfer attack: it shows how far one could go. A "
    "model that withstands transfer attacks need not withstand one that knows it."
)


def sections(
    config: DTAConfig,
    subjects: Subjects,
    attacked: Mapping[tuple[str, str], Tensor],
    said: Mapping[tuple[str, str], Tensor],
    summary: Mapping[str, Any],
) -> list[Section]:
    """Return the parts of the report.

    Args:
        config: The settings.
        subjects: Models and images.
        attacked: The first attacked images (pictured, C, H, W) by attack and, of a white-box attack, victim.
        said: Logits (n, classes) on them, by attack and victim.
        summary: The figures.
    """
    parts = [Section("Attacks and victims", SAID, table=_table(summary["table"]))]
    parts.append(_success(summary["table"]))
    if summary.get("layer_scores"):
        parts.append(_layers(summary))
    if summary["checks"]:
        parts.append(_checks(summary["checks"]))
    if summary["curves"]:
        parts.append(_curves(summary["curves"], config))
    if config.pictured:
        parts += _pictures(config, subjects, attacked, said)
    return parts


def _table(rows: list[dict[str, Any]]) -> list[dict[str, object]]:
    return [
        {
            "attack": TITLES[row["attack"]],
            "victim": row["victim"],
            "clean": f"{row['clean']:.1f}",
            "ASR": "–" if row["asr"] is None else f"{row['asr']:.1f} ({_ends(row['asr_interval'])})",
            "robust": f"{row['robust']:.1f} ({_ends(row['robust_interval'])})",
            "error": f"{row['error']:.1f}",
            "flips": f"{row['flip']:.1f}",
        }
        for row in rows
    ]


def _success(rows: list[dict[str, Any]]) -> Section:
    figures = []
    for victim in dict.fromkeys(row["victim"] for row in rows):
        own = [row for row in rows if row["victim"] == victim and row["asr"] is not None]
        if own:
            values = {row["attack"]: row["asr"] for row in own}
            ends = {row["attack"]: tuple(row["asr_interval"]) for row in own}
            figures.append(bars(values, y_label="ASR, %", title=victim, intervals=ends))
    return Section("Success by attack", "Whiskers are 95 % intervals.", figures)


def _layers(summary: Mapping[str, Any]) -> Section:
    figures, chosen = [], []
    for name, scores in summary["layer_scores"].items():
        chosen.append(f"{name}: {', '.join(map(str, summary['layers'][name]))}")
        if len(scores) > 1:
            series = {name: ([float(layer) for layer in scores], list(scores.values()))}
            figures.append(
                curves(series, x_label="block attacked, from 0", y_label="token cosine", title="Search for the layer")
            )
    text = f"The lower the cosine that is left, the more vulnerable the block. Attacked: {'; '.join(chosen)}."
    return Section("Which layer", text, figures)


def _checks(rows: list[dict[str, Any]]) -> Section:
    text = (
        "Attacks that fail for want of a gradient say nothing of robustness. Signs of it: noise does as much, success "
        "does not grow with ε or steps, knowing the victim does not help."
    )
    table = [
        {"victim": row["victim"], "check": row["check"], "holds": "yes" if row["good"] else "no", "found": row["found"]}
        for row in rows
    ]
    return Section("Can the figures be trusted?", text, table=table)


def _curves(found: Mapping[str, Any], config: DTAConfig) -> Section:
    figures = []
    for name, label in (("eps", "ε, in 1/255"), ("steps", "steps")):
        series = {victim: (one[name]["x"], one[name]["robust"]) for victim, one in found.items()}
        ends = {victim: (one[name]["low"], one[name]["high"]) for victim, one in found.items()}
        title = f"Robust accuracy by {label.split(',')[0]}"
        figures.append(curves(series, x_label=label, y_label="robust accuracy, %", title=title, bands=ends))
    count = config.curve_images
    return Section("Curves", f"The Downstream Transfer Attack on the first {count} images at most.", figures)


def _pictures(
    config: DTAConfig,
    subjects: Subjects,
    attacked: Mapping[tuple[str, str], Tensor],
    said: Mapping[tuple[str, str], Tensor],
) -> list[Section]:
    """Return a section of strips of images: clean, attacked, and the change enlarged to the whole range around grey."""
    if subjects.images.shape[1] not in (1, 3):
        return []
    victim, shown = subjects.victims[0], min(config.pictured, len(subjects.keys))
    names = [name for name, of in attacked if of in ("", victim.name)]
    drawn = []
    for number in range(shown):
        image = subjects.images[number]
        first: list[Tile] = [("clean", image)]
        second: list[Tile] = [(f"change x {0.5 / config.epsilon:.0f}", torch.full_like(image, 0.5))]
        for name in names:
            x = attacked.get((name, ""), attacked.get((name, victim.name)))
            assert x is not None
            right = int(said[name, victim.name][number].argmax()) == int(victim.labels[number])
            first.append((f"{name}: {'right' if right else 'wrong'}", x[number]))
            second.append((name, ((x[number] - image) / (2 * config.epsilon) + 0.5).clamp(0, 1)))
        key = subjects.keys[number]
        figure: Figure = grid([first, second], alt=f"{key} under each attack, and what was changed")
        drawn.append(replace(figure, caption=key))
    text = f"Answers of {victim.name}, and below each image what was changed, enlarged to the whole range around grey."
    return [Section("Images under attack", text, drawn)]


def _ends(interval: tuple[float, float] | list[float]) -> str:
    return " to ".join(f"{end:.1f}" for end in interval)
