"""Retrieval, several labels per image, and grades: scikit-learn's figures, and labels that are missing."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.evaluate import retrieval
from patchloom.evaluate.multilabel import MultiLabelConfig
from patchloom.evaluate.ordinal import in_order
from patchloom.evaluate.retrieval import ranks
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.target import labelled_features
from patchloom.features.mlknn import mlknn_predict
from patchloom.statistics.metrics import per_label_auroc
from small_images import QUICK, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {"train": str(write_images(root / "train", 12)), "test": str(write_images(root / "test", 8, seed=1))}


def table(folder, per_class: int, seed: int = 0, gaps: float = 0.2) -> str:
    """Write images and a table of two labels that their colour tells, and one that never occurs."""
    write_images(folder, per_class, seed=seed)
    rng = np.random.default_rng(seed)
    with (folder / "labels.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["file", "red", "not blue", "never"])
        for colour in ("blue", "green", "red"):
            for number in range(per_class):
                labels = [int(colour == "red"), int(colour != "blue"), 0]
                rows.writerow([f"{colour}/{number}.png", *("" if rng.random() < gaps else one for one in labels)])
    return str(folder / "labels.csv")


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tables")
    return {"train": table(root / "train", 15), "test": table(root / "test", 10, seed=1)}


def test_average_precision_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 5, generator=generator), torch.randn(12, 5, generator=generator)
    y, truth = torch.arange(40) % 4, torch.arange(12) % 5  # nothing shows class 4
    precision, first = ranks(train, y, test, truth)
    unit = torch.nn.functional.normalize
    similar = (unit(test.double()) @ unit(train.double()).T).numpy()
    for row in range(12):
        right = (y == truth[row]).numpy()
        if not right.any():
            assert torch.isnan(precision[row])
            continue
        assert float(precision[row]) == pytest.approx(average_precision_score(right, similar[row]), rel=1e-5)
        assert int(first[row]) == int(np.flatnonzero(right[np.argsort(-similar[row])])[0])


def test_images_look_for_one_another(monkeypatch):
    x, y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    precision, first = ranks(x, y, x, y, leave_one_out=True)
    for row in range(20):
        others = torch.arange(20) != row
        alone, place = ranks(x[others], y[others], x[[row]], y[[row]])
        assert float(precision[row]) == pytest.approx(float(alone[0]), rel=1e-5)
        assert int(first[row]) == int(place[0])
    monkeypatch.setattr(retrieval, "MOST_SIMILARITIES", 60)
    torch.testing.assert_close(ranks(x, y, x, y, leave_one_out=True)[0], precision)


def test_retrieval_end_to_end(data, tmp_path):
    found = pl.evaluate("retrieval", encoder="pixels", predictions=str(tmp_path / "p.npz"), **data, **QUICK)
    assert found["score_name"] == "map"
    assert 0.3 < found["score"] < 1
    assert found["recall@1"] <= found["recall@5"] <= found["recall@10"] <= 1
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high
    assert Predictions.load(tmp_path / "p.npz").interval().value == pytest.approx(found["map"])
    same = pl.evaluate("retrieval", encoder="pixels", train=data["train"], test=data["train"], **QUICK)
    assert same["leave_one_out"]
    assert same["n"] == 36
    with pytest.raises(UsageError, match="each must be at least 1"):
        pl.evaluate("retrieval", encoder="pixels", ks=(0,), **data, **QUICK)


def test_an_image_without_its_like_is_left_out_and_said(data, tmp_path):
    few = write_images(tmp_path / "few", 3)
    for number in (1, 2):
        (few / "red" / f"{number}.png").unlink()
    found = pl.evaluate("retrieval", encoder="pixels", train=str(few), test=str(few), **QUICK)
    assert found["n"] == 6
    assert found["notes"] == ["1 images have no other of their class to find, and are left out"]


@pytest.mark.parametrize("probe", ["linear", "knn", "mlknn"])
def test_several_labels_each(probe, tables, tmp_path):
    path = tmp_path / "p.npz"
    found = pl.evaluate(
        "multilabel", encoder="pixels", probe=probe, steps=150, image_size=8, predictions=str(path), **tables, **QUICK
    )
    said = Predictions.load(path)
    truth = said.targets
    assert np.isnan(truth).mean() == pytest.approx(0.2, abs=0.1)
    areas = {}
    for place, name in enumerate(said.class_names[:2]):
        known = ~np.isnan(truth[:, place])
        areas[name] = roc_auc_score(truth[known, place], said.predicted[known, place])
        assert found["per_label"][name]["auroc"] == pytest.approx(areas[name])
        assert found["per_label"][name]["unknown"] == int((~known).sum())
    assert found["score"] == pytest.approx(np.mean(list(areas.values())))
    assert found["score"] > 0.6
    assert found["interval"][0] <= found["score"] <= found["interval"][1]
    assert found["per_label"]["never"]["auroc"] is None
    assert "without AUROC: never" in found["notes"][0]


def test_neighbours_are_asked_as_told(tables):
    settings = {"encoder": "pixels", "image_size": 8, **tables, **QUICK}
    found = pl.evaluate("multilabel", probe="mlknn", k=5, ks=[9, 100], **settings)
    assert (found["probe"], found["k"], found["smoothing"], found["exclude_self"]) == ("mlknn", 5, 1.0, False)
    assert list(found["mean_auroc_by_k"]) == ["5", "9", "45"]
    assert found["mean_auroc_by_k"]["5"] == pytest.approx(found["score"])
    train, test, _ = labelled_features(
        MultiLabelConfig(encoder="pixels", image_size=8, **tables, **QUICK), several=True, may_be_same=True
    )
    for options in ({}, {"smoothing": 0.1, "exclude_self": True}):
        said = mlknn_predict(train.vectors, train.labels, test.vectors, ks=(9,), **options)[9]
        areas = per_label_auroc(said.numpy(), test.labels.numpy())
        found = pl.evaluate("multilabel", probe="mlknn", k=9, **options, **settings)
        assert found["score"] == pytest.approx(np.nanmean(areas))
    # Whatever the probe, where train is test an image is told by all others.
    for probe in ("knn", "mlknn"):
        same = pl.evaluate("multilabel", probe=probe, **{**settings, "test": tables["train"]})
        assert same["leave_one_out"]
        assert same["score"] < 1
    few = pl.evaluate("multilabel", probe="mlknn", shots=3, shots_by="dinov3", **settings)
    assert few["k"] == 3
    assert few["train_images"] <= 6


def test_labels_are_matched_by_name(tables, tmp_path):
    folder = tmp_path / "other"
    lines = open(table(folder, 10, seed=1)).read().splitlines()  # noqa: PTH123, SIM115
    rows = [",".join([parts[0], parts[2], parts[1]]) for parts in (line.split(",") for line in lines)]
    (folder / "turned.csv").write_text("\n".join(rows))
    settings = {"encoder": "pixels", "probe": "knn", "image_size": 8, "train": tables["train"], **QUICK}
    straight = pl.evaluate("multilabel", test=str(folder / "labels.csv"), **settings)["per_label"]
    turned = pl.evaluate("multilabel", test=str(folder / "turned.csv"), **settings)
    found = turned["per_label"]
    assert found["red"]["auroc"] == straight["red"]["auroc"]
    assert found["not blue"]["auroc"] == straight["not blue"]["auroc"]
    assert found["never"]["unknown"] == turned["n"]
    (folder / "strange.csv").write_text("file,red,odd\nred/0.png,1,0\n")
    with pytest.raises(UsageError, match=r"classes that .* does not have: odd"):
        pl.evaluate("multilabel", test=str(folder / "strange.csv"), **settings)


def test_each_kind_of_label_has_its_evaluation(data, tables):
    with pytest.raises(UsageError, match="has one class per image and this evaluation is for several"):
        pl.evaluate("multilabel", encoder="pixels", **data, **QUICK)
    with pytest.raises(UsageError, match=r"several labels per image .* patchloom evaluate multilabel"):
        pl.evaluate("knn", encoder="pixels", **tables, **QUICK)
    with pytest.raises(UsageError, match=r"smoothing is 0\.0"):
        pl.evaluate("multilabel", encoder="pixels", smoothing=0.0, **tables, **QUICK)
    with pytest.raises(UsageError, match=r"ks is \[0\]; each must be at least 1"):
        pl.evaluate("multilabel", encoder="pixels", ks=[0], **tables, **QUICK)
    with pytest.raises(UsageError, match="unknown probe"):
        pl.evaluate("multilabel", encoder="pixels", probe="svm", **tables, **QUICK)


def test_grades(data, tmp_path):
    path = tmp_path / "p.npz"
    settings = {"encoder": "pixels", "grades": ["green", "blue", "red"], **data, **QUICK}
    found = pl.evaluate("ordinal", predictions=str(path), **settings)
    said = Predictions.load(path)
    assert said.class_names == ["green", "blue", "red"]
    assert said.score_name == "kappa"
    expected = cohen_kappa_score(said.targets, said.predicted, weights="quadratic")
    assert found["score"] == pytest.approx(expected)
    assert found["interval"][0] <= found["score"] <= found["interval"][1]
    assert found["mean_grade_error"] == pytest.approx(np.abs(said.predicted - said.targets).mean())
    assert found["accuracy"] == pytest.approx((said.predicted == said.targets).mean())
    assert pl.evaluate("ordinal", decide="expected", **settings)["score"] <= 1
    with pytest.raises(UsageError, match="grades are a, b, but the classes are blue, green, red"):
        pl.evaluate("ordinal", **{**settings, "grades": ["a", "b"]})


def test_grades_that_are_numbers_are_in_their_order():
    assert in_order(["0", "1", "10", "2"]) == ["0", "1", "2", "10"]
    assert in_order(["mild", "none"]) == ["mild", "none"]
