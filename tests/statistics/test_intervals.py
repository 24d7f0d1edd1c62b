"""Intervals and tests of scores, against scipy and against their formulas written out."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from patchloom.errors import UsageError
from patchloom.statistics.delong import delong, delong_interval, newcombe
from patchloom.statistics.intervals import (
    Difference,
    Sample,
    bootstrap_interval,
    holm,
    mean_interval,
    paired_bootstrap,
)
from patchloom.statistics.metrics import (
    accuracy,
    auroc,
    balanced_accuracy,
    kappa,
    label_macro_f1,
    macro_f1,
    mean_auroc,
    mean_grade_error,
    mean_value,
)


def plain_accuracy(predictions, targets) -> float:
    return float((predictions == targets).mean())


def classes(n: int = 200, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    return truth, np.where(rng.random(n) < 0.7, truth, rng.integers(0, 3, n))


def finding(n: int = 120, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.3).astype(int)
    first = truth + rng.normal(size=n)
    return truth, first, first + 0.8 * truth + rng.normal(size=n)


def test_any_function_gets_the_interval_of_one_that_takes_all_draws_at_once():
    truth, said = classes()
    kinds = {"draws": 200, "kind": "percentile"}
    fast, plain = (bootstrap_interval(score, said, truth, **kinds) for score in (accuracy, plain_accuracy))
    assert fast == pytest.approx(plain)
    assert fast.low < fast.value < fast.high


def test_the_plain_bootstrap_is_scipys():
    truth, said = classes()
    ours = bootstrap_interval(plain_accuracy, said, truth, draws=4000, kind="percentile")
    right = (said == truth).astype(float)
    theirs = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert ours[1:3] == pytest.approx([theirs.low, theirs.high], abs=0.006)
    basic = bootstrap_interval(plain_accuracy, said, truth, draws=4000, kind="basic")
    assert basic.low == pytest.approx(2 * ours.value - ours.high)
    assert basic.high == pytest.approx(2 * ours.value - ours.low)


def weights_of(n: int, draws: int, strata: np.ndarray | None = None, members: np.ndarray | None = None) -> np.ndarray:
    units = n if members is None else int(members.max()) + 1
    numbers = np.zeros(units) if strata is None else strata
    layers = [np.flatnonzero(numbers == one) for one in np.unique(numbers)]
    return Sample([], np.zeros(n), np.zeros(0), members, layers, units).weights(draws, np.random.default_rng(0))


def test_strata_keep_the_number_of_images_of_each_class():
    truth, said = classes(50)
    weights = weights_of(50, 30, strata=truth)
    for number in range(3):
        assert (weights[:, truth == number].sum(1) == (truth == number).sum()).all()
    assert (weights.max(1) > 1).all()
    free = weights_of(50, 30)
    assert (free.sum(1) == 50).all()
    assert len(np.unique(free[:, truth == 0].sum(1))) > 1
    # Drawn alike, an accuracy varies with the shares of unequally hard classes too.
    easy = np.where(truth == 0, truth, said)
    alike, within = (bootstrap_interval(macro_f1, easy, truth, strata=strata) for strata in (None, truth))
    assert within.high - within.low < alike.high - alike.low


def test_every_image_is_drawn_equally_often():
    weights = weights_of(8, 20_000, strata=np.array([3, 1, 1, 3, 3, 1, 1, 1]))
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.03)


def test_images_that_were_not_seen_are_drawn_as_often_as_they_may_have_been():
    sample = Sample([], np.zeros(12), np.array([0.5, 1.5]), None, [np.arange(12)], 10)
    weights = sample.weights(20_000, np.random.default_rng(0))
    assert (weights.sum(1) == 10).all()
    np.testing.assert_allclose(weights.mean(0), 10 / 12 * np.array([1] * 10 + [0.5, 1.5]), atol=0.03)


def test_groups_are_drawn_whole():
    groups = np.array(["a", "b", "a", "c", "c", "c"])
    weights = weights_of(6, 40, members=np.unique(groups, return_inverse=True)[1])
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    # Ten patients with ten equal images each are worth ten images, not a hundred.
    truth, said = classes(10)
    drawn = {"seed": 3, "kind": "percentile"}
    groups = np.repeat(np.arange(10), 10)
    many = bootstrap_interval(accuracy, np.repeat(said, 10), np.repeat(truth, 10), groups=groups, **drawn)
    assert many == pytest.approx(bootstrap_interval(accuracy, said, truth, **drawn))
    wide = bootstrap_interval(accuracy, np.repeat(truth, 10), np.repeat(truth, 10), groups=groups)
    sure = bootstrap_interval(accuracy, np.repeat(truth, 10), np.repeat(truth, 10))
    assert wide.low < 0.85 < sure.low


def test_no_interval_is_without_width():
    truth = np.array([0] * 28 + [1] * 12)
    larger = np.zeros(40, dtype=int)
    groups = np.arange(40) // 4
    for drawn in ({}, {"strata": truth}, {"groups": groups}):
        for score in (accuracy, balanced_accuracy, macro_f1, kappa, mean_grade_error):
            for said in (larger, truth, 1 - truth):
                found = bootstrap_interval(score, said, truth, draws=200, **drawn)
                assert found.low <= found.value <= found.high
                assert found.high - found.low > 0.03, (score.name, drawn)
        assert bootstrap_interval(mean_value, np.ones(40), truth, draws=200, **drawn).low < 0.97
        assert bootstrap_interval(auroc, truth * 1.0, truth, draws=200, **drawn).low < 0.97
        several = np.stack([truth, 1 - truth, truth], 1) * 1.0
        for score in (mean_auroc, label_macro_f1):
            assert bootstrap_interval(score, several, several, draws=200).low < 0.99
        for score in (accuracy, balanced_accuracy, macro_f1, kappa):
            alike = paired_bootstrap(score, larger, larger, truth, draws=200, **drawn)
            assert alike.low < 0 < alike.high
            assert alike.p_value == 1
    assert bootstrap_interval(accuracy, larger, truth)[1:3] == pytest.approx([0.5347, 0.8344], abs=1e-4)


def test_one_image_has_an_interval_only_where_a_share_has():
    assert bootstrap_interval(accuracy, [1], [1])[1:3] == pytest.approx([0.025, 1])
    assert bootstrap_interval(macro_f1, [1], [1]).ends == [None, None]
    assert bootstrap_interval(accuracy, [1, 1], [1, 0], groups=["a", "a"]).ends == [None, None]
    assert paired_bootstrap(accuracy, [1], [1], [1]).ends == [None, None]


def test_newcombes_interval_is_that_of_the_paper():
    # An area is at the end of its interval: it lies 1.96 deviations of that end away (method 5).
    low, high = newcombe(0.8, 20, 30)
    for end in (low, high):
        others = (20 + 30) / 2 - 1
        variance = end * (1 - end) * (1 + others * ((1 - end) / (2 - end) + end / (1 + end))) / (20 * 30)
        assert abs(0.8 - end) == pytest.approx(1.959964 * np.sqrt(variance), rel=2e-3)
    assert newcombe(1.0, 20, 30)[1] == 1.0


def test_draws_are_of_the_seed_and_splitting_them_changes_nothing(monkeypatch):
    truth, said = classes()
    whole = bootstrap_interval(macro_f1, said, truth, seed=1)
    assert whole == bootstrap_interval(macro_f1, said, truth, seed=1)
    assert whole != bootstrap_interval(macro_f1, said, truth, seed=2)
    monkeypatch.setattr(sys.modules[Sample.__module__], "MOST_WEIGHTS", 1000)
    assert whole == bootstrap_interval(macro_f1, said, truth, seed=1)


def test_a_draw_without_a_score_is_drawn_again():
    truth = np.array([0.0, 0, 0, 1])
    found = bootstrap_interval(auroc, np.array([[0.1], [0.4], [0.6], [0.5]]), truth, draws=300, groups=np.arange(4))
    assert found.redrawn > 0
    assert found.value == pytest.approx(2 / 3)
    assert 0 <= found.low <= found.high <= 1


def test_a_score_that_is_not_defined_has_no_interval():
    found = bootstrap_interval(mean_auroc, np.random.default_rng(0).random((5, 1)), np.ones((5, 1)))
    assert np.isnan(found[:3]).all()


@pytest.mark.parametrize("score", [accuracy, balanced_accuracy, macro_f1])
def test_the_interval_covers_the_truth_as_often_as_it_says(score):
    """A test set of 20 whose larger class is nearly always told rightly: see benchmarks/coverage.py for the rest."""
    rng, shares, right = np.random.default_rng(0), np.array([0.75, 0.25]), np.array([0.98, 0.9])
    kinds = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    joint = np.array([shares[0] * 0.98, shares[0] * 0.02, shares[1] * 0.9, shares[1] * 0.1])
    true = float(score.weighted(kinds[1], kinds[0], np.round(joint * 1e6)[None])[0])
    inside, plain = 0, 0
    for repeat in range(120):
        truth = (rng.random(20) < shares[1]).astype(int)
        said = np.where(rng.random(20) < right[truth], truth, 1 - truth)
        found = bootstrap_interval(score, said, truth, draws=200, seed=repeat)
        inside += found.low <= true <= found.high
        bare = bootstrap_interval(score, said, truth, draws=50, seed=repeat, kind="percentile")
        plain += bare.low <= true <= bare.high
    assert inside / 120 >= 0.93 > plain / 120


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ((97, 3), (0.99, 0.6)),
        ((485, 15), (0.99, 0.6)),
        ((85, 15), (0.995, 0.9)),
        ((3,) * 40, (0.9,) * 20 + (0.6,) * 20),
    ],
    ids=["three images", "fifteen images", "nearly all right", "forty small classes"],
)
def test_balanced_accuracy_is_not_surer_than_its_smallest_class(sizes, shares):
    rng, inside = np.random.default_rng(0), []
    for _ in range(600):
        truth = np.repeat(np.arange(len(sizes)), rng.multinomial(sum(sizes), np.array(sizes) / sum(sizes)))
        right = rng.random(len(truth)) < np.array(shares)[truth]
        true = np.array(shares)[np.unique(truth)].mean()
        found = bootstrap_interval(balanced_accuracy, np.where(right, truth, (truth + 1) % len(sizes)), truth)
        inside.append(found.low <= true <= found.high)
    assert np.mean(inside) >= 0.93


def test_draws_of_groups_or_within_classes_are_not_surer_than_three_images_allow():
    truth = np.repeat([0, 1], [97, 3])
    alone = bootstrap_interval(balanced_accuracy, truth, truth)
    assert alone.low < 0.8
    for drawn in ({"groups": np.arange(100) // 2}, {"strata": truth}):
        assert bootstrap_interval(balanced_accuracy, truth, truth, draws=200, **drawn).low <= alone.low


def test_a_paired_difference_is_far_surer_than_two_intervals():
    truth, first = classes(400)
    second = first.copy()
    wrong = np.flatnonzero(first != truth)[:12]
    second[wrong] = truth[wrong]
    found = paired_bootstrap(accuracy, first, second, truth)
    assert found.value == pytest.approx(12 / 400)
    assert 0 < found.low < found.value < found.high
    assert found.p_value == pytest.approx(2 / 1001)
    turned = paired_bootstrap(accuracy, second, first, truth)
    assert turned[:3] == pytest.approx((-found.value, -found.high, -found.low), abs=5e-3)
    alone = bootstrap_interval(accuracy, first, truth)
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_nothing_differs_from_itself():
    truth, said = classes()
    # Two encoders that say the same of 200 images may yet differ on others.
    found = paired_bootstrap(accuracy, said, said, truth)
    assert (found.value, found.p_value) == (0, 1)
    assert -0.03 < found.low < 0 < found.high < 0.03
    truth, first, _ = finding()
    assert delong(first, first, truth) == Difference(0.0, 0.0, 0.0, 1.0)


def test_p_values_are_even_where_there_is_no_difference():
    rng, p_values = np.random.default_rng(1), []
    for repeat in range(150):
        truth = rng.integers(0, 2, 200)
        one, other = (np.where(rng.random(200) < 0.75, truth, 1 - truth) for _ in range(2))
        p_values.append(paired_bootstrap(accuracy, one, other, truth, draws=200, seed=repeat).p_value)
    assert np.mean(np.array(p_values) < 0.05) < 0.12
    assert 0.4 < np.mean(p_values) < 0.62


def test_delong_is_the_formula_written_out():
    truth, first, second = finding()
    first = first.round(1)  # ties
    present, absent = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    m, n = len(present), len(absent)
    v10, v01 = np.zeros((2, m)), np.zeros((2, n))
    for number, scores in enumerate((first, second)):
        for a, i in enumerate(present):
            v10[number, a] = np.mean([float(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for j in absent])
        for b, j in enumerate(absent):
            v01[number, b] = np.mean([float(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i in present])
    expected = np.cov(v10) / m + np.cov(v01) / n
    found = delong(first, second, truth)
    assert found.value == pytest.approx(roc_auc_score(truth, second) - roc_auc_score(truth, first), abs=1e-12)
    deviation = np.sqrt(expected[0, 0] + expected[1, 1] - 2 * expected[0, 1])
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(found.value) / deviation))
    assert found.low == pytest.approx(found.value - 1.959964 * deviation)


def test_delong_and_the_bootstrap_agree():
    truth, first, second = finding(300)
    ours, drawn = delong(first, second, truth), paired_bootstrap(auroc, first, second, truth, draws=1000)
    assert ours.value == pytest.approx(drawn.value)
    assert ours[1:3] == pytest.approx(drawn[1:3], abs=0.02)
    alone, interval = delong_interval(first, truth), bootstrap_interval(auroc, first, truth)
    assert alone[:3] == pytest.approx(interval[:3], abs=0.02)


def test_unknown_findings_are_left_out_of_delong():
    truth, first, second = finding()
    gaps = truth.astype(float)
    gaps[:40] = np.nan
    assert delong(first, second, gaps) == delong(first[40:], second[40:], truth[40:])


def test_holm_by_hand():
    # 0.01*4; max(0.04, 0.02*3); max(0.06, 0.03*2); max(.., 0.5*1)
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_of_a_mean_is_student_ts():
    values = [0.71, 0.74, 0.69, 0.70]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean_interval(values)[1:3] == pytest.approx((expected.low, expected.high))
    assert mean_interval([0.5]).ends == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 1}, "draws is 1"),
        ({"level": 1.0}, "level is 1.0"),
        ({"kind": "bca"}, "unknown kind of interval 'bca'"),
        ({"predictions": np.zeros(3)}, "3 predictions do not belong to 4 targets"),
        ({"predictions": np.zeros(0), "targets": np.zeros(0)}, "at least one image"),
        ({"strata": np.zeros(3)}, "strata of shape"),
        ({"groups": np.zeros(3)}, "3 groups do not belong to 4 images"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    given = {"predictions": np.zeros(4), "targets": np.zeros(4)} | arguments
    with pytest.raises(UsageError, match=message):
        bootstrap_interval(lambda p, t: 0.5, given.pop("predictions"), given.pop("targets"), **given)


def test_delong_refuses_what_has_no_auroc():
    with pytest.raises(UsageError, match="images with the finding and images without"):
        delong([0.1, 0.2], [0.1, 0.2], [1, 1])
    with pytest.raises(UsageError, match=r"there \(1\) or not \(0\)"):
        delong([0.1, 0.2], [0.1, 0.2], [1, 2])
    with pytest.raises(UsageError, match="do not belong to"):
        delong([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [1, 0])
