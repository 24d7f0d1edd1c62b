"""Which of two encoders is better, and could it be chance? The same images, paired."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom.errors import UsageError
from patchloom.evaluate.compare_config import ComparisonConfig
from patchloom.evaluate.config import Resample
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.features.class_scores import class_scores
from patchloom.statistics.delong import delong
from patchloom.statistics.intervals import Difference, holm, paired_bootstrap


class Compare:
    """Paired difference of two or more encoders on the same images, with interval and p-value."""

    config_class = ComparisonConfig

    def __init__(self, config: ComparisonConfig) -> None:
        self.config = config
        self.predictions = None

    def run(self) -> dict[str, Any]:
        """Return the score of each encoder and every paired difference.

        Returns:
            `scores`, and `differences`: the second less the first, its 95 % `interval`, `p_value`, and `p_holm`, which
            allows for how many were compared.
        """
        config = self.config
        names = _listed(config.encoders if config.files is None else config.files)
        if len(names) < 2:
            raise UsageError(f"a comparison needs at least two, and {names} is one")
        labels = [_label(name) for name in names]
        if len(set(labels)) < len(labels):
            raise UsageError(f"{labels} names one of them twice")
        predictions = [self._predictions_of(name) for name in names]
        pairs = [
            (first, second)
            for first, second in combinations(range(len(names)), 2)
            if config.against == "all" or first == 0
        ]
        differences = paired_differences(
            [(labels[i], labels[j], predictions[i], predictions[j]) for i, j in pairs],
            draws=config.draws,
            seed=config.seed,
            resample=config.resample,
        )
        scores = []
        for label, one in zip(labels, predictions, strict=True):
            interval = one.interval(draws=config.draws, seed=config.seed, resample=config.resample)
            scores.append({"encoder": label, "score": interval.value, "interval": interval.ends, **_beside(one)})
        return {
            "score_name": predictions[0].score_name,
            "test": "DeLong"
            if _is_one_finding(predictions[0]) and predictions[0].groups is None
            else "paired bootstrap",
            "n": len(predictions[0].keys),
            "scores": scores,
            "differences": differences,
            **({"notes": doubts} if (doubts := predictions[0].doubts()) else {}),
        }

    def _predictions_of(self, name: Any) -> Predictions:
        """Return what was said of each image: from a file, or by measuring the encoder now."""
        config = self.config
        if config.files is not None:
            return Predictions.load(name)
        from patchloom import registry
        from patchloom.training.config import config_from_mapping

        evaluation = registry.method_class("evaluate", config.by)
        shared = {"train": config.train, "test": config.test, "seed": config.seed, "encoder": name}
        bound = evaluation(config_from_mapping(evaluation.config_class, {**config.settings, **shared}))
        bound.run()
        if getattr(bound, "predictions", None) is None:
            raise UsageError(f"{config.by} says nothing of single images, so encoders cannot be compared by it")
        predictions: Predictions = bound.predictions
        return predictions


def paired_differences(
    pairs: Sequence[tuple[str, str, Predictions, Predictions]],
    *,
    draws: int = 1000,
    seed: int = 0,
    resample: Resample = "images",
) -> list[dict[str, Any]]:
    """Return by how much the second of each pair scores higher than the first, on the same images.

    Args:
        pairs: Names and predictions of the first and the second.
        draws: Draws of the bootstrap.
        seed: Seed of the draws.
        resample: What is drawn, see `ComparisonConfig`.

    Returns:
        For each pair `first`, `second`, `difference`, its 95 % `interval`, `p_value`, and `p_holm`, which allows for
        how many pairs there are (Holm 1979).

    Raises:
        UsageError: Two of a pair are of different images, or of different scores.
    """
    differences = [
        compare_predictions(one, other, draws=draws, seed=seed, resample=resample) for _, _, one, other in pairs
    ]
    corrected = holm([difference.p_value for difference in differences])
    return [
        {
            "first": first,
            "second": second,
            "difference": difference.value,
            "interval": difference.ends,
            "p_value": difference.p_value,
            "p_holm": p_holm,
        }
        for (first, second, _, _), difference, p_holm in zip(pairs, differences, corrected, strict=True)
    ]


def compare_predictions(
    first: Predictions, second: Predictions, *, draws: int = 1000, seed: int = 0, resample: Resample = "images"
) -> Difference:
    """Return by how much the second scores higher than the first, on the same images.

    DeLong's test where the score is the AUROC of one finding, and images are in no groups; else the paired bootstrap
    over images, or over the groups of the first.

    Args:
        first: What one encoder said.
        second: What another said of the same images, in any order.
        draws: Draws of the bootstrap.
        seed: Seed of the draws.
        resample: What is drawn, see `ComparisonConfig`.

    Raises:
        UsageError: They are of different images, or of different scores.
    """
    if first.score_name != second.score_name:
        raise UsageError(f"{first.score_name} and {second.score_name} cannot be compared; use one evaluation for both")
    second = second.ordered_like(first)
    if _is_one_finding(first) and first.groups is None:
        return delong(first.predicted.reshape(-1), second.predicted.reshape(-1), first.targets.reshape(-1))
    return paired_bootstrap(
        first.score,
        first.predicted,
        second.predicted,
        first.targets,
        strata=first.strata(resample),
        groups=first.groups,
        draws=draws,
        seed=seed,
    )


def _beside(predictions: Predictions) -> dict[str, float]:
    """Return what an accuracy is read beside."""
    if predictions.score_name != "accuracy":
        return {}
    scores = class_scores(torch.from_numpy(predictions.predicted), torch.from_numpy(predictions.targets))
    return {"balanced_accuracy": scores.balanced_accuracy, "majority_share": scores.majority_share}


def _is_one_finding(predictions: Predictions) -> bool:
    """Return whether the score is the AUROC of a single label."""
    return predictions.score_name in ("auroc", "mean_auroc") and int(np.prod(predictions.predicted.shape[1:])) == 1


def _listed(names: Any) -> list[Any]:
    if isinstance(names, str):
        return [name.strip() for name in names.split(",") if name.strip()]
    return list(names)


def _label(name: Any) -> str:
    return str(name) if isinstance(name, (str, Path)) else f"{type(name).__name__} {id(name):x}"
