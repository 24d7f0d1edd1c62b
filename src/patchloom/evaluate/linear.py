"""Linear probe: logistic regression on frozen features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.evaluate.linear_config import LinearProbeConfig
from patchloom.evaluate.logistic import LogisticModel, fit_logistic
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.subset import learning_features
from patchloom.features.extract import Features, torch_device

CHOICES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MIDDLE = 0.1
# Enough to compare penalties by; the final fit goes further.
ROUGHLY = 1e-3


class Linear(Evaluation):
    """Logistic regression on standardised frozen features; the penalty is chosen on training images only."""

    config_class = LinearProbeConfig

    def figures(self) -> dict[str, Any]:
        """Return accuracy (a fraction) and what goes with it."""
        train, test, class_names = learning_features(self.config)
        logits, used = self.fitted(train, test, len(class_names))
        return {**self.classified(logits, train, test, class_names), **used}

    def fitted(self, train: Features, test: Features, classes: int) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits (n, K) of the test features, and what was chosen on the training features."""
        config = self.config
        device = torch_device(config.device)
        x, y = train.vectors.to(device), train.labels.to(device)
        if len(y.unique()) < 2:
            raise UsageError(f"{config.train} has one class only; a classifier needs two")
        c, near = (config.c, None) if config.c is not None else self._choose(x, y, classes)
        model = fit_logistic(x, y, classes, c=c, max_iter=config.max_iter, start=near)
        used = {"c": c, "steps": model.steps, "converged": model.converged, **config.drawn()}
        return model.logits(test.vectors).cpu(), used

    def _choose(self, x: Tensor, y: Tensor, classes: int) -> tuple[float, LogisticModel | None]:
        """Return the penalty that does best on a held-out fifth of the training images; the strongest of equals.

        Penalties are tried from the strongest on, each starting from the one before, until two in a row do worse than
        the best before them: weaker ones take the longest to fit. The best fit comes with it, to start from.
        """
        labels = y.cpu().numpy()
        counts = np.unique(labels, return_counts=True)[1]
        # Each class in both parts, where there are images enough for that.
        stratify = labels if counts.min() >= 2 and len(labels) >= 5 * len(counts) else None
        parts = train_test_split(np.arange(len(y)), test_size=0.2, random_state=self.config.seed, stratify=stratify)
        fitted, held = (torch.from_numpy(np.sort(part)).to(y.device) for part in parts)
        if len(y[fitted].unique()) < 2:
            return MIDDLE, None
        scores: list[float] = []
        models: list[LogisticModel] = []
        for c in CHOICES:
            models.append(
                fit_logistic(
                    x[fitted],
                    y[fitted],
                    classes,
                    c=c,
                    max_iter=self.config.max_iter,
                    tolerance=ROUGHLY,
                    start=models[-1] if models else None,
                )
            )
            scores.append(float((models[-1].predict(x[held]) == y[held]).double().mean()))
            if len(scores) > 2 and max(scores[-2:]) < max(scores[:-2]):
                break
        best = int(np.argmax(scores))
        return CHOICES[best], models[best]
