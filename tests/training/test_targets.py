"""Losses against their formulas, metrics against scikit-learn and torchmetrics, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, cohen_kappa_score, f1_score, roc_auc_score
from torchmetrics.functional.classification import multiclass_cohen_kappa

from patchloom.errors import UsageError
from patchloom.training.targets import Targets, class_weights, masked_bce, quadratic_weighted_kappa, squared_emd

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(40, 4, generator=GENERATOR)
LABELS = torch.randint(0, 4, (40,), generator=GENERATOR)
NAMES = ["a", "b", "c", "d"]
COUNTS = torch.tensor([200, 50, 30, 5])


def test_weighted_adjusted_cross_entropy_is_its_formula():
    targets = Targets(NAMES, counts=COUNTS, weighting="balanced", logit_adjustment=1.5)
    weights = [1 / 200, 1 / 50, 1 / 30, 1 / 5]
    weights = [weight * 4 / sum(weights) for weight in weights]
    total = scale = 0.0
    for row, label in zip(LOGITS.double().tolist(), LABELS.tolist(), strict=True):
        shifted = [value + 1.5 * math.log(count / 285) for value, count in zip(row, COUNTS.tolist(), strict=True)]
        nll = math.log(sum(math.exp(value) for value in shifted)) - shifted[label]
        total, scale = total + weights[label] * nll, scale + weights[label]
    assert float(targets.loss(LOGITS, LABELS)) == pytest.approx(total / scale, rel=1e-5)


def test_shares_from_mixup_and_class_numbers_agree():
    targets = Targets(NAMES)
    shares = torch.nn.functional.one_hot(LABELS, 4).float()
    torch.testing.assert_close(targets.loss(LOGITS, shares), targets.loss(LOGITS, LABELS))


def test_unknown_classes_count_neither_in_loss_nor_in_figures():
    targets = Targets(NAMES)
    labels = LABELS.clone()
    labels[10:] = -1
    torch.testing.assert_close(targets.loss(LOGITS, labels), targets.loss(LOGITS[:10], LABELS[:10]))
    assert targets.measure(LOGITS, labels) == targets.measure(LOGITS[:10], LABELS[:10])
    with pytest.raises(UsageError, match="known class"):
        targets.measure(LOGITS, torch.full((40,), -1))


def test_weights_have_mean_one_and_follow_their_rules():
    for rule, expected in {
        "balanced": [1 / 200, 1 / 50, 1 / 30, 1 / 5],
        "sqrt": [n**-0.5 for n in (200, 50, 30, 5)],
        "effective": [1e-4 / (1 - 0.9999**n) for n in (200, 50, 30, 5)],
    }.items():
        wanted = np.array(expected) / np.mean(expected)
        np.testing.assert_allclose(class_weights(COUNTS, rule).numpy(), wanted, rtol=1e-5)
    assert class_weights(COUNTS, "none") is None


def test_the_multilabel_loss_ignores_what_is_unknown():
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(6, 3, generator=generator).double()
    logits, weights = torch.randn(6, 3, generator=generator).double(), torch.tensor([1.0, 2.0, 0.5])
    labels[0, 1] = labels[4, 2] = math.nan
    total = scale = 0.0
    for i in range(6):
        for j in range(3):
            if not math.isnan(y := float(labels[i, j])):
                p = 1 / (1 + math.exp(-float(logits[i, j])))
                total -= float(weights[j]) * (y * math.log(p) + (1 - y) * math.log(1 - p))
                scale += float(weights[j])
    assert float(masked_bce(logits, labels, weights)) == pytest.approx(total / scale)
    assert float(masked_bce(logits, torch.full_like(labels, math.nan))) == 0
    moved = logits.clone()
    moved[0, 1] = 100.0
    assert torch.equal(masked_bce(moved, labels, weights), masked_bce(logits, labels, weights))


def test_the_distance_between_grades_is_that_of_cumulative_shares():
    total = 0.0
    for row, label in zip(LOGITS.double().softmax(-1).tolist(), LABELS.tolist(), strict=True):
        total += sum((sum(row[: k + 1]) - (1.0 if k >= label else 0.0)) ** 2 for k in range(4))
    assert float(squared_emd(LOGITS.double(), LABELS)) == pytest.approx(total / 40)
    far, near = torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[0, 0, 9.0, 0]])
    grade = torch.tensor([3])
    assert squared_emd(far, grade) > squared_emd(near, grade)
    ordinal = Targets(NAMES, kind="ordinal", distance=2.0)
    plain = Targets(NAMES, kind="ordinal")
    expected = plain.loss(LOGITS, LABELS) + 2 * squared_emd(LOGITS, LABELS)
    torch.testing.assert_close(ordinal.loss(LOGITS, LABELS), expected)


def test_figures_equal_scikit_learn():
    figures = Targets(NAMES, kind="ordinal", counts=COUNTS).measure(LOGITS, LABELS)
    said, truth = LOGITS.argmax(1).numpy(), LABELS.numpy()
    assert figures["accuracy"] == pytest.approx((said == truth).mean())
    assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert figures["majority_share"] == pytest.approx(np.bincount(truth).max() / len(truth))
    assert figures["kappa"] == pytest.approx(cohen_kappa_score(truth, said, weights="quadratic"))
    assert figures["mean_grade_error"] == pytest.approx(np.abs(said - truth).mean())
    shares = list(figures["per_class_accuracy"].values())
    assert figures["accuracy_many"] == pytest.approx(shares[0])
    assert figures["accuracy_medium"] == pytest.approx((shares[1] + shares[2]) / 2)
    assert figures["accuracy_few"] == pytest.approx(shares[3])


def test_kappa_equals_torchmetrics_and_is_nan_for_a_single_grade():
    said = LOGITS.argmax(1)
    confusion = torch.zeros(4, 4)
    for truth, guess in zip(LABELS.tolist(), said.tolist(), strict=True):
        confusion[truth, guess] += 1
    expected = float(multiclass_cohen_kappa(said, LABELS, num_classes=4, weights="quadratic"))
    assert quadratic_weighted_kappa(confusion) == pytest.approx(expected, abs=1e-6)
    single = torch.zeros(4, 4)
    single[2, 2] = 9
    with pytest.warns(UserWarning, match="only one grade"):
        assert math.isnan(quadratic_weighted_kappa(single))


def test_multilabel_figures_equal_scikit_learn_and_leave_out_what_cannot_be_ranked():
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (50, 4), generator=generator).float()
    logits = torch.randn(50, 4, generator=generator) + labels
    labels[:7, 0] = math.nan
    labels[:, 3] = 1.0
    figures = Targets(NAMES, kind="multi").measure(logits, labels)
    areas, precisions, f1s = [], [], []
    for j in range(3):
        rows = slice(7, None) if j == 0 else slice(None)
        truth, score = labels[rows, j].numpy(), logits[rows, j].numpy()
        areas.append(roc_auc_score(truth, score))
        precisions.append(average_precision_score(truth, score))
        f1s.append(f1_score(truth, score > 0))
    assert list(figures["per_label_auroc"]) == NAMES[:3]
    assert figures["auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert figures["average_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert figures["f1"] == pytest.approx(np.mean(f1s), abs=1e-6)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(UsageError, match="one class per image"):
        Targets(NAMES, kind="multi", label_smoothing=0.1)
    with pytest.raises(UsageError, match="ordinal targets"):
        Targets(NAMES, distance=1.0)
    with pytest.raises(UsageError, match="number of training images"):
        Targets(NAMES, weighting="sqrt")
    with pytest.raises(UsageError, match="unknown class_weights 'balance'; did you mean balanced"):
        class_weights(COUNTS, "balance")
    with pytest.raises(UsageError, match="unknown task"):
        Targets(NAMES, kind="rank")


def test_weights_may_wait_and_groups_are_reported_by_name():
    targets = Targets(NAMES, counts=COUNTS, weighting="effective", groups={"head": [0, 1], "mid": [2], "tail": [3]})
    weighted = float(targets.loss(LOGITS, LABELS))
    targets.weighing = False
    plain = Targets(NAMES)
    assert float(targets.loss(LOGITS, LABELS)) == pytest.approx(float(plain.loss(LOGITS, LABELS)))
    assert weighted != pytest.approx(float(plain.loss(LOGITS, LABELS)), abs=1e-3)
    figures = targets.measure(LOGITS, LABELS)
    shares = [float((LOGITS[c == LABELS].argmax(1) == c).float().mean()) for c in range(4)]
    assert figures["accuracy_head"] == pytest.approx((shares[0] + shares[1]) / 2)
    assert figures["accuracy_tail"] == pytest.approx(shares[3])
    assert "accuracy_many" not in figures
    there = LABELS != 3
    assert "accuracy_tail" not in targets.measure(LOGITS[there], LABELS[there])
