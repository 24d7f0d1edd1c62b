"""Scaling studies: nested label sets, one row per point, curves."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from patchloom.errors import UsageError
from patchloom.evaluate.scaling import nested_shots, scaling


def test_label_sets_are_nested_and_balanced():
    labels = np.repeat([0, 1, 2], [10, 20, 3])
    few, more = nested_shots(labels, 2, seed=4), nested_shots(labels, 5, seed=4)
    assert set(few) < set(more)
    assert np.bincount(labels[more]).tolist() == [5, 5, 3]
    assert set(nested_shots(labels, 5, seed=5)) != set(more)


def test_a_grid_of_sizes_and_labels_is_measured(tmp_path):
    arguments = {"encoders": ["pixels"], "train": "digits", "test": "digits:test", "num_workers": 0}
    text = scaling(**arguments, out=str(tmp_path / "s"), image_sizes=[4, 8], shots=[1, 20], seeds=3, protocol="knn")
    with (tmp_path / "s" / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image size"], row["shots"], row["images"]) for row in rows] == [
        ("4", "1", "10"),
        ("4", "20", "200"),
        ("8", "1", "10"),
        ("8", "20", "200"),
    ]
    by_shots = {(row["image size"], row["shots"]): float(row["accuracy"]) for row in rows}
    assert by_shots["8", "20"] > by_shots["8", "1"] > 0.2
    assert "| pixels | 8 | 20 | 200 |" in text
    assert (tmp_path / "s" / "report.html").read_text().count("data:image/png") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoders": []}, "at least one encoder"),
        ({"protocol": "kn"}, "did you mean knn"),
        ({"shots": [0]}, "at least 1"),
    ],
)
def test_impossible_requests_are_refused(change, message, tmp_path):
    arguments = {"encoders": ["pixels"], "train": "digits", "test": "digits:test", "out": str(tmp_path / "s")}
    with pytest.raises(UsageError, match=message):
        scaling(**{**arguments, **change})
