"""Linear probe: logistic regression on frozen features."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from patchloom.errors import UsageError
from patchloom.evaluate.target import EvaluationConfig, figures, labelled_features

CHOICES = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class LinearConfig(EvaluationConfig):
    """Settings of the linear probe."""

    c: float | None = None
    """Inverse strength of the L2 penalty; default: the best of 0.001, 0.01, 0.1, 1 on a fifth of the training images"""
    max_iter: int = 300
    """Most iterations of L-BFGS"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.c is not None and self.c <= 0:
            raise UsageError(f"c is {self.c}; it must be above 0")
        if self.max_iter < 1:
            raise UsageError(f"max_iter is {self.max_iter}; it must be at least 1")


class Linear:
    """Logistic regression on standardised frozen features; the penalty is chosen on training images only."""

    config_class = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return accuracy (a fraction) and what goes with it."""
        start, config = time.perf_counter(), self.config
        train, test, class_names = labelled_features(config)
        x, y = train.vectors.double().numpy(), train.labels.numpy()
        if len(np.unique(y)) < 2:
            raise UsageError(f"{config.train} has one class only; a classifier needs two")
        c = config.c if config.c is not None else self._choose(x, y)
        said = torch.from_numpy(self._fit(x, y, c).predict(test.vectors.double().numpy()))
        found = figures(said, test, class_names)
        return {**found, "c": c, "seconds": round(time.perf_counter() - start, 2)}

    def _choose(self, x: np.ndarray, y: np.ndarray) -> float:
        """Return the penalty that does best on a held-out fifth of the training images; the strongest of equals."""
        stratify = (
            y if np.bincount(y).clip(min=0)[np.unique(y)].min() >= 2 and len(y) >= 5 * len(np.unique(y)) else None
        )
        fit_x, held_x, fit_y, held_y = train_test_split(
            x, y, test_size=0.2, random_state=self.config.seed, stratify=stratify
        )
        if len(np.unique(fit_y)) < 2:
            return 0.1
        scores = [self._fit(fit_x, fit_y, c).score(held_x, held_y) for c in CHOICES]
        return CHOICES[int(np.argmax(scores))]

    def _fit(self, x: np.ndarray, y: np.ndarray, c: float) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=self.config.max_iter))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(x, y)
