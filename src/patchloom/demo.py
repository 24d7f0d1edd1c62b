"""From embedded photographs to a trained encoder and a report, with nothing to download.

>>> import patchloom as pl
>>> pl.demo(out="runs/demo")  # doctest: +SKIP
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.io import write_json

if TYPE_CHECKING:
    from patchloom.report import Section

# Small enough for minutes on two cores. Chosen by k-NN accuracy on held-out parts of the training crops.
ENCODER = "ccvit_tiny_patch8_64"
RECIPE: dict[str, Any] = {"batch_size": 32, "k": 512, "codebook_images": 1000, "probe_every": 1, "log_every": 4}
LABELS = {"knn": "k-NN", "linear": "linear probe"}
KINDS = {"trained": "CCViT, pre-trained", "untrained": "the same encoder, untrained", "pixels": "raw pixels, 16x16"}


def demo(
    out: str = "runs/demo", epochs: int = 2, seed: int = 0, num_workers: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Pre-train a tiny CCViT on the embedded photographs and show what it learned.

    Fits a centroid codebook, pre-trains an encoder on 64-pixel crops without labels, then compares it with the
    same encoder untrained and with raw pixels: which photograph does a crop come from? Training and test crops
    come from disjoint regions of the photographs.

    Args:
        out: Run folder; the report is `report.html` in it, the figures are in `summary.json`.
        epochs: Passes over the training crops.
        seed: Seed of weights, crops, masks and codebook.
        num_workers: Processes that prepare images.
        overwrite: Replace an earlier demo in the same folder.

    Returns:
        The contents of `summary.json`: accuracies as fractions under `knn_trained`, `knn_untrained`,
        `knn_pixels`, `linear_trained`, `linear_untrained`, `linear_pixels`, the duration under `seconds`, and
        what the training run itself reports.

    Raises:
        UsageError: `out` holds something already and `overwrite` is not set.
    """
    from patchloom.evaluate.run import measure
    from patchloom.report import add_section
    from patchloom.training.run import train

    start = time.perf_counter()
    settings = {
        "data": "photos",
        "probe_data": "photos:test",
        "out": out,
        "encoder": ENCODER,
        "epochs": epochs,
        "seed": seed,
        "num_workers": num_workers,
        "overwrite": overwrite,
    }
    run = train("pretrain", "ccvit", settings | RECIPE, go_on=f"patchloom pretrain ccvit --resume --out {out}")
    scores: dict[str, float] = {}
    for protocol in ("knn", "linear"):
        for kind in KINDS:
            print(f"{protocol}: {KINDS[kind]} …", file=sys.stderr)
            question = {
                "encoder": "pixels" if kind == "pixels" else str(run.model),
                "untrained": kind == "untrained",
                "train": "photos",
                "test": "photos:test",
                "image_size": 16 if kind == "pixels" else None,
                "num_workers": num_workers,
                "seed": seed,
            }
            result, _ = measure(protocol, question)
            scores[f"{protocol}_{kind}"] = result["accuracy"]
    summary = {**scores, **run.summary, "seconds": round(time.perf_counter() - start, 1)}
    _save(run.path / "summary.json", summary)
    add_section(run.report, _comparison(scores))
    print(_table(scores))
    print(f"\nreport: {run.report}\nmodel:  {run.model}")
    return summary


def _table(scores: dict[str, float]) -> str:
    """Return the comparison as a text table."""
    width = max(map(len, KINDS.values()))
    lines = [f"{'which photograph is this crop from?':<{width}}   k-NN  linear"]
    for kind, name in KINDS.items():
        lines.append(f"{name:<{width}}  {scores[f'knn_{kind}']:6.1%}  {scores[f'linear_{kind}']:6.1%}")
    return "\n".join(lines)


def _comparison(scores: dict[str, float]) -> Section:
    """Return the comparison as a section of the report."""
    from patchloom.report import Section, bars

    shares = {
        f"{name} ({protocol})": scores[f"{protocol}_{kind}"] for protocol in LABELS for kind, name in KINDS.items()
    }
    table: list[Mapping[str, object]] = [
        {"features": name} | {label: f"{scores[f'{protocol}_{kind}']:.1%}" for protocol, label in LABELS.items()}
        for kind, name in KINDS.items()
    ]
    return Section(
        title="Which photograph is this crop from?",
        text="Test crops come from parts of the photographs that no training crop touches; training saw no labels.",
        figures=[bars(shares, y_label="share of test crops", title="Accuracy")],
        table=table,
    )


def _save(path: Path, summary: dict[str, Any]) -> None:
    write_json(path, summary, default=str)
