"""Retrieval: are an image's nearest neighbours of its own class?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.retrieval_config import RetrievalConfig
from patchloom.evaluate.statistics.figures import counts
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.target import labelled_features
from patchloom.features.extract import torch_device

MOST_SIMILARITIES = 2**25


class Retrieval(Evaluation):
    """Mean average precision and recall of looking for images of the same class; train is the collection."""

    config_class = RetrievalConfig

    def figures(self) -> dict[str, Any]:
        """Return the mean average precision, recall@k, and what goes with them."""
        config = self.config
        train, test, _ = labelled_features(config, may_be_same=True)
        precision, first = ranks(
            train.vectors,
            train.labels,
            test.vectors,
            test.labels,
            leave_one_out=train is test,
            device=torch_device(config.device),
        )
        asked = ~torch.isnan(precision)
        if not bool(asked.any()):
            raise UsageError(f"no image of {config.test} has another of its class in {config.train}")
        truth = test.labels[asked].numpy()
        values = {"map": precision[asked].double().numpy()}
        for k in config.ks:
            values[f"recall@{k}"] = (first[asked] < k).double().numpy()
        keys = [key for key, used in zip(test.keys, asked.tolist(), strict=True) if used]
        groups = self.groups_of(keys)
        self.predictions = Predictions(keys, values["map"], truth, "mean_value", about=self.about(), groups=groups)
        found = {
            name: replace(self.predictions, predicted=one).interval(**self.drawing()) for name, one in values.items()
        }
        figures = {
            "score": found["map"].value,
            "score_name": "map",
            "interval": found["map"].ends,
            **{name: interval.value for name, interval in found.items()},
            "intervals": {name: interval.ends for name, interval in found.items()},
            "leave_one_out": train is test,
            **counts(train, test),
            "n": int(asked.sum()),
        }
        if (left := int((~asked).sum())) > 0:
            figures["notes"] = [f"{left} images have no other of their class to find, and are left out"]
        return figures


@torch.no_grad()
def ranks(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return the average precision of each query, and the place of the first image of its class.

    Args:
        train: (n, D) features of the collection.
        train_labels: (n,) classes.
        test: (m, D) features of the queries.
        test_labels: (m,) classes.
        leave_one_out: The queries are the collection: none finds itself.
        device: Where to compute.

    Returns:
        Average precision (m,), NaN where the collection has no image of the class; and the place (m,), from 0.
    """
    collection = F.normalize(train.to(device).float(), dim=1)
    labels = train_labels.to(device)
    rows = max(1, MOST_SIMILARITIES // len(train))
    precisions, firsts = [], []
    places = torch.arange(1, len(train) + 1 - leave_one_out, device=device)
    for start in range(0, len(test), rows):
        asked = F.normalize(test[start : start + rows].to(device).float(), dim=1)
        similar = asked @ collection.T
        if leave_one_out:
            columns = torch.arange(len(asked), device=device)
            similar[columns, columns + start] = -torch.inf
        order = similar.argsort(dim=1, descending=True, stable=True)[:, : len(places)]
        right = labels[order] == test_labels[start : start + rows].to(device)[:, None]
        total = right.sum(1)
        precision = ((right.cumsum(1) / places) * right).sum(1) / total  # 0 / 0 where there is none
        precisions.append(precision.cpu())
        firsts.append(torch.where(total > 0, right.to(torch.int8).argmax(1), len(train)).cpu())
    return torch.cat(precisions), torch.cat(firsts)
