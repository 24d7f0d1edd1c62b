"""Several labels per image, such as the findings of a chest X-ray: mean AUROC, of each label, macro F1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.figures import counts
from patchloom.evaluate.linear_grid import LinearGrid, LinearGridConfig
from patchloom.evaluate.metrics import label_macro_f1, mean_auroc, per_label_auroc
from patchloom.evaluate.predictions import Predictions
from patchloom.evaluate.statistics import Interval, bootstrap_interval, delong_interval
from patchloom.evaluate.target import labelled_features
from patchloom.features.extract import Features, torch_device
from patchloom.features.knn import knn_votes


@dataclass(frozen=True, kw_only=True)
class MultiLabelConfig(LinearGridConfig):
    """Settings of the multi-label evaluation."""

    probe: Literal["linear", "knn"] = "linear"
    """The grid of linear heads with binary cross-entropy, or the weighted vote of neighbours"""
    k: int = 20
    """Neighbours that vote, for probe=knn"""
    temperature: float = 0.07
    """Lower lets near neighbours dominate the vote"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.probe not in ("linear", "knn"):
            raise unknown_name("probe", self.probe, ("linear", "knn"))
        if self.k < 1:
            raise UsageError(f"k is {self.k}; at least one neighbour has to vote")
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")


class MultiLabel(LinearGrid):
    """Mean AUROC over labels of which an image may have several; unknown labels are left out."""

    config_class = MultiLabelConfig

    def figures(self) -> dict[str, Any]:
        """Return the mean AUROC and what goes with it."""
        config = self.config
        if config.probe == "knn":
            train, test, names = labelled_features(config, several=True, may_be_same=True)
            votes = knn_votes(
                train.vectors,
                train.labels,
                test.vectors,
                ks=(config.k,),
                temperature=config.temperature,
                leave_one_out=train is test,
                device=torch_device(config.device),
            )
            scores = next(iter(votes.values())).cpu()
            chosen: dict[str, Any] = {"k": next(iter(votes)), "temperature": config.temperature}
        else:
            train, test, names, logits, chosen = self.best_head(mean_auroc, several=True)
            scores = logits.sigmoid()
        return {**self._figures(scores, train, test, names), **chosen}

    def _figures(self, scores: Tensor, train: Features, test: Features, names: list[str]) -> dict[str, Any]:
        truth = (test.labels > 0.5).float().masked_fill(test.labels.isnan(), torch.nan).numpy()
        said = scores.double().numpy()
        groups = self.groups_of(test.keys)
        self.predictions = Predictions(
            test.keys, said, truth, "mean_auroc", list(names), about=self.about(), groups=groups
        )
        areas = per_label_auroc(said, truth)
        if all(area != area for area in areas):
            raise UsageError("no label both occurs and fails to occur among the images to measure on")
        drawn: dict[str, Any] = {"draws": self.config.draws, "seed": self.config.seed}
        mean = self.predictions.interval(**drawn)
        f1 = self.predictions.interval(label_macro_f1, **drawn)
        each: dict[str, dict[str, Any]] = {}
        for number, (name, area) in enumerate(zip(names, areas, strict=True)):
            column = truth[:, number]
            shown = {"positives": int((column == 1).sum()), "unknown": int((column != column).sum())}
            if area != area:
                each[name] = {"auroc": None, "interval": None, **shown}
                continue
            found: Interval = (
                delong_interval(said[:, number], column)
                if groups is None  # DeLong takes images to be independent
                else bootstrap_interval(mean_auroc, said[:, [number]], truth[:, [number]], groups=groups, **drawn)
            )
            each[name] = {"auroc": area, "interval": [found.low, found.high], **shown}
        figures = {
            "score": mean.value,
            "score_name": "mean_auroc",
            "interval": [mean.low, mean.high],
            "mean_auroc": mean.value,
            "label_macro_f1": f1.value,
            "intervals": {"mean_auroc": [mean.low, mean.high], "label_macro_f1": [f1.low, f1.high]},
            "per_label": each,
            **counts(train, test),
        }
        if left := [name for name, one in each.items() if one["auroc"] is None]:
            figures["notes"] = [f"always or never there in the test images, so without AUROC: {', '.join(left)}"]
        return figures
