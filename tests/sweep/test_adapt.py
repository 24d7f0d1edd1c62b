"""The comparison of methods: one table, kept cells, failures that stay alone, processes of their own."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.sweep.adapt import compare, plan_cells, summarise
from patchloom.sweep.study import Cell, Outcome


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return str(save_bundle(create_encoder("vit_tiny_patch16_224", **size), tmp_path_factory.mktemp("adapt") / "base"))


def plan(base, **changes):
    return {
        "data": "digits",
        "encoder": base,
        "defaults": {"max_steps": 3, "batch_size": 32, "num_workers": 0, "accelerator": "cpu", "precision": "32-true"},
        "methods": {"linear": {}, "narrow": {"method": "adaptformer", "bottleneck": 2}},
        "isolate": False,
        **changes,
    }


def written(tmp_path, contents):
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(contents))
    return str(file)


def test_a_table_of_methods_and_label_budgets(tmp_path, base):
    recipe = written(tmp_path, plan(base, label_fractions=[0.1, 1.0]))
    table = compare(recipe, str(tmp_path / "out"))
    scores = "accuracy | balanced accuracy | majority share"
    assert table.splitlines()[0] == f"| method | labels | seeds | {scores} | trained parameters | file MB | seconds |"
    with (tmp_path / "out" / "compare.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["method"], row["labels"]) for row in rows] == [
        ("linear", "0.1"),
        ("linear", "1"),
        ("narrow", "0.1"),
        ("narrow", "1"),
    ]
    assert float(rows[0]["trained_parameters"]) == 33 * 10
    assert float(rows[2]["trained_parameters"]) == 33 * 10 + 2 * (2 * 32 * 2 + 2 + 32)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Score against labels" in page
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))
    # Nothing is computed again, and the table is the same.
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()}
    assert compare(recipe, str(tmp_path / "out")) == table
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").iterdir()} == before


@pytest.mark.slow
def test_a_cell_of_its_own_process_knows_its_memory_and_one_that_fails_stays_alone(tmp_path, base):
    methods = {"linear": {}, "wrong": {"method": "adaptformer", "blocks": [7]}}
    table = compare(written(tmp_path, plan(base, methods=methods, isolate=True)), str(tmp_path / "out"))
    assert "there is no block 7; the encoder has blocks 0 to 1" in table
    [good] = [json.loads(file.read_text()) for file in (tmp_path / "out" / "cells").glob("linear*")]
    assert 1e8 < good["figures"]["peak_memory"] < 1e10
    assert good["error"] is None


def test_mistakes_are_named_before_anything_runs(base):
    with pytest.raises(UsageError, match="unknown adapt method 'adaptfomer'; did you mean adaptformer"):
        plan_cells(plan(base, methods={"adaptfomer": {}}))
    with pytest.raises(UsageError, match="unknown setting 'bottlneck'"):
        plan_cells(plan(base, methods={"adaptformer": {"bottlneck": 3}}))
    with pytest.raises(UsageError, match="give one of them"):
        plan_cells(plan(base, label_fractions=[0.1], shots=[5]))
    cells = plan_cells(plan(base, shots=[5, 10], seeds=[0, 1]))
    assert [dict(cell.labels)["labels"] for cell in cells[:4]] == ["5 per class"] * 2 + ["10 per class"] * 2
    assert cells[0].settings["settings"]["shots"] == 5


def test_rows_are_means_over_the_seeds_that_worked():
    def outcome(seed, score, error=None):
        figures = {"score": score, "measure": "kappa", "trained_parameters": 10, "parameters": 1000, "seconds": 2.0}
        figures |= {"file_bytes": 100}
        return Outcome(Cell({"method": "m", "labels": "1", "seed": str(seed)}, {}), {} if error else figures, error)

    [row] = summarise([outcome(0, 0.5), outcome(1, 0.7), outcome(2, 0.0, "gone")])
    assert row["mean"] == pytest.approx(0.6)
    assert row["seeds"] == 2
    assert row["share"] == pytest.approx(0.01)
    assert row["failed"] == "gone"
    half = 12.706 * 0.1414213562 / 2**0.5  # Student's t at one degree of freedom
    assert row["high"] - row["mean"] == pytest.approx(half, rel=1e-3)
