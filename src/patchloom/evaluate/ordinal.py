"""Grades, such as the severity of a disease: classes in an order, measured by quadratic kappa."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from patchloom.data.labels import number_order
from patchloom.errors import UsageError
from patchloom.evaluate.linear import Linear
from patchloom.evaluate.ordinal_config import OrdinalConfig
from patchloom.evaluate.subset import learning_features
from patchloom.statistics.metrics import kappa, mean_grade_error


class Ordinal(Linear):
    """Logistic regression on frozen features, scored by quadratic kappa: a wrong grade counts by its distance."""

    config_class = OrdinalConfig

    def figures(self) -> dict[str, Any]:
        """Return quadratic kappa and what goes with it."""
        config = self.config
        train, test, names = learning_features(config)
        order = in_order(names, config.grades)
        place = torch.tensor([order.index(name) for name in names])
        train, test = (one._replace(labels=place[one.labels]) for one in (train, test))
        logits, used = self.fitted(train, test, len(order))
        scores = logits.double().softmax(1)
        expected = (scores @ torch.arange(len(order), dtype=torch.float64)).round().long()
        predicted = scores.argmax(1) if config.decide == "likeliest" else expected
        figures = self.classified(scores, train, test, order, predicted)
        assert self.predictions is not None
        drawn = self.drawing()
        agreement, error = (self.predictions.interval(score, **drawn) for score in (kappa, mean_grade_error))
        self.predictions = replace(self.predictions, score_name="kappa")
        intervals = {"kappa": agreement.ends, "mean_grade_error": error.ends}
        return {
            **figures,
            **used,
            "score": agreement.value,
            "score_name": "kappa",
            "interval": intervals["kappa"],
            "kappa": agreement.value,
            "mean_grade_error": error.value,
            "intervals": {**intervals, **figures["intervals"]},
            "grades": order,
        }


def in_order(names: list[str], grades: list[str] | None = None) -> list[str]:
    """Return the classes from the lowest grade to the highest.

    >>> in_order(["0", "1", "10", "2"])
    ['0', '1', '2', '10']

    Raises:
        UsageError: `grades` are not the classes.
    """
    if grades is not None:
        if sorted(grades) != sorted(names):
            raise UsageError(f"grades are {', '.join(grades)}, but the classes are {', '.join(names)}")
        return list(grades)
    return number_order(names)
