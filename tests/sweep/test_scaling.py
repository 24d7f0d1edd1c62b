"""Scaling studies: nested label sets, one row per point, curves."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.sweep.scaling import scaling


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


def test_sizes_may_be_oblong_and_images_are_read_as_everywhere(tmp_path):
    for number in range(12):
        for folder, shift in (("train", 0), ("test", 1)):
            (tmp_path / folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8), 300 + shift, np.uint16)
            pixels[:4] += 3000 * (number % 2)
            Image.fromarray(pixels).save(tmp_path / folder / "ab"[number % 2] / f"{number}.png")
    folders = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "num_workers": 0}
    arguments = {**folders, "encoders": ["pixels"], "image_sizes": [8, [8, 4]], "shots": [2], "seeds": 1}
    text = scaling(**arguments, value_range="bits:12", protocol="knn", out=str(tmp_path / "s"))
    assert "| pixels | 8x4 | 2 | 4 | 100.0%" in text
    assert "value_range: bits:12" in (tmp_path / "s" / "study.yaml").read_text()
    with pytest.raises(UsageError, match=r"image_sizes is .*give the side in pixels, or height and width"):
        scaling(**{**arguments, "image_sizes": [[1, 2, 3]]}, out=str(tmp_path / "t"))


def test_labels_are_drawn_as_published(tmp_path):
    arguments = {"encoders": ["pixels"], "train": "digits", "test": "digits:test", "num_workers": 0}
    arguments |= {"image_sizes": [8], "seeds": 2, "protocol": "knn"}
    images = {}
    for by, shots in (("dinov2", [3]), ("dinov3", [0.05, 2]), ("radiology", [40])):
        scaling(**arguments, out=str(tmp_path / by), shots=shots, shots_by=by)
        with (tmp_path / by / "scaling.csv").open() as file:
            rows = list(csv.DictReader(file))
        images[by] = [(row["shots"], row["images"]) for row in rows]
    assert images["dinov2"] == [("3", "30")]
    share = sum(int(count * 0.05) for count in np.bincount(open_source("digits").labels))
    assert images["dinov3"] == [("0.05", str(share)), ("2", "20")]
    assert images["radiology"] == [("40", "40")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoders": []}, "at least one encoder"),
        ({"protocol": "kn"}, "did you mean knn"),
        ({"shots": [0]}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
        ({"shots_by": "dinov1"}, "did you mean dinov"),
    ],
)
def test_impossible_requests_are_refused(change, message, tmp_path):
    arguments = {"encoders": ["pixels"], "train": "digits", "test": "digits:test", "out": str(tmp_path / "s")}
    with pytest.raises(UsageError, match=message):
        scaling(**{**arguments, **change})
