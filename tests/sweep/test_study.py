"""Studies: what is done is kept, what fails does not take the rest along."""

from __future__ import annotations

import json

import pytest

from patchloom.errors import UsageError
from patchloom.sweep.study import Cell, claim_folder, markdown, read_recipe, run_cells, write_csv

CELLS = [Cell({"name": name}, {"value": value}) for name, value in (("a", 1), ("b", 2), ("c", 3))]


def quiet(line: str) -> None:
    """Say nothing."""


def test_a_cell_that_fails_is_noted_and_the_others_are_done(tmp_path):
    def work(cell):
        if cell.settings["value"] == 2:
            raise ValueError("no\nway")
        return {"double": 2 * cell.settings["value"]}

    outcomes = run_cells(CELLS, work, tmp_path, say=quiet)
    assert [outcome.error for outcome in outcomes] == [None, "no way", None]
    assert outcomes[2].figures == {"double": 6}


def test_what_is_done_is_kept_and_what_failed_is_tried_again(tmp_path):
    calls = []

    def work(cell):
        calls.append(cell.labels["name"])
        if cell.labels["name"] == "b" and calls.count("b") == 1:
            raise ValueError("first time")
        return {"n": len(calls)}

    run_cells(CELLS, work, tmp_path, say=quiet)
    outcomes = run_cells(CELLS, work, tmp_path, say=quiet)
    assert calls == ["a", "b", "c", "b"]
    assert all(outcome.error is None for outcome in outcomes)


def test_killed_in_the_middle_it_goes_on(tmp_path):
    def work(cell):
        if cell.labels["name"] == "b":
            raise KeyboardInterrupt
        return {"done": True}

    with pytest.raises(KeyboardInterrupt):
        run_cells(CELLS, work, tmp_path, say=quiet)
    calls = []
    run_cells(CELLS, lambda cell: calls.append(str(cell)) or {}, tmp_path, say=quiet)
    assert calls == ["b", "c"]


def test_changed_settings_and_half_written_files_are_computed_anew(tmp_path):
    run_cells(CELLS[:1], lambda cell: {"x": 1}, tmp_path, say=quiet)
    changed = [Cell({"name": "a"}, {"value": 7})]
    assert run_cells(changed, lambda cell: {"x": 2}, tmp_path, say=quiet)[0].figures == {"x": 2}
    next(tmp_path.glob(f"cells/{changed[0].name}.json")).write_text('{"figures": ')
    assert run_cells(changed, lambda cell: {"x": 3}, tmp_path, say=quiet)[0].figures == {"x": 3}


def test_two_cells_of_one_name_are_refused(tmp_path):
    with pytest.raises(UsageError, match="two entries of the study are called a"):
        run_cells([CELLS[0], Cell({"name": "a"}, {"value": 9})], lambda cell: {}, tmp_path, say=quiet)


def test_a_folder_of_something_else_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="exists and holds no study"):
        claim_folder(tmp_path, {})
    folder = claim_folder(tmp_path / "new", {"a": 1})
    assert claim_folder(folder, {"a": 2}) == folder


def test_recipes_are_checked(tmp_path):
    file = tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match="there is no file"):
        read_recipe(file, ["a"], ["a"])
    file.write_text("methds: {}\n")
    with pytest.raises(UsageError, match="did you mean methods"):
        read_recipe(file, ["methods"], ["methods"])
    file.write_text("methods:\n")
    with pytest.raises(UsageError, match="lacks methods"):
        read_recipe(file, ["methods"], ["methods"])


def test_tables(tmp_path):
    rows = [{"a": "x|y", "b": 1.0}, {"a": "z", "c": None}]
    assert markdown(rows).splitlines()[2] == "| x\\|y | 1 |  |"
    assert write_csv(tmp_path / "t.csv", rows).read_text() == "a,b,c\nx|y,1.0,\nz,,\n"
    assert json.dumps(rows)
