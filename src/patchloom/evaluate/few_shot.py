"""Few-shot episodes: how well classes are told from a handful of images each."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.evaluate.few_shot_config import FewShotConfig
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.statistics.figures import counts
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.target import labelled_features
from patchloom.statistics.intervals import mean_interval


class Episode(NamedTuple):
    """One draw."""

    classes: np.ndarray
    """(ways,) class numbers."""
    support: np.ndarray
    """(ways, shots) indices of training features."""
    query: np.ndarray
    """(ways, queries) indices of test features."""


class FewShot(Evaluation):
    """Episodes of a few classes with a few images each; nearest class mean and logistic regression."""

    config_class = FewShotConfig

    def figures(self) -> dict[str, Any]:
        """Return the mean accuracy (a fraction) over episodes, with its interval, for both classifiers."""
        config = self.config
        train, test, _ = labelled_features(config, may_be_same=True)
        same = train is test
        learnt, asked = (F.normalize(one.vectors.float(), dim=1) for one in (train, test))
        shares: dict[str, list[float]] = {"nearest": [], "logistic": []}
        drawn = draw_episodes(
            train.labels.numpy(),
            None if same else test.labels.numpy(),
            ways=config.ways,
            shots=config.shots,
            queries=config.queries,
            episodes=config.episodes,
            seed=config.seed,
        )
        truth = torch.arange(config.ways).repeat_interleave(config.queries)
        for episode in drawn:
            support = learnt[torch.from_numpy(episode.support)]
            query = asked[torch.from_numpy(episode.query.reshape(-1))]
            for name, predicted in (("nearest", nearest_mean(support, query)), ("logistic", logistic(support, query))):
                shares[name].append(float((predicted == truth).double().mean()))
        intervals = {name: mean_interval(values) for name, values in shares.items()}
        chosen = intervals[config.classifier]
        self.predictions = Predictions(
            [f"episode {number}" for number in range(config.episodes)],
            np.array(shares[config.classifier]),
            np.zeros(config.episodes),
            "mean_value",
            about=self.about(),
        )
        return {
            "score": chosen.value,
            "score_name": "accuracy",
            "accuracy": chosen.value,
            "interval": chosen.ends,
            **{name: interval.value for name, interval in intervals.items()},
            "intervals": {name: interval.ends for name, interval in intervals.items()},
            "ways": config.ways,
            "shots": config.shots,
            "queries": config.queries,
            "episodes": config.episodes,
            **counts(train, test),
        }


def draw_episodes(
    train_labels: np.ndarray,
    test_labels: np.ndarray | None,
    *,
    ways: int,
    shots: int,
    queries: int,
    episodes: int,
    seed: int,
) -> list[Episode]:
    """Return episodes; the same seed gives the same ones, whatever the encoder.

    Args:
        train_labels: (n,) classes of the images to learn from.
        test_labels: (m,) classes of the images to measure on; None: the same images, each at most once an episode.
        ways: Classes per episode.
        shots: Images per class to learn from.
        queries: Images per class to measure on.
        episodes: How many.
        seed: Seed of the draws.

    Raises:
        UsageError: Fewer classes than `ways` have images enough.
    """
    learnt = _members(train_labels)
    asked = learnt if test_labels is None else _members(test_labels)
    enough = [
        label
        for label in sorted(learnt.keys() & asked.keys())
        if (len(learnt[label]) >= shots + queries)
        or (test_labels is not None and len(learnt[label]) >= shots and len(asked[label]) >= queries)
    ]
    if len(enough) < ways:
        raise UsageError(
            f"{len(enough)} classes have {shots} images to learn from and {queries} to measure on; an episode needs "
            f"{ways}: lower ways, shots or queries"
        )
    drawn = []
    for number in range(episodes):
        rng = np.random.default_rng([seed, number])
        classes = rng.choice(enough, ways, replace=False)
        support, query = [], []
        for label in classes:
            mixed = rng.permutation(learnt[label])
            support.append(mixed[:shots])
            query.append(
                mixed[shots : shots + queries] if test_labels is None else rng.permutation(asked[label])[:queries]
            )
        drawn.append(Episode(classes, np.stack(support), np.stack(query)))
    return drawn


def nearest_mean(support: Tensor, query: Tensor) -> Tensor:
    """Return the class (q,) of each query by the cosine similarity to the mean of each class.

    Args:
        support: (ways, shots, D) of unit length.
        query: (q, D) of unit length.
    """
    return (query @ F.normalize(support.mean(1), dim=1).T).argmax(1)


def logistic(support: Tensor, query: Tensor) -> Tensor:
    """Return the class (q,) of each query by scikit-learn's logistic regression with C = 1; arguments as there."""
    ways, shots, _ = support.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=1.0, max_iter=200)
        model.fit(support.flatten(0, 1).numpy(), np.repeat(np.arange(ways), shots))
    return torch.from_numpy(model.predict(query.numpy()))


def _members(labels: np.ndarray) -> dict[int, np.ndarray]:
    return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
