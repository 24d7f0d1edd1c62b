"""The k-NN vote, against the formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from patchloom.errors import UsageError
from patchloom.features import knn as module
from patchloom.features.knn import knn_predict, knn_scores, knn_votes, nearest_neighbours


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
    assert knn_scores(train, labels, train, labels, k=5, temperature=1e-4).accuracy == 1.0


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
    assert knn_scores(train, labels, test, truth, k=3).accuracy == pytest.approx(float((said == truth).double().mean()))


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


@pytest.mark.parametrize(("train_block", "block"), [(None, 1024), (37, 8), (200, 1)])
def test_votes_are_scikit_learns_with_the_same_kernel(train_block, block):
    train, labels = clouds(300, dim=10)
    test, _ = clouds(50, dim=10, seed=1)
    votes = knn_votes(train, labels, test, ks=(5, 30, 200), block=block, train_block=train_block)
    for k, found in votes.items():
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda apart: np.exp((1 - apart) / 0.07)
        ).fit(train.double().numpy(), labels.numpy())
        expected = reference.predict_proba(test.double().numpy())
        np.testing.assert_allclose((found / found.sum(1, keepdim=True)).numpy(), expected, rtol=1e-4, atol=1e-6)
        assert (found.argmax(1).numpy() == reference.predict(test.double().numpy())).all()


def test_all_k_share_the_softmax_of_the_largest():
    train, labels = clouds(40)
    test, _ = clouds(9, seed=1)
    votes = knn_votes(train, labels, test, ks=(10, 3, 10, 99))
    assert list(votes) == [3, 10, 40]
    similarity, nearest = nearest_neighbours(train, test, 40)
    weights = (similarity.double() / 0.07).softmax(1)
    for k, found in votes.items():
        expected = torch.zeros(9, 3, dtype=torch.float64)
        for row in range(9):
            for place in range(k):
                expected[row, labels[nearest[row, place]]] += weights[row, place]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(votes[40].sum(1), torch.ones(9))


def test_neighbours_are_those_of_all_pairs_in_float64(monkeypatch):
    train, _ = clouds(900, dim=12)
    test, _ = clouds(20, dim=12, seed=1)
    every = torch.nn.functional.normalize(test.double()) @ torch.nn.functional.normalize(train.double()).T
    expected = every.topk(20, dim=1)
    for train_block in (None, 64, 500):  # in groups, in small blocks, in blocks that do not divide
        similarity, nearest = nearest_neighbours(train, test, 20, train_block=train_block)
        torch.testing.assert_close(similarity.double(), expected.values, rtol=1e-5, atol=1e-6)
        assert torch.equal(nearest.sort(1).values, expected.indices.sort(1).values)


@pytest.mark.parametrize("train_block", [None, 7])
def test_leaving_one_out_is_asking_the_others(train_block):
    train, labels = clouds(30)
    train[5] = train[11]  # the same image twice: the other one counts
    votes = knn_votes(train, labels, train, ks=(3, 5, 99), leave_one_out=True, block=4, train_block=train_block)
    assert list(votes) == [3, 5, 29]
    for number in range(30):
        others = torch.arange(30) != number
        expected = knn_votes(train[others], labels[others], train[number : number + 1], ks=(3, 5, 99), num_classes=3)
        for k in (3, 5, 29):
            torch.testing.assert_close(votes[k][number], expected[k][0], rtol=1e-5, atol=1e-7)


def test_several_labels_each_are_weighted_means_over_what_is_known():
    train, _ = clouds(25)
    test, _ = clouds(6, seed=1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (25, 4), generator=generator).float()
    labels[torch.rand(25, 4, generator=generator) < 0.3] = torch.nan
    votes = knn_votes(train, labels, test, ks=(7,))[7]
    similarity, nearest = nearest_neighbours(train, test, 7)
    weights = (similarity / 0.07).softmax(1)
    for row in range(6):
        for label in range(4):
            known = [(w, labels[i, label]) for w, i in zip(weights[row], nearest[row], strict=True)]
            known = [(float(w), float(value)) for w, value in known if not value.isnan()]
            total = sum(w for w, _ in known)
            expected = sum(w * value for w, value in known) / total if total else 0.0
            assert float(votes[row, label]) == pytest.approx(expected, rel=1e-4)


def test_memory_is_bounded_by_the_blocks():
    train, labels = torch.randn(4000, 4), torch.arange(4000) % 2
    held = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                held.append(out.numel())
            return out

    with Watched():
        knn_votes(train, labels, torch.randn(50, 4), ks=(5,), block=10, train_block=100)
    assert max(held) <= 4000  # the labels; no product of all pairs, which has 200,000


def test_what_does_not_belong_together_is_refused():
    train, labels = clouds(12)
    with pytest.raises(UsageError, match="11 labels do not belong to 12"):
        knn_votes(train, labels[:11], train)
    with pytest.raises(UsageError, match="ks is empty"):
        knn_votes(train, labels, train, ks=())
    with pytest.raises(UsageError, match="leave_one_out compares"):
        knn_votes(train, labels, train[:3], leave_one_out=True)
    with pytest.raises(UsageError, match="besides the one asked about"):
        knn_votes(train[:1], labels[:1], train[:1], leave_one_out=True)
