"""Measure an encoder on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchloom._lazy import LazyTable, make_callable
from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.predictions import Predictions
from patchloom.io import check_place, write_json
from patchloom.training.config import config_from_mapping

EVALUATIONS: Mapping[str, type[Any]] = LazyTable(
    {
        "compare": "patchloom.evaluate.compare:Compare",
        "few_shot": "patchloom.evaluate.few_shot:FewShot",
        "finetune": "patchloom.evaluate.finetune:Finetune",
        "health": "patchloom.evaluate.health:Health",
        "knn": "patchloom.evaluate.knn:KNN",
        "linear": "patchloom.evaluate.linear:Linear",
        "linear_grid": "patchloom.evaluate.linear_grid:LinearGrid",
        "logistic": "patchloom.evaluate.logistic_sweep:Logistic",
        "multilabel": "patchloom.evaluate.multilabel:MultiLabel",
        "ordinal": "patchloom.evaluate.ordinal:Ordinal",
        "retrieval": "patchloom.evaluate.retrieval:Retrieval",
        "rl": "patchloom.evaluate.rl:RL",
        "segmentation": "patchloom.evaluate.segmentation:Segmentation",
        "slides": "patchloom.evaluate.slides.protocol:Slides",
        "volume_segmentation": "patchloom.evaluate.volume_segmentation:VolumeSegmentation",
        "volumes": "patchloom.evaluate.volumes:Volumes",
    }
)


def run(protocol: str, **settings: Any) -> dict[str, Any]:
    """Measure an encoder on labelled images.

    Args:
        protocol: Name of the evaluation, see `EVALUATIONS`.
        **settings: Fields of the evaluation's settings class; `encoder`, `train` and `test` are needed.

    Returns:
        The `score` (`score_name` says which) with its 95 % `interval`, the number of test images `n`, the width `dim`
        of the features, `skipped` images, `seconds`, and what the evaluation chose; of a classification also
        `accuracy` (a fraction), `balanced_accuracy`, `macro_f1` and `auroc` with their `intervals`, and
        `per_class_accuracy`.

    Raises:
        UsageError: Unknown evaluation or setting, or data that cannot be used.
    """
    return measure(protocol, settings)[0]


def measure(protocol: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Predictions | None]:
    """Return the figures of an evaluation, see `run`, and what was said of each image, where that is known."""
    if protocol not in EVALUATIONS:
        raise unknown_name("evaluation", protocol, EVALUATIONS)
    evaluation: Any = EVALUATIONS[protocol]
    for name in ("out", "predictions", "report", "picture"):
        if isinstance(place := settings.get(name), str | Path):
            check_place(place)
    config = config_from_mapping(evaluation.config_class, settings)
    bound = evaluation(config)
    figures: dict[str, Any] = {"protocol": protocol, **bound.run()}
    said = getattr(bound, "predictions", None)
    # Protocols whose predictions are pictures write these themselves.
    if (path := getattr(config, "predictions", None)) is not None and hasattr(bound, "predictions"):
        if said is None:
            raise UsageError(f"{protocol} says nothing of single images, so there are no predictions to write")
        said.save(path)
    if config.out is not None and not getattr(evaluation, "writes_out", False):
        write_json(config.out, figures)
    return figures, said


make_callable(__name__, run)
