"""Sections of a report on frames in time: triplets, order verification, VICReg's terms, the representation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchloom.features.representation import representation_report
from patchloom.report.figures import image_grid
from patchloom.report.page import Section
from patchloom.report.plots import bars, curves

if TYPE_CHECKING:
    from patchloom.features.representation import Observed

Row = dict[str, float]


def triplet_section(samples: Sequence[tuple[Tensor, dict[str, Tensor]]], frames: int) -> Section:
    """Return triplets in time and what the network is shown of them.

    Args:
        samples: Triplets, (3 · frames, H, W) uint8, with their augmented views.
        frames: Frames of an observation.
    """
    now, before, after = (
        torch.stack([image.split(frames)[part] for image, _ in samples]).float() / 255 for part in range(3)
    )
    rows = {"before": before, "at t": now, "after": after}
    for name, label in (("view1", "first view"), ("view2", "second view"), ("previous", "before, as seen")):
        rows[label] = torch.stack([views[name] for _, views in samples]).float() / 255
    return Section(
        title="Frame triplets",
        text=f"Observations of {frames} frames with the ones before and after. Three frames are drawn as red, green "
        f"and blue, so what moves has coloured edges and what stands still is grey. The network is shown two views of "
        f"each and its neighbours in other colours.",
        figures=[image_grid(rows)],
    )


def order_section(rows: Sequence[Row], *, balanced: bool, chronological: bool) -> Section | None:
    """Return how well the order of triplets is told, over the run."""
    figures = []
    share = 1 / 2 if balanced else 5 / 6
    floor = float(torch.special.entr(torch.tensor([share, 1 - share])).sum())
    losses = {name: series for name in ("order_loss", "held_out_order_loss") if (series := _series(rows, name))}
    if not losses:
        return None
    reach = (min(x[0] for x, _ in losses.values()), max(x[-1] for x, _ in losses.values()))
    named = {name.replace("_", " "): series for name, series in losses.items()}
    named["always the same answer"] = (list(reach), [floor, floor])
    figures.append(curves(named, x_label="step", y_label="loss", title="Order loss"))
    scores = {
        name.replace("_", " "): series
        for name in ("order_accuracy", "held_out_order_auroc", "held_out_order_auroc_plain")
        if (series := _series(rows, name))
    }
    if scores:
        scores["always the same answer"] = (list(reach), [share, share])
        figures.append(curves(scores, x_label="step", y_label="share", title="Order prediction accuracy"))
    agreed = "(t - 1, t, t + 1)" if chronological else "(t, t - 1, t + 1)"
    last = losses.get("held_out_order_loss", losses.get("order_loss", ([], [float("nan")])))[1][-1]
    word = "below" if last < floor else "not below"
    return Section(
        title="Temporal order verification",
        text=f"A linear head says whether three observations stand in the agreed order {agreed} or were shuffled; "
        f"{share:.0%} of them were. Its loss ends at {last:.3f}, {word} the {floor:.3f} of a head that always gives "
        f"the same answer. Held-out triplets come in all six orders, as in training and (plain) without augmentation: "
        f"in training only the observation at t is cropped, which gives most wrong orders away.",
        figures=figures,
    )


def terms_section(rows: Sequence[Row]) -> Section | None:
    """Return VICReg's three terms over the run."""
    terms = {name: series for name in ("invariance", "variance", "covariance") if (series := _series(rows, name))}
    if not terms:
        return None
    return Section(
        title="Invariance, variance, covariance",
        text="Without their weights. Invariance falls as two views of an observation come to look alike; variance is "
        "at 1 where all observations are projected to one point, and falls to 0 as each dimension spreads to a "
        "standard deviation of 1; covariance falls as dimensions stop repeating each other.",
        figures=[
            curves({name: series}, x_label="step", y_label=name, title=name.capitalize())
            for name, series in terms.items()
        ],
    )


def representation_section(observed: Observed) -> Section:
    """Return singular values, similarity, sparsity and attention of a representation."""
    figures = representation_report(
        observed.features, observed.groups, observed.attentions, observed.blocks, observed.following
    )
    values = [max(value, 1e-9) for value in figures["singular_values"]]
    spectrum = {"singular value": (list(range(1, len(values) + 1)), values)}
    layers = list(range(len(figures["hoyer"])))
    entropy = {f"head {n}": value for n, value in enumerate(figures["attention_entropy"])}
    alike = {"within a game": figures["within_similarity"], "consecutive": figures["sequence_similarity"]}
    if "between_similarity" in figures:
        alike["between games"] = figures["between_similarity"]
    return Section(
        title="Representation",
        text=f"Of {len(observed.features)} observations. Effective rank {figures['effective_rank']:.1f} of at most "
        f"{observed.features.shape[1]}; {figures['dead_dimensions']} dimensions stand still (standard deviation below "
        f"0.001). Attention: 1 is spread over all patches, 0 is on one.",
        figures=[
            curves(spectrum, x_label="number", y_label="value", title="Singular values", log_y=True),
            bars(alike, y_label="mean cosine", title="Similarity of observations"),
            curves({"Hoyer": (layers, figures["hoyer"])}, x_label="block", y_label="sparsity", title="Sparsity"),
            bars(entropy, y_label="entropy / log(patches)", title="Attention of the last block"),
        ],
    )


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]] | None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return ([x for x, _ in points], [y for _, y in points]) if points else None
