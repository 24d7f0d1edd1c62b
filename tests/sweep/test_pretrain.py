"""Methods under one budget: who trains what, what is measured, what a failure costs."""

from __future__ import annotations

import csv

import pytest
import yaml

from patchloom.errors import UsageError
from patchloom.sweep.pretrain import compare, plan_cells, summarise
from patchloom.sweep.study import Cell, Outcome

PLAN = {
    "data": "digits",
    "test": "digits:test",
    "encoder": "ccvit_tiny_patch4_32",
    "steps": 2,
    "seeds": [0, 1],
    "defaults": {"batch_size": 16, "num_workers": 0, "report": False, "codebook_images": 40},
    "methods": {"ccvit": {"k": 16}, "untrained": {}, "broken": {"method": "ccvit", "k": 10**9}},
    "evaluate": {"knn": {"num_workers": 0}},
}


@pytest.mark.slow
def test_methods_are_trained_alike_and_measured_alike(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({**PLAN, "seeds": [0]}))
    table = compare(str(file), str(tmp_path / "out"))
    with (tmp_path / "out" / "compare.csv").open() as opened:
        rows = {row["method"]: row for row in csv.DictReader(opened)}
    assert rows["ccvit"]["steps"] == "2"
    assert 0.05 < float(rows["ccvit"]["knn mean"]) <= 1
    assert 0.05 < float(rows["untrained"]["knn mean"]) <= 1
    assert "k is 1000000000" in rows["broken"]["failed"]
    assert "| ccvit | 1 |" in table
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 1
    assert compare(str(file), str(tmp_path / "out")) == table


def test_one_cell_per_method_and_seed():
    cells = plan_cells(PLAN)
    assert [str(cell) for cell in cells[:3]] == ["ccvit · 0", "ccvit · 1", "untrained · 0"]
    assert cells[1].settings["settings"] == {**PLAN["defaults"], "k": 16}
    assert cells[1].settings["seed"] == 1


def test_methods_there_are_not_are_refused():
    with pytest.raises(UsageError, match="did you mean ccvit"):
        plan_cells({**PLAN, "methods": {"ccvti": {}}})


@pytest.mark.parametrize("budget", [{}, {"steps": 3, "minutes": 1}])
def test_there_is_one_budget(budget, tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({**{k: v for k, v in PLAN.items() if k != "steps"}, **budget}))
    with pytest.raises(UsageError, match="either steps or minutes"):
        compare(str(file), str(tmp_path / "out"))


def test_scores_are_summed_up_over_seeds():
    cells = plan_cells(PLAN)[:2]
    rows = summarise([Outcome(cell, {"knn": value}) for cell, value in zip(cells, (0.5, 0.7), strict=True)], ["knn"])
    assert rows[0]["knn mean"] == pytest.approx(0.6)
    assert rows[0]["knn low"] < 0.5 < 0.7 < rows[0]["knn high"]
    failed = summarise([Outcome(Cell({"method": "a", "seed": "0"}, {}), error="no")], ["knn"])
    assert failed == [{"method": "a", "seeds": 0, "failed": "no"}]
