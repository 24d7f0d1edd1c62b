"""k-NN classification: what features know without any training on top."""

from __future__ import annotations

from typing import Any

import torch

from patchloom.evaluate.knn_config import KNNConfig
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.subset import learning_features, shot_neighbours
from patchloom.features.class_scores import class_scores
from patchloom.features.extract import torch_device
from patchloom.features.knn import knn_votes


class KNN(Evaluation):
    """Vote of the nearest training images by cosine similarity; each image by all others where train is test."""

    config_class = KNNConfig

    def figures(self) -> dict[str, Any]:
        """Return accuracy (a fraction) and what goes with it."""
        config = self.config
        train, test, class_names = learning_features(config, may_be_same=True)
        leave_one_out = train is test
        votes = knn_votes(
            train.vectors,
            train.labels,
            test.vectors,
            ks=shot_neighbours([config.k, *(config.ks or [])], config.shots, config.shots_by),
            temperature=config.temperature,
            num_classes=len(class_names),
            leave_one_out=leave_one_out,
            device=torch_device(config.device),
        )
        k = min(config.k, max(votes))
        predictions = {number: scores.cpu() for number, scores in votes.items()}
        figures = self.classified(predictions[k], train, test, class_names)
        used: dict[str, Any] = {"k": k, "temperature": config.temperature, "leave_one_out": leave_one_out}
        used |= config.drawn()
        if config.ks:
            shares = {
                str(number): class_scores(scores.argmax(1), test.labels) for number, scores in predictions.items()
            }
            used["accuracy_by_k"] = {number: one.accuracy for number, one in shares.items()}
            used["balanced_accuracy_by_k"] = {number: one.balanced_accuracy for number, one in shares.items()}
        if leave_one_out and (alone := _alone(train.labels, class_names)):
            used["notes"] = [f"one image only, which nothing can tell: {', '.join(alone)}"]
        return {**figures, **used}


def _alone(labels: torch.Tensor, class_names: list[str]) -> list[str]:
    """Return the classes of a single image."""
    return [class_names[number] for number in (labels.bincount() == 1).nonzero().flatten().tolist()]
