"""The study of image towers: its lines, its table, and that it goes on where it stopped."""

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")

from tests.small_images import write_images

from patchloom.errors import UsageError
from patchloom.sweep.align import fits, fitted_line, multiply_adds, scaling, summarise
from patchloom.sweep.study import Cell, Outcome

TINY = {"text_width": 16, "text_heads": 2, "text_layers": 1, "context_length": 16, "drop_path": 0.0}


def test_a_line_is_that_of_least_squares():
    amounts, values = [100, 1000, 5000, 9000], [0.1, 0.35, 0.3, 0.6]
    slope, at_one = np.polyfit(np.log10(amounts), values, 1)
    line = fitted_line(amounts, values)
    assert line.slope == pytest.approx(slope)
    assert line.at_one == pytest.approx(at_one)
    assert np.isnan(fitted_line([10, 10], [0.1, 0.2]).slope)


def outcome(encoder, pairs, seed, score, parameters):
    labels = {"data": "d", "encoder": encoder, "pairs": str(pairs), "seed": str(seed)}
    figures = {"accuracy": score, "pairs": pairs, "parameters": parameters, "multiply_adds": 1}
    return Outcome(Cell(labels, {}), figures)


def test_slopes_are_over_pairs_for_a_tower_and_over_parameters_for_a_budget():
    found = [
        outcome(name, pairs, seed, 0.1 * np.log10(pairs) * factor + seed * 0.01, size)
        for name, size, factor in (("small", 1000, 1.0), ("large", 10000, 2.0))
        for pairs in (100, 1000)
        for seed in (0, 1)
    ]
    slopes = {(row["over"], row["of"]): row["accuracy_slope"] for row in fits(found)}
    assert slopes["pairs", "small"] == pytest.approx(0.1)
    assert slopes["pairs", "large"] == pytest.approx(0.2)
    assert slopes["parameters", "1000 pairs"] == pytest.approx(0.3)
    rows = summarise([*found, Outcome(found[0].cell, error="no luck")])
    assert rows[0]["accuracy"] == pytest.approx(0.205)
    assert rows[0]["accuracy_sd"] == pytest.approx(0.01 / 2**0.5)
    assert rows[0]["failed"] == "no luck"


def test_multiply_adds_of_a_linear_layer_are_its_weights():
    import timm

    encoder = timm.create_model("vit_micro_patch4_32", num_classes=0, depth=1)
    width, tokens = 128, 65
    embedding = 64 * 48 * width
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert multiply_adds(encoder) == pytest.approx(embedding + block, rel=0.01)


@pytest.mark.slow
def test_a_study_is_made_once(tmp_path, capsys):
    images = write_images(tmp_path / "images", 8)
    settings = {"encoders": ["vitamin_tiny_32"], "data": [str(images)], "test": str(images), "samples": [8, 16]}
    shared = {**settings, "batch_size": 8, "seeds": 1, "num_workers": 0, "accelerator": "cpu", "settings": TINY}
    table = scaling(out=str(tmp_path / "study"), **shared)
    assert "vitamin_tiny_32" in table
    assert len(table.rows["scores"]) == 2
    assert table.rows["slopes"][0]["over"] == "pairs"
    for name in ("report.html", "scaling.csv", "slopes.csv", "scaling.md"):
        assert (tmp_path / "study" / name).exists()
    capsys.readouterr()
    again = scaling(out=str(tmp_path / "study"), **shared)
    assert "2 of 2 cells are done already" in capsys.readouterr().err
    assert json.dumps(again.rows, default=str) == json.dumps(table.rows, default=str)


def test_what_cannot_be_is_refused(tmp_path):
    asked = {"data": ["photos"], "test": "photos:test", "out": str(tmp_path / "study")}
    with pytest.raises(UsageError, match="name at least one of each"):
        scaling(encoders=[], samples=[100], **asked)
    with pytest.raises(UsageError, match="samples has 10, fewer than the 64 pairs of a step"):
        scaling(encoders=["vitamin_tiny_32"], samples=[10], **asked)
    with pytest.raises(UsageError, match="settings has max_steps, which the study sets itself"):
        scaling(encoders=["vitamin_tiny_32"], samples=[100], settings={"max_steps": 3}, **asked)
