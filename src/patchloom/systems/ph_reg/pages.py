"""The pages of PH-Reg's report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchloom.encoders import normalize
from patchloom.report import Section
from patchloom.report.artefacts import TITLES, WITHOUT, feature_figure, pattern_figure

if TYPE_CHECKING:
    from patchloom.systems.ph_reg.comparison import Comparison
    from patchloom.systems.ph_reg.method import PHRegMethod


def sections(method: PHRegMethod, found: Comparison, images: Tensor) -> list[Section]:
    """Return the artefacts before and after in figures and pictures.

    Args:
        method: The trained method.
        found: What was measured.
        images: (n, C, S, S) in [0, 1], the ones shown.
    """
    model = method.model
    inputs = normalize(images, method.encoder)
    method.encoder.eval()
    offsets, flips = model.teacher.draw(len(images), torch.Generator().manual_seed(method.config.seed))
    seen = {
        "before": model.teacher.features(inputs),
        "after": model.features(inputs),
        "mean over views": model.teacher(inputs, offsets, flips),
    }
    table: list[dict[str, object]] = [
        {
            "figure": TITLES[name],
            "before": before,
            "after": found.after.figures[name],
            "without artefacts": WITHOUT[name],
        }
        for name, before in found.before.figures.items()
    ]
    table.append({"figure": "distance to the mean over views", "before": found.distance[0], "after": found.distance[1]})
    whose = "of probe_data" if method.config.probe_data else "of the training data"
    return [
        Section(
            title="Artefacts before and after",
            text=f"{found.sentence} {found.images} images {whose}.",
            table=table,
        ),
        Section(
            title="Features before and after",
            text="The original, the student, and what the student learnt from: the original's mean over views.",
            figures=[feature_figure(images.cpu(), {name: each.float().cpu() for name, each in seen.items()})],
        ),
        Section(
            title="What does not depend on the image",
            figures=[
                pattern_figure(
                    {"before": found.before.features, "after": found.after.features},
                    {"before": found.before.empty, "after": found.after.empty},
                )
            ],
        ),
    ]
