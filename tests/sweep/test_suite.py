"""The suite: every combination measured, failures kept apart, started again where it stopped."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from patchloom import cli, evaluate
from patchloom.errors import UsageError
from patchloom.evaluate import run as running
from patchloom.sweep.suite import plan_cells, suite

PLAN = {
    "encoders": {"pixels": "pixels", "random": {"encoder": "ccvit_tiny_patch8_64", "untrained": True}},
    "data": {"digits": {"train": "digits", "test": "digits:test", "image_size": 16}},
    "protocols": {"knn": {"k": 5}, "1-nn": {"protocol": "knn", "k": 1}},
    "defaults": {"num_workers": 0},
}


def written(folder, plan):
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(plan))
    return str(file)


def test_every_combination_is_measured_and_what_fails_is_apart(tmp_path):
    plan = {**PLAN, "encoders": {"pixels": "pixels", "nothing": "no_such_model"}}
    text = suite(written(tmp_path, plan), str(tmp_path / "out"))
    assert text.count("\n") == 5
    with (tmp_path / "out" / "suite.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = {(row["protocol"], row["encoder"]): row for row in rows}
    direct = evaluate("knn", encoder="pixels", train="digits", test="digits:test", image_size=16, k=5, num_workers=0)
    assert float(scores["knn", "pixels"]["score"]) == pytest.approx(direct["accuracy"])
    assert float(scores["knn", "pixels"]["low"]) < direct["accuracy"] < float(scores["knn", "pixels"]["high"])
    assert "no_such_model" in scores["knn", "nothing"]["failed"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64" in html
    assert "no_such_model" in html


def test_what_is_measured_already_is_not_measured_again(tmp_path, monkeypatch):
    file = written(tmp_path, {**PLAN, "encoders": {"pixels": "pixels"}})
    first = suite(file, str(tmp_path / "out"))
    monkeypatch.setattr(running, "measure", lambda *args: pytest.fail("measured again"))
    assert suite(file, str(tmp_path / "out")) == first


def test_encoders_are_compared_in_pairs_on_the_same_images(tmp_path):
    plan = {**PLAN, "protocols": {"knn": {"k": 5}, "health": {}}}
    plan["data"] = {"digits": {**PLAN["data"]["digits"], "protocols": ["knn"]}}
    text = suite(written(tmp_path, plan), str(tmp_path / "out"))
    with (tmp_path / "out" / "differences.csv").open() as file:
        (row,) = csv.DictReader(file)
    direct = {
        name: evaluate("knn", train="digits", test="digits:test", image_size=16, k=5, num_workers=0, **settings)
        for name, settings in {"pixels": {"encoder": "pixels"}, "random": PLAN["encoders"]["random"]}.items()
    }
    assert (row["first"], row["second"]) == ("pixels", "random")
    assert float(row["difference"]) == pytest.approx(direct["random"]["accuracy"] - direct["pixels"]["accuracy"])
    assert float(row["low"]) < float(row["difference"]) < float(row["high"]) < 0  # untrained is far below pixels
    assert float(row["p, Holm"]) == float(row["p"]) < 0.01  # a single comparison needs no correction
    assert "difference (second - first)" in text
    assert "difference (second - first)" in (tmp_path / "out" / "report.html").read_text()


def test_cells_carry_the_settings_of_all_their_parts():
    cells = plan_cells(PLAN)
    assert len(cells) == 4
    assert cells[-1].settings == {
        "num_workers": 0,
        "encoder": "ccvit_tiny_patch8_64",
        "untrained": True,
        "train": "digits",
        "test": "digits:test",
        "image_size": 16,
        "protocol": "knn",
        "k": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": {"knnn": {}}}, "did you mean knn"),
        ({"protocols": {"knn": 5}}, "knn is 5; give its settings as a mapping"),
        ({"data": {"digits": {"train": "digits", "test": "digits:test", "protocols": ["kn"]}}}, "did you mean knn"),
    ],
)
def test_bad_recipes_are_refused_before_anything_runs(change, message):
    with pytest.raises(UsageError, match=message):
        plan_cells({**PLAN, **change})


def test_from_the_command_line(tmp_path, capsys):
    file = written(tmp_path, {**PLAN, "encoders": {"pixels": "pixels"}, "protocols": {"knn": {}}})
    assert cli.main(["evaluate", "suite", file, "--out", str(tmp_path / "out")]) == 0
    assert "| digits | knn | pixels |" in capsys.readouterr().out
    assert cli.main(["evaluate", "suite", file, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"][0]["protocol"] == "knn"
    assert 0 < printed["results"][0]["score"] <= 1
    assert printed["differences"] == []
    assert cli.main(["evaluate", "suite", "missing.yaml", "--out", str(tmp_path / "out2")]) == 2
    assert "there is no file missing.yaml" in capsys.readouterr().err
