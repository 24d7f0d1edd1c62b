"""Figures for a person and for a program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from patchloom.terminal.printing import MOST_ROWS, figures, report, table

FIGURES = {
    "protocol": "knn",
    "score": np.float32(0.875),
    "interval": [0.8, 0.9],
    "preset": None,
    "untrained": False,
    "skipped": [],
    "per_class_accuracy": {"cat": 1.0, "dog": 0.75},
    "scores": [{"encoder": "a", "score": 0.5}, {"encoder": "longer", "score": 0.25, "n": 3}],
}


def test_a_person_sees_aligned_names_then_tables():
    assert figures(FIGURES).splitlines() == [
        "protocol   knn",
        "score      0.875",
        "interval   0.8, 0.9",
        "preset     -",
        "untrained  no",
        "skipped    none",
        "",
        "per_class_accuracy:",
        "  cat  1",
        "  dog  0.75",
        "",
        "scores:",
        "  encoder  score  n",
        "  a        0.5    -",
        "  longer   0.25   3",
    ]


def test_mappings_of_mappings_are_a_table():
    assert figures({"models": {"a": {"n": 1}, "b": {"n": 22}}}).splitlines()[1:] == ["     n", "  a  1", "  b  22"]


def test_long_tables_are_counted():
    shown = table([{"n": number} for number in range(MOST_ROWS + 7)]).splitlines()
    assert len(shown) == MOST_ROWS + 2
    assert shown[-1] == "… and 7 more (--json has all)"


@dataclass
class Made:
    path: Path
    summary: dict[str, float]

    def __str__(self) -> str:
        return f"done: {self.path}"


@pytest.mark.parametrize(
    ("result", "as_json", "expected"),
    [
        (FIGURES, True, {**FIGURES, "score": 0.875}),
        (Made(Path("a"), {"x": 1.0}), True, {"path": "a", "summary": {"x": 1.0}}),
        ("file.npz", True, "file.npz"),
        (Made(Path("a"), {}), False, "done: a\n"),
        ("file.npz", False, "file.npz\n"),
        (None, True, ""),
    ],
)
def test_json_for_a_program(result, as_json, expected, capsys):
    report(result, as_json)
    printed = capsys.readouterr().out
    assert (json.loads(printed) if as_json and printed else printed) == expected


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    report({"n": 1}, as_json=False)
    assert capsys.readouterr().out == ""
