"""ML-kNN against its counts written out one by one in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patchloom.errors import UsageError
from patchloom.features.mlknn import mlknn_predict


def data(n: int = 40, m: int = 9, labels: int = 3, gaps: float = 0.0, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, 6, generator=draw), torch.randn(m, 6, generator=draw)
    hot = (train[:, :labels] + 0.7 * torch.randn(n, labels, generator=draw) > 0.3).float()
    hot[torch.rand(n, labels, generator=draw) < gaps] = torch.nan
    return train, hot, test


def nearest(feature, others, k, without=None):
    def similarity(i):
        other = others[i].double()
        return float(feature.double() @ other / (feature.double().norm() * other.norm()))

    return sorted((i for i in range(len(others)) if i != without), key=lambda i: -similarity(i))[:k]


def by_hand(train, labels, test, k, s=1.0, exclude_self=False):
    """The published rule, a label and an image at a time."""
    n, label_count = labels.shape
    around = [nearest(train[i], train, k, without=i if exclude_self else None) for i in range(n)]
    found = torch.zeros(len(test), label_count, dtype=torch.float64)
    for label in range(label_count):
        truth = [float(value) for value in labels[:, label]]
        known = [i for i in range(n) if not math.isnan(truth[i])]
        with_label = [i for i in known if truth[i] == 1]
        prior = (s + len(with_label)) / (2 * s + len(known))
        counts = {True: [0] * (k + 1), False: [0] * (k + 1)}
        for i in known:
            counts[truth[i] == 1][sum(truth[j] == 1 for j in around[i])] += 1
        for row in range(len(test)):
            seen = sum(truth[j] == 1 for j in nearest(test[row], train, k))
            p, q = ((s + counts[way][seen]) / (s * (k + 1) + sum(counts[way])) for way in (True, False))
            found[row, label] = prior * p / (prior * p + (1 - prior) * q)
    return found


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("gaps", "smoothing"), [(0.0, 1.0), (0.3, 0.4)])
def test_probabilities_are_those_of_the_counts(exclude_self, gaps, smoothing):
    train, labels, test = data(gaps=gaps)
    options = {"smoothing": smoothing, "exclude_self": exclude_self}
    found = mlknn_predict(train, labels, test, ks=(7, 3, 12), **options, block=5, train_block=11)
    assert list(found) == [3, 7, 12]
    for k, said in found.items():
        assert said.dtype == torch.float64
        torch.testing.assert_close(said, by_hand(train, labels, test, k, smoothing, exclude_self))


def test_left_out_images_are_told_by_the_others():
    train, labels, _ = data(n=24)
    k, s = 4, 1.0
    found = mlknn_predict(train, labels, train, ks=(k,), leave_one_out=True)[k]
    around = [nearest(train[i], train, k, without=i) for i in range(24)]
    for label in range(3):
        seen = [sum(int(labels[j, label]) for j in around[i]) for i in range(24)]
        for row in range(24):
            others = [i for i in range(24) if i != row]
            has = {way: [i for i in others if bool(labels[i, label]) == way] for way in (True, False)}
            prior = (s + len(has[True])) / (2 * s + 23)
            p, q = (
                (s + sum(seen[i] == seen[row] for i in has[way])) / (s * (k + 1) + len(has[way]))
                for way in (True, False)
            )
            expected = prior * p / (prior * p + (1 - prior) * q)
            assert float(found[row, label]) == pytest.approx(expected, rel=1e-12)


def test_an_image_that_counts_itself_makes_its_label_look_surer():
    torch.manual_seed(0)
    train, labels = torch.randn(400, 8), (torch.rand(400, 1) < 0.3).float()  # labels that features say nothing of
    test = torch.randn(200, 8)
    spread = {
        without: float(mlknn_predict(train, labels, test, ks=(5,), exclude_self=without)[5].std())
        for without in (False, True)
    }
    assert spread[False] > 2 * spread[True]


def test_more_neighbours_than_images_are_all_there_are():
    train, labels, test = data(n=6)
    assert list(mlknn_predict(train, labels, test)) == [5, 6]
    assert list(mlknn_predict(train, labels, test, exclude_self=True)) == [5]
    assert list(mlknn_predict(train, labels, train, leave_one_out=True)) == [5]


def test_length_of_a_feature_does_not_matter():
    train, labels, test = data()
    found = mlknn_predict(train, labels, test, ks=(5,))[5]
    scaled = mlknn_predict(train * torch.rand(40, 1).add(0.1), labels, 37 * test, ks=(5,))[5]
    np.testing.assert_allclose(scaled, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": ()}, "ks is empty"),
        ({"ks": (0,)}, "k is 0"),
        ({"smoothing": 0.0}, "smoothing is 0.0"),
        ({"train_labels": torch.zeros(40, dtype=torch.int64)}, "several labels each"),
        ({"train_labels": torch.zeros(39, 3)}, "39 labels do not belong to 40"),
        ({"leave_one_out": True}, "leave_one_out compares"),
        ({"train": torch.zeros(1, 6), "train_labels": torch.zeros(1, 3), "exclude_self": True}, "but itself"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    train, labels, test = data()
    with pytest.raises(UsageError, match=message):
        mlknn_predict(**{"train": train, "train_labels": labels, "test": test, **change})


def test_probabilities_have_the_digits_of_float64():
    # No neighbour has the label: P = prior (1 / 5) / (prior (1 / 5) + (1 - prior) (4 / 5)) with a prior of 1 / 5.
    train, labels = torch.eye(3), torch.zeros(3, 1)
    found = mlknn_predict(train, labels, train[:1], ks=(1,))[1]
    prior, there, absent = 1 / 5, 1 / 2, 4 / 5
    assert found.item() == pytest.approx(prior * there / (prior * there + (1 - prior) * absent), rel=1e-14)
