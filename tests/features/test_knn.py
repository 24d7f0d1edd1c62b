"""The k-NN vote, against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from patchloom.errors import UsageError
from patchloom.features import knn as module
from patchloom.features.knn import knn_accuracy, knn_predict


def clouds(n: int, dim: int = 6, classes: int = 3, spread: float = 0.8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + spread * torch.randn(n, dim, generator=generator), labels


def by_hand(train, labels, test, k, temperature, classes):
    said = []
    for feature in test.double():
        similarity = [float(feature @ t / (feature.norm() * t.norm())) for t in train.double()]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(labels[i])] += math.exp(similarity[i] / temperature)
        said.append(votes.index(max(votes)))
    return torch.tensor(said)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (1000, 0.07)])
def test_it_is_the_weighted_vote(k, temperature):
    train, labels = clouds(60)
    test, _ = clouds(25, seed=1)
    said = knn_predict(train, labels, test, k=k, temperature=temperature, num_classes=3, block=7)
    assert torch.equal(said, by_hand(train, labels, test, k, temperature, 3))


def test_it_agrees_with_scikit_learn_where_all_votes_weigh_the_same():
    train, labels = clouds(80)
    test, _ = clouds(40, seed=1)
    reference = KNeighborsClassifier(7, metric="cosine").fit(train.numpy(), labels.numpy()).predict(test.numpy())
    # A huge temperature makes every weight one, up to what decides ties: keep the votes that are not tied.
    said = knn_predict(train, labels, test, k=7, temperature=1e9, num_classes=3)
    assert (said.numpy() == reference).mean() >= 0.9


def test_length_of_a_feature_does_not_matter():
    train, labels = clouds(60)
    test, _ = clouds(25, seed=1)
    said = knn_predict(train, labels, test, num_classes=3)
    scaled = knn_predict(train * torch.rand(60, 1).add(0.1), labels, 37 * test, num_classes=3)
    assert torch.equal(said, scaled)


def test_a_near_neighbour_outvotes_many_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8]])
    labels = torch.tensor([1, 0, 0, 0])
    test = torch.tensor([[1.0, 0.0]])
    assert int(knn_predict(train, labels, test, k=4, temperature=0.07, num_classes=2)) == 1
    assert int(knn_predict(train, labels, test, k=4, temperature=10, num_classes=2)) == 0


def test_a_cold_vote_stays_finite():
    train, labels = clouds(30)
    assert knn_accuracy(train, labels, train, labels, k=5, temperature=1e-4) == 1.0


def test_a_large_reference_is_compared_in_smaller_blocks(monkeypatch):
    train, labels = clouds(60)
    test, _ = clouds(25, seed=1)
    whole = knn_predict(train, labels, test, num_classes=3)
    monkeypatch.setattr(module, "MOST_SIMILARITIES", 130)
    assert torch.equal(knn_predict(train, labels, test, num_classes=3), whole)


def test_accuracy_is_the_share_that_is_right():
    train, labels = clouds(60)
    test, truth = clouds(25, seed=1)
    said = knn_predict(train, labels, test, k=3, num_classes=3)
    assert knn_accuracy(train, labels, test, truth, k=3) == pytest.approx(float((said == truth).double().mean()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"num_classes": 2}, "training labels go from 0 to 2; with 2 classes"),
        (
            {"train": torch.empty(0, 6), "train_labels": torch.empty(0, dtype=torch.int64)},
            "at least one training image",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    train, labels = clouds(12)
    arguments = {"train": train, "train_labels": labels, "test": train, "num_classes": 3} | change
    with pytest.raises(UsageError, match=message):
        knn_predict(**arguments)
