"""k-NN classification: what features know without any training on top."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from patchloom.errors import UsageError
from patchloom.evaluate.figures import classification_figures
from patchloom.evaluate.target import EvaluationConfig, labelled_features
from patchloom.features.knn import knn_predict


@dataclass(frozen=True, kw_only=True)
class KNNConfig(EvaluationConfig):
    """Settings of the k-NN evaluation; the defaults are DINO's."""

    k: int = 20
    """Neighbours that vote"""
    temperature: float = 0.07
    """Lower lets near neighbours dominate the vote"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.k < 1:
            raise UsageError(f"k is {self.k}; at least one neighbour has to vote")
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")


class KNN:
    """Vote of the nearest training images by cosine similarity."""

    config_class = KNNConfig

    def __init__(self, config: KNNConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return accuracy (a fraction) and what goes with it."""
        start, config = time.perf_counter(), self.config
        train, test, class_names = labelled_features(config)
        said = knn_predict(
            train.vectors,
            train.labels,
            test.vectors,
            k=config.k,
            temperature=config.temperature,
            num_classes=len(class_names),
        )
        figures = classification_figures(said, train, test, class_names)
        used = {"k": min(config.k, len(train.labels)), "temperature": config.temperature}
        return {**figures, **used, "seconds": round(time.perf_counter() - start, 2)}
