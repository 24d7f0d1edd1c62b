"""Losses and metrics against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from patchloom.errors import UsageError
from patchloom.evaluate.slides.tasks import Task, c_index, cox_loss


def cox_by_hand(risks: list[float], times: list[float]) -> float:
    """Return the partial likelihood, subject by subject, where no two events share a time."""
    total = 0.0
    for risk, time in zip(risks, times, strict=True):
        if time > 0:
            at_risk = [r for r, t in zip(risks, times, strict=True) if abs(t) >= time]
            total -= risk - math.log(sum(math.exp(r) for r in at_risk))
    return total / len(risks)


def test_cox_loss_is_the_partial_likelihood_over_all_samples():
    generator = np.random.default_rng(0)
    times = generator.permutation(np.arange(1, 21)) * generator.choice([-1, 1], 20) / 3
    times[:3] = (2.0, -2.0, -2.0)  # censored at the time of an event: still at risk
    risks = generator.normal(size=20)
    found = cox_loss(torch.tensor(risks), torch.tensor(times))
    assert float(found) == pytest.approx(cox_by_hand(risks.tolist(), times.tolist()), abs=1e-5)
    huge = cox_loss(torch.tensor([1000.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert float(huge) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UsageError, match="survival time of 0"):
        cox_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_cox_loss_of_tied_events_counts_the_later_one_at_risk_of_the_earlier():
    risks, times = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([2.0, 2.0, -1.0])
    r = risks.double().tolist()
    expected = -(r[0] - math.log(math.exp(r[0]) + math.exp(r[1])) + (r[1] - r[1])) / 3
    assert float(cox_loss(risks, times)) == pytest.approx(expected, abs=1e-6)


def test_c_index_counts_pairs():
    times, risks = np.array([1.0, -2.0, 3.0, 3.0, -3.0]), np.array([0.9, 0.95, 0.5, 0.6, 0.5])
    lengths, events = np.abs(times), times > 0
    right = pairs = 0.0
    for i in range(5):
        for j in range(5):
            later = lengths[i] < lengths[j] or (lengths[i] == lengths[j] and events[i] and not events[j])
            if events[i] and later and i != j:
                pairs += 1
                right += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    assert c_index(times, risks) == pytest.approx(right / pairs)
    assert math.isnan(c_index(np.array([-1.0, -2.0]), np.array([0.0, 1.0])))


def test_scores_are_probabilities_row_by_row():
    logits = np.array([[2.0, -1.0, 800.0], [0.0, 0.0, 0.0]])
    scores = Task("multiclass", ("a", "b", "c")).scores(logits)
    np.testing.assert_allclose(scores, [[0, 0, 1], [1 / 3, 1 / 3, 1 / 3]], atol=1e-12)
    np.testing.assert_allclose(Task("binary", ("a", "b")).scores(np.array([[0.0], [2.0]])), [0.5, 1 / (1 + np.exp(-2))])


def test_metrics():
    generator = np.random.default_rng(0)
    targets, scores = generator.integers(0, 3, 60), generator.dirichlet(np.ones(3), 60)
    task = Task("multiclass", ("a", "b", "c"))
    expected = roc_auc_score(targets, scores, multi_class="ovr", average="macro")
    assert task.metric(targets, scores) == pytest.approx(expected)
    two = targets < 2
    assert 0 < task.metric(targets[two], scores[two]) < 1
    assert math.isnan(Task("binary", ("a", "b")).metric(np.ones(3, int), np.ones(3)))
    assert (task.out_features, Task("survival").out_features) == (3, 1)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "survival"])
def test_losses_fall_when_the_answer_is_right(kind):
    classes = {"binary": ("a", "b"), "multiclass": ("a", "b", "c"), "survival": ()}[kind]
    task = Task(kind, classes)
    targets = torch.tensor([1, 0, 1]) if kind != "survival" else torch.tensor([1.0, -2.0, 3.0])
    right = torch.tensor([[3.0], [-3.0], [3.0]])
    if kind == "multiclass":
        right = torch.nn.functional.one_hot(targets, 3) * 4.0
    if kind == "survival":
        right = torch.tensor([[3.0], [0.0], [-3.0]])
    assert task.loss(right, targets) < task.loss(-right, targets)
