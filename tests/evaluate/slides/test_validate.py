"""Training, cross-validation and ensembles on bags made up so that the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchloom.errors import UsageError
from patchloom.evaluate.slides.fit import FitSettings, fit, make_head, predict_logits
from patchloom.evaluate.slides.tasks import Task
from patchloom.evaluate.slides.validate import (
    MILEnsemble,
    cross_validate_mil,
    nested_cross_validation,
    retrain,
    split_patients,
)

BINARY = Task("binary", ("no", "yes"))
QUICK = {"epochs": 6, "lr": 3e-3, "batch_size": 8}


def made_bags(count: int, seed: int = 0, width: int = 8):
    """Return bags of 3 to 9 tiles; in positive ones the first tile points along the first axis."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    bags = []
    for label in labels:
        bag = generator.normal(size=(generator.integers(3, 10), width)).astype(np.float32)
        bag[0, 0] += 6.0 * label
        bags.append(torch.from_numpy(bag))
    return bags, labels


def test_a_head_learns_and_its_curve_shows_it():
    bags, labels = made_bags(64)
    held_out = made_bags(40, seed=1)
    head, curve = fit(bags, labels, BINARY, FitSettings(**{**QUICK, "epochs": 25}), held_out)
    assert len(curve) == 25
    assert curve[-1] > 0.9
    assert not head.training
    scores = BINARY.scores(predict_logits(head, held_out[0]))
    assert BINARY.metric(held_out[1], scores) == pytest.approx(curve[-1])


