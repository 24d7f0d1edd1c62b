"""Several labels per image, such as the findings of a chest X-ray: mean AUROC, of each label, macro F1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.evaluate.linear_grid import LinearGrid
from patchloom.evaluate.multilabel_config import MultiLabelConfig
from patchloom.evaluate.statistics.figures import counts
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.subset import learning_features, shot_neighbours
from patchloom.features.extract import Features, torch_device
from patchloom.features.knn import knn_votes
from patchloom.features.mlknn import mlknn_predict
from patchloom.statistics.delong import delong_interval
from patchloom.statistics.intervals import Interval, bootstrap_interval
from patchloom.statistics.metrics import label_macro_f1, mean_auroc, per_label_auroc


class MultiLabel(LinearGrid):
    """Mean AUROC over labels of which an image may have several; unknown labels are left out."""

    config_class = MultiLabelConfig

    def figures(self) -> dict[str, Any]:
        """Return the mean AUROC and what goes with it."""
        if self.config.probe == "linear":
            train, test, names, logits, chosen = self.best_head(mean_auroc, several=True)
            scores = logits.sigmoid()
        else:
            train, test, names, scores, chosen = self._neighbour_votes()
        return {**self._figures(scores, train, test, names), **chosen}

    def _neighbour_votes(self) -> tuple[Features, Features, list[str], Tensor, dict[str, Any]]:
        """Return train, test, names, the votes or probabilities (n, L) of test, and how they came about."""
        config = self.config
        train, test, names = learning_features(config, several=True, may_be_same=True)
        arguments: dict[str, Any] = {
            "ks": shot_neighbours([config.k, *(config.ks or [])], config.shots, config.shots_by),
            "leave_one_out": train is test,
            "device": torch_device(config.device),
        }
        if config.probe == "knn":
            options: dict[str, Any] = {"temperature": config.temperature}
            predictions = knn_votes(train.vectors, train.labels, test.vectors, **options, **arguments)
        else:
            options = {"smoothing": config.smoothing, "exclude_self": config.exclude_self}
            predictions = mlknn_predict(train.vectors, train.labels, test.vectors, **options, **arguments)
        k = min(config.k, max(predictions))
        chosen = {"probe": config.probe, "k": k, **options, "leave_one_out": train is test, **config.drawn()}
        if config.ks:
            truth = test.labels.numpy()
            areas = {number: float(mean_auroc(votes.cpu().numpy(), truth)) for number, votes in predictions.items()}
            chosen["mean_auroc_by_k"] = {str(number): area for number, area in areas.items()}
        return train, test, names, predictions[k].cpu(), chosen

    def _figures(self, scores: Tensor, train: Features, test: Features, names: list[str]) -> dict[str, Any]:
        truth = (test.labels > 0.5).float().masked_fill(test.labels.isnan(), torch.nan).numpy()
        predictions = scores.double().numpy()
        groups = self.groups_of(test.keys)
        self.predictions = Predictions(
            test.keys, predictions, truth, "mean_auroc", list(names), about=self.about(), groups=groups
        )
        areas = per_label_auroc(predictions, truth)
        if all(area != area for area in areas):
            raise UsageError("no label both occurs and fails to occur among the images to measure on")
        drawn = self.drawing()
        mean = self.predictions.interval(**drawn)
        f1 = self.predictions.interval(label_macro_f1, **drawn)
        each: dict[str, dict[str, Any]] = {}
        for number, (name, area) in enumerate(zip(names, areas, strict=True)):
            column = truth[:, number]
            shown = {"positives": int((column == 1).sum()), "unknown": int((column != column).sum())}
            if area != area:
                each[name] = {"auroc": None, "interval": None, **shown}
                continue
            interval: Interval = (
                delong_interval(predictions[:, number], column)
                if groups is None  # DeLong takes images to be independent
                else bootstrap_interval(
                    mean_auroc,
                    predictions[:, [number]],
                    truth[:, [number]],
                    groups=groups,
                    draws=self.config.draws,
                    seed=self.config.seed,
                )
            )
            each[name] = {"auroc": area, "interval": interval.ends, **shown}
        figures = {
            "score": mean.value,
            "score_name": "mean_auroc",
            "interval": mean.ends,
            "mean_auroc": mean.value,
            "label_macro_f1": f1.value,
            "intervals": {"mean_auroc": mean.ends, "label_macro_f1": f1.ends},
            "per_label": each,
            **counts(train, test),
        }
        if left := [name for name, one in each.items() if one["auroc"] is None]:
            figures["notes"] = [f"always or never there in the test images, so without AUROC: {', '.join(left)}"]
        return figures
