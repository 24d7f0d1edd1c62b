"""The runs below a folder in one table."""

import json
import os
import time
from pathlib import Path

import pytest

from patchloom.cli import main
from patchloom.errors import UsageError
from patchloom.sweep.runs import compare_runs, list_runs

OLD = time.time() - 10_000


def write_run(folder: Path, command: str = "pretrain mae", changed: float = OLD, **values: object) -> Path:
    folder.mkdir(parents=True)
    lr, steps = values.pop("lr", 0.1), values.pop("steps", 10)
    (folder / "config.yaml").write_text(f"# patchloom {command} --config config.yaml\ndata: photos\nlr: {lr}\n")
    rows = "".join(f"{step},{1 / (step + 1)}\n" for step in range(steps))
    (folder / "metrics.csv").write_text(f"step,loss\n{rows}")
    if values.pop("summary", True):
        known = {"steps": steps, "total_steps": 10, "interrupted": steps < 10, "loss": 0.5, **values}
        (folder / "summary.json").write_text(json.dumps(known))
    for file in folder.iterdir():
        os.utime(file, (changed, changed))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "done", accuracy=0.7, changed=OLD + 1)
    write_run(tmp_path / "deep" / "better", "adapt lora", accuracy=0.9, lr=0.2)
    write_run(tmp_path / "stopped", steps=4)
    write_run(tmp_path / "going", summary=False, steps=6, changed=time.time())
    (write_run(tmp_path / "broken", summary=False, steps=3) / "failure.json").write_text("{}")
    inner = tmp_path / "done" / "model"  # what lies within a run is its own
    write_run(inner / "lineage", accuracy=1.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("not: ours\n")
    return tmp_path


def test_every_run_is_listed_once_with_its_state(runs: Path) -> None:
    rows = {row["run"]: row for row in list_runs(str(runs))}
    states = {name: (row["state"], row["steps"]) for name, row in rows.items()}
    assert states == {
        "done": ("finished", 10),
        "deep/better": ("finished", 10),
        "stopped": ("stopped", "4/10"),
        "going": ("running", 6),
        "broken": ("failed", 3),
    }
    assert next(iter(rows)) == "going"  # the latest first
    assert rows["deep/better"]["command"] == "adapt lora"


def test_runs_are_sorted_by_a_figure_and_chosen_by_state(runs: Path) -> None:
    rows = list_runs(str(runs), sort="accuracy", state="finished")
    assert [row["run"] for row in rows] == ["deep/better", "done"]
    with pytest.raises(UsageError, match="has the figure speed"):
        list_runs(str(runs), sort="speed")
    with pytest.raises(UsageError, match="has the figure speed; they have"):
        list_runs(str(runs), figures="speed")
    with pytest.raises(UsageError, match="no run of patchloom"):
        list_runs(str(runs / "other"))


def test_what_was_set_differently_and_the_curves(runs: Path) -> None:
    out = runs / "compared"
    result = compare_runs(f"{runs / 'done'},{runs / 'deep' / 'better'}", out=str(out))
    assert [row["accuracy"] for row in result["runs"]] == [0.7, 0.9]
    assert result["settings"] == [{"setting": "lr", "done": 0.1, "better": 0.2}]
    assert "Curves" in (out / "report.html").read_text()
    with pytest.raises(UsageError, match="overwrite"):
        compare_runs(f"{runs / 'done'},{runs / 'stopped'}", out=str(out))
    with pytest.raises(UsageError, match="no run of patchloom"):
        compare_runs(f"{runs / 'done'},{runs / 'other'}")


def test_the_command_prints_a_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", str(runs), "--figures", "accuracy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["run", "command"]
    assert len(lines) == 6
