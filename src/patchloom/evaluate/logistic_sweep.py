"""Logistic regression over a sweep of penalties, as DINOv2's published code evaluates (arXiv 2304.07193).

The features are taken as they are, in float64, and 45 strengths of the penalty from 1e-6 to 1e5 are tried on a held-out
tenth. The minima are scikit-learn's; each fit starts from the one before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.evaluate.logistic import LogisticModel, fit_logistic
from patchloom.evaluate.logistic_config import LogisticConfig
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.subset import learning_features
from patchloom.evaluate.target import labelled_features
from patchloom.features.extract import Features, torch_device

# Weaker penalties take the longest to fit; after this many that do worse than the best, none better is to be expected.
PATIENCE = 8
ROUGHLY, WELL = 1e-4, 1e-6


class Logistic(Evaluation):
    """Logistic regression on frozen features as they are, with the penalty that does best on validation images."""

    config_class = LogisticConfig

    def figures(self) -> dict[str, Any]:
        """Return accuracy (a fraction) and what goes with it."""
        config = self.config
        train, test, names = learning_features(config)
        device = torch_device(config.device)
        x, y = train.vectors.to(device).double(), train.labels.to(device)
        if len(y.unique()) < 2:
            raise UsageError(f"{config.train} has one class only; a classifier needs two")
        fitted, held = self._parts(x, y)
        tried, best = self._sweep(*fitted, *held, classes=len(names))
        c = max(tried, key=lambda one: one["validation"])["c"]  # the strongest of equals
        model = self._fit(x, y, len(names), c, WELL, best)
        used = {
            "c": c,
            "selected_on": config.val or "a held-out tenth of train",
            "tried": tried,
            "steps": model.steps,
            "converged": model.converged,
            **config.drawn(),
        }
        return {**self.classified(model.logits(test.vectors.double()).cpu(), train, test, names), **used}

    def _parts(self, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return features and labels to fit on while choosing, and to choose on."""
        config = self.config
        if config.val is not None:
            val: Features = labelled_features(replace(config, test=config.val))[1]
            return (x, y), (val.vectors.to(x), val.labels.to(y.device))
        # As published: the first tenth of a permutation.
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(config.seed)).to(y.device)
        tenth = max(1, len(y) // 10)
        held, rest = order[:tenth], order[tenth:]
        if len(y[rest].unique()) < 2:
            raise UsageError(f"{config.train} is too small to hold a tenth out of it; give val")
        return (x[rest], y[rest]), (x[held], y[held])

    def _sweep(
        self, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, *, classes: int
    ) -> tuple[list[dict[str, float]], LogisticModel | None]:
        """Return each penalty tried with its accuracy on the held-out images, and the best fit."""
        tried: list[dict[str, float]] = []
        model = best = None
        for c in self.config.cs:
            model = self._fit(x, y, classes, c, ROUGHLY, model)
            share = float((model.predict(held_x) == held_y).double().mean())
            if not tried or share > max(one["validation"] for one in tried):
                best = model
            tried.append({"c": c, "validation": share})
            top = max(range(len(tried)), key=lambda number: tried[number]["validation"])
            if len(tried) - 1 - top >= PATIENCE and tried[-1]["validation"] < tried[top]["validation"]:
                break
        return tried, best

    def _fit(
        self, x: Tensor, y: Tensor, classes: int, c: float, tolerance: float, start: LogisticModel | None
    ) -> LogisticModel:
        config = self.config
        return fit_logistic(
            x,
            y,
            classes,
            c=c,
            max_iter=config.max_iter,
            tolerance=tolerance,
            start=start,
            standardise=config.standardise,
        )
