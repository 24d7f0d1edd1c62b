"""Comparisons: paired, in any order of the images, and refused where the images differ."""

from __future__ import annotations

import json

import numpy as np
import pytest

import patchloom as pl
from patchloom.cli import main
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.evaluate.compare import compare_predictions
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.models.bundle import save_bundle
from patchloom.statistics.delong import delong
from patchloom.statistics.intervals import paired_bootstrap
from patchloom.statistics.metrics import accuracy
from small_images import CLASSIFIERS, QUICK, TINY, write_images


def said(share: float, seed: int, n: int = 200, name: str = "a") -> Predictions:
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 4
    predicted = np.where(rng.random(n) < share, truth, (truth + 1) % 4)
    return Predictions(
        [f"{i}.png" for i in range(n)], predicted, truth, "accuracy", list("wxyz"), about={"encoder": name}
    )


def shuffled(given: Predictions) -> Predictions:
    order = np.random.default_rng(5).permutation(len(given.keys))
    keys = [given.keys[i] for i in order]
    return Predictions(keys, given.predicted[order], given.targets[order], given.score_name, given.class_names)


def test_it_is_the_paired_bootstrap_whatever_the_order():
    first, second = said(0.7, 0), said(0.8, 1)
    expected = paired_bootstrap(accuracy, first.predicted, second.predicted, first.targets)
    assert compare_predictions(first, second) == expected
    assert compare_predictions(first, shuffled(second)) == expected


def test_one_finding_is_compared_by_delong():
    rng = np.random.default_rng(0)
    truth, keys = rng.integers(0, 2, (60, 1)).astype(float), [str(i) for i in range(60)]
    one, other = (Predictions(keys, truth + rng.normal(size=(60, 1)), truth, "mean_auroc") for _ in range(2))
    assert compare_predictions(one, other) == delong(one.predicted[:, 0], other.predicted[:, 0], truth[:, 0])


def test_files_are_compared_with_holms_correction(tmp_path, capsys):
    files = []
    for number, share in enumerate((0.5, 0.75, 0.78)):
        files.append(str(said(share, number, name=str(number)).save(tmp_path / f"{number}.npz")))
    found = pl.evaluate("compare", files=files)
    assert [one["score"] for one in found["scores"]] == pytest.approx([0.5, 0.75, 0.78], abs=0.08)
    assert [(d["first"][-5], d["second"][-5]) for d in found["differences"]] == [("0", "1"), ("0", "2"), ("1", "2")]
    by_pair = found["differences"]
    assert by_pair[0]["difference"] == pytest.approx(found["scores"][1]["score"] - found["scores"][0]["score"])
    assert by_pair[0]["interval"][0] > 0
    assert by_pair[0]["p_holm"] >= by_pair[0]["p_value"]
    assert by_pair[0]["p_holm"] < 0.05 < by_pair[2]["p_value"]
    assert len(pl.evaluate("compare", files=files, against="first")["differences"]) == 2
    assert main(["evaluate", "compare", "--files", ",".join(files), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == found["differences"]


@pytest.mark.parametrize("protocol", CLASSIFIERS)
def test_encoders_are_measured_and_compared(protocol, tmp_path):
    data = {"train": str(write_images(tmp_path / "a", 6)), "test": str(write_images(tmp_path / "b", 5, seed=1))}
    path = save_bundle(create_encoder("ccvit_tiny_patch4_32", image_size=16, **TINY), tmp_path / "e")
    found = pl.evaluate("compare", encoders=["pixels", str(path)], by=protocol, settings=QUICK, **data)
    assert found["n"] == 15
    alone = [pl.evaluate(protocol, encoder=e, **data, **QUICK)["score"] for e in ("pixels", str(path))]
    assert [one["score"] for one in found["scores"]] == pytest.approx(alone)
    assert found["differences"][0]["difference"] == pytest.approx(alone[1] - alone[0])
    assert found["test"] == "paired bootstrap"


def test_different_images_are_not_compared():
    first, fewer = said(0.7, 0), said(0.7, 0, n=199)
    with pytest.raises(UsageError, match="measured on different images"):
        compare_predictions(first, fewer)
    other = Predictions(first.keys, first.predicted, (first.targets + 1) % 4, "accuracy")
    with pytest.raises(UsageError, match="different true labels"):
        compare_predictions(first, other)
    with pytest.raises(UsageError, match="cannot be compared"):
        compare_predictions(first, Predictions(first.keys, first.predicted, first.targets, "kappa"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either encoders or files"),
        ({"encoders": "a,b"}, "give train and test"),
        ({"files": "a.npz"}, "at least two"),
        ({"files": "a.npz,a.npz"}, "twice"),
        ({"files": "a.npz,b.npz"}, "holds no predictions"),
        ({"files": "a.npz,b.npz", "draws": 1}, "draws is 1"),
        ({"files": "a.npz,b.npz", "against": "last"}, "unknown against"),
        ({"encoders": "pixels,b", "train": "x", "test": "y", "by": "kn"}, "unknown evaluation 'kn'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("compare", **settings)


def test_predictions_that_do_not_belong_together_are_refused():
    with pytest.raises(UsageError, match="2 names, 3 predictions, 3 targets"):
        Predictions(["a", "b"], np.zeros(3), np.zeros(3), "accuracy")
    with pytest.raises(UsageError, match="unknown score 'acc'"):
        Predictions(["a"], np.zeros(1), np.zeros(1), "acc")
