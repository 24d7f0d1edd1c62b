"""Classes are divided into tasks; what cannot be is refused in a sentence."""

from __future__ import annotations

import pytest

from patchloom.errors import UsageError
from patchloom.systems.gcab.tasks import plan, read_plan

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def test_classes_are_divided_in_order_and_the_first_tasks_take_what_is_over():
    assert plan(NAMES, 2) == [["ant", "bee", "cat"], ["dog", "eel"]]
    assert plan(NAMES, 5) == [[name] for name in NAMES]
    assert plan(NAMES, 2, order="eel, ant,bee") == [["eel", "ant"], ["bee"]]


def test_an_order_of_a_seed_has_every_class_once():
    drawn = [plan(NAMES, 5, order="seed", seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(name for task in drawn[2] for name in task) == NAMES


def test_a_file_names_the_classes_of_each_task(tmp_path):
    (tmp_path / "tasks.yaml").write_text("- [cat]\n- [dog, ant, bee]\n")
    assert read_plan(tmp_path / "tasks.yaml", NAMES) == [["cat"], ["dog", "ant", "bee"]]
    (tmp_path / "numbers.yaml").write_text("- [1, 0]\n- [2]\n")
    assert read_plan(tmp_path / "numbers.yaml", ["0", "1", "2"]) == [["1", "0"], ["2"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- [cat]\n- []\n", "task 2 has no classes"),
        ("- [cat, dog]\n- [cat]\n", "the class cat is in task 1 and in task 2"),
        ("- [cat, lion]\n", "unknown class 'lion'"),
        ("- [cat, ant]\n", "the class ant was learnt in an earlier task"),
        ("cat: dog\n", "holds no list of tasks"),
        ("- [cat", "cannot be read"),
    ],
)
def test_tasks_that_cannot_be_learnt_are_refused(tmp_path, text, said):
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_plan(tmp_path / "tasks.yaml", NAMES, learnt=["ant"])


def test_more_tasks_than_classes_and_a_file_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match="tasks is 6 and there are 5 classes, so a task would be empty"):
        plan(NAMES, 6)
    with pytest.raises(UsageError, match="the class bee is twice"):
        plan(NAMES, 2, order="bee,ant,bee")
    with pytest.raises(UsageError, match="does not exist"):
        read_plan(tmp_path / "none.yaml", NAMES)
