"""What every evaluation is: settings in, figures and what was said of each image out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from patchloom.data.groups import read_groups
from patchloom.evaluate.statistics.figures import classification_figures
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.target import EvaluationConfig, encoder_name
from patchloom.features.extract import Features


class Evaluation:
    """A protocol bound to its settings.

    Attributes:
        predictions: What was said of each test image, once `run` has returned; None where there is no such thing.
    """

    config_class: type[Any] = EvaluationConfig

    def __init__(self, config: Any) -> None:
        self.config = config
        self.predictions: Predictions | None = None

    def run(self) -> dict[str, Any]:
        """Return `score`, `score_name`, the `interval` of the score, and what goes with them."""
        start = time.perf_counter()
        figures = self.figures()
        if self.predictions is not None and (doubts := self.predictions.doubts()):
            print(*doubts, sep="\n", file=sys.stderr)
            figures["notes"] = [*figures.get("notes", []), *doubts]
        return {**figures, "seconds": round(time.perf_counter() - start, 2)}

    def figures(self) -> dict[str, Any]:
        """Carry the evaluation out."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """Return what predictions are told apart by."""
        config = self.config
        name = encoder_name(config) or type(config.encoder).__name__
        return {"encoder": name, "train": config.train, "test": config.test, "protocol": type(self).__name__.lower()}

    def groups_of(self, keys: Sequence[str]) -> np.ndarray | None:
        """Return the group of each test image, where the settings name a file of them."""
        return None if self.config.groups is None else read_groups(self.config.groups, keys)

    def classified(
        self, scores: Tensor, train: Features, test: Features, class_names: list[str], predicted: Tensor | None = None
    ) -> dict[str, Any]:
        """Keep the predictions of a classifier and return their figures.

        Args:
            scores: (n, C) votes, probabilities or logits.
            train: What was learnt from.
            test: The n test features.
            class_names: Names by class.
            predicted: (n,) classes; default: those of the highest scores.
        """
        predicted = scores.argmax(1) if predicted is None else predicted
        self.predictions = Predictions(
            test.keys,
            predicted.numpy(),
            test.labels.numpy(),
            "accuracy",
            list(class_names),
            scores.float().numpy(),
            self.about(),
            self.groups_of(test.keys),
        )
        return classification_figures(self.predictions, train, test, **self.drawing())

    def drawing(self) -> dict[str, Any]:
        """Return how intervals are drawn: `draws`, `seed` and `resample`."""
        return {name: getattr(self.config, name) for name in ("draws", "seed", "resample")}