def test_the_same_seed_gives_the_same_head_whatever_the_global_state():
    bags, labels = made_bags(20)
    settings = FitSettings(**QUICK, seed=3, head_args={"mlp_dropout": [0.2, 0.2]})
    first = fit(bags, labels, BINARY, settings)[0]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = fit(bags, labels, BINARY, settings, made_bags(8))[0]
    assert torch.equal(before, torch.get_rng_state())
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("head", ["abmil", "transmil", "chowder"])
def test_predictions_do_not_depend_on_the_batch(head):
    bags, _ = made_bags(7)
    args = {"chowder": {"n_top": 2, "n_bottom": 2}, "transmil": {"num_heads": 2}}.get(head, {})
    model = make_head(FitSettings(head=head, head_args=args), 8, 1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    together, alone = (predict_logits(model, bags, batch_size=size) for size in (4, 1))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_incomplete_last_batch_is_left_out(monkeypatch):
    from patchloom.evaluate.slides import fit as fit_module

    sizes = []
    original = fit_module.forward
    monkeypatch.setattr(
        fit_module, "forward", lambda head, bags, device: sizes.append(len(bags)) or original(head, bags, device)
    )
    bags, labels = made_bags(19)
    fit(bags, labels, BINARY, FitSettings(**{**QUICK, "epochs": 1}))
    fit(bags[:5], labels[:5], BINARY, FitSettings(**{**QUICK, "epochs": 1}))
    assert sizes == [8, 8, 5]


def test_folds_keep_patients_together_and_classes_even():
    labels = np.arange(60) % 2
    groups = [f"p{number // 2 * 2 + number % 2}" for number in range(60)]
    groups = [f"p{number % 20}" for number in range(60)]
    parts = list(split_patients(labels, groups, BINARY, 5, 2))
    assert len(parts) == 10
    owners = np.array(groups)
    for seen, unseen in parts:
        assert not set(owners[seen]) & set(owners[unseen])
        assert labels[unseen].mean() == pytest.approx(0.5, abs=0.1)
    assert sorted(np.concatenate([unseen for _, unseen in parts[:5]]).tolist()) == list(range(60))
    assert any((a[1] != b[1]).any() for a, b in zip(parts[:5], parts[5:], strict=True) if len(a[1]) == len(b[1]))


@pytest.mark.slow
def test_cross_validation_chooses_what_works_and_keeps_its_models(tmp_path):
    bags, labels = made_bags(48)
    groups = [f"p{number}" for number in range(48)]
    ensemble = cross_validate_mil(
        bags,
        labels,
        groups,
        BINARY,
        FitSettings(**{**QUICK, "epochs": 12}),
        grid={"lr": (1e-9, 3e-3)},
        folds=3,
        repeats=2,
    )
    assert len(ensemble.heads) == 6
    assert ensemble.settings.lr == 3e-3
    curves = [np.array(point["curve"]) for point in ensemble.choice["grid"]]
    best = ensemble.choice["best"]
    assert best == 1
    assert ensemble.settings.epochs == int(curves[1].argmax()) + 1
    assert ensemble.choice["validation"] == pytest.approx(curves[1].max())
    # The members are those of the folds at the chosen epoch: their mean metric on unseen bags is the one chosen by.
    logits = ensemble.member_logits(bags)
    scores = [
        BINARY.metric(labels[unseen], BINARY.scores(each[unseen]))
        for each, unseen in zip(logits, ensemble.folds, strict=True)
    ]
    assert np.mean(scores) == pytest.approx(ensemble.choice["validation"], abs=1e-6)
    assert BINARY.metric(labels, ensemble.unseen_scores(bags)) > 0.8
    other, truth = made_bags(30, seed=5)
    mean = np.mean([BINARY.scores(each) for each in ensemble.member_logits(other)], 0)
    np.testing.assert_allclose(ensemble.predict(other), mean)
    assert BINARY.metric(truth, mean) > 0.85
    by_logit = BINARY.scores(ensemble.member_logits(other).mean(0))
    np.testing.assert_allclose(ensemble.predict(other, "logits"), by_logit)
    loaded = MILEnsemble.load(ensemble.save(tmp_path / "ensemble"))
    np.testing.assert_allclose(loaded.predict(other), ensemble.predict(other))
    assert loaded.settings == ensemble.settings
    with pytest.raises(UsageError, match="exists"):
        ensemble.save(tmp_path / "ensemble")
    with pytest.raises(UsageError, match="no ensemble"):
        MILEnsemble.load(tmp_path)
    alone = retrain(bags, labels, ensemble)
    assert len(alone.heads) == 1
    assert alone.predict(other).shape == (30,)


def test_the_published_epoch_is_off_by_one():
    bags, labels = made_bags(24)
    groups = [str(number) for number in range(24)]
    both = [
        cross_validate_mil(
            bags,
            labels,
            groups,
            BINARY,
            FitSettings(**QUICK),
            grid={"lr": (3e-3,)},
            folds=2,
            repeats=1,
            epoch_as_published=p,
        )
        for p in (False, True)
    ]
    index = int(np.argmax(both[0].choice["grid"][0]["curve"]))
    assert both[0].settings.epochs == index + 1
    assert both[1].settings.epochs == max(index, 1)


@pytest.mark.parametrize("kind", ["multiclass", "survival"])
def test_other_tasks(kind):
    bags, labels = made_bags(36)
    if kind == "multiclass":
        task, labels = Task(kind, ("a", "b", "c")), labels + np.arange(36) % 3 // 2
    else:
        generator = np.random.default_rng(0)
        task = Task(kind)
        labels = np.where(labels == 1, generator.uniform(1, 2, 36), generator.uniform(3, 4, 36))
        labels *= np.where(np.arange(36) % 4 == 3, -1, 1)
    groups = [str(number) for number in range(36)]
    settings = FitSettings(**{**QUICK, "epochs": 15})
    ensemble = cross_validate_mil(bags, labels, groups, task, settings, grid={"lr": (3e-3,)}, folds=2, repeats=1)
    assert task.metric(labels, ensemble.predict(bags)) > 0.75


def test_nested_cross_validation():
    bags, labels = made_bags(40)
    groups = [str(number) for number in range(40)]
    found = nested_cross_validation(
        bags, labels, groups, BINARY, FitSettings(**QUICK), grid={"lr": (3e-3,)}, folds=2, inner_folds=2, repeats=2
    )
    assert [(row["repeat"], row["fold"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 <= row["metric"] <= 1 and 1 <= row["epochs"] <= 6 for row in found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: list(split_patients(np.array([0, 1, 0]), ["a", "b", "c"], BINARY, 2, 1)), "class yes has 1 patients"),
        (lambda: list(split_patients(np.array([0, 1] * 4), ["a", "b"] * 4, BINARY, 2, 1)), "class no has 1 patients"),
        (lambda: list(split_patients(np.zeros(4), list("abcd"), BINARY, 1, 1)), "folds is 1"),
        (lambda: FitSettings(head="abmill"), "did you mean abmil"),
        (lambda: FitSettings(lr=0), "lr is 0"),
        (lambda: make_head(FitSettings(head_args={"n_top": 3}), 4, 1), "head_args .* do not fit abmil"),
        (lambda: fit(*made_bags(8), BINARY, FitSettings(lr=1e30, epochs=5)), "the loss became"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
