"""metrics.csv: readable at any moment, continued on resume."""

from __future__ import annotations

import pytest

from patchloom.training.metrics import CSVMetrics, read_metrics, series


def test_values_of_a_step_share_a_row_and_late_columns_fit_in(tmp_path):
    log = CSVMetrics(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 2.0}, step=0)
    log.log_metrics({"lr": 0.1}, step=0)
    log.log_metrics({"loss": 1.0, "knn_accuracy": 0.5}, step=20)
    log.save()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows == [{"step": 0, "loss": 2.0, "lr": 0.1}, {"step": 20, "loss": 1.0, "knn_accuracy": 0.5}]
    assert series(rows, "knn_accuracy") == ([20], [0.5])


def test_a_resumed_run_forgets_what_it_will_do_again(tmp_path):
    log = CSVMetrics(tmp_path / "metrics.csv")
    for step in (0, 10, 20, 30):
        log.log_metrics({"loss": float(step)}, step=step)
    log.save()
    again = CSVMetrics(tmp_path / "metrics.csv")
    again.forget_after(20)
    again.log_metrics({"loss": -1.0}, step=20)
    again.save()
    assert series(read_metrics(tmp_path / "metrics.csv"), "loss") == ([0, 10, 20], [0.0, 10.0, -1.0])
    assert [line.split(",")[0] for line in again.path.read_text().splitlines()] == ["step", "0", "10", "20"]


@pytest.mark.parametrize("end", ["20,0.5", "20,0.5,", "\0\0\0\0", "x,y,z\n"])
def test_a_line_that_was_cut_off_is_left_out_with_a_warning(tmp_path, end):
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,loss,lr\n0,2.0,0.1\n10,1.0,\n{end}")
    with pytest.warns(UserWarning, match="is damaged; 1 of its lines are left out"):
        rows = read_metrics(path)
    assert rows == [{"step": 0, "loss": 2.0, "lr": 0.1}, {"step": 10, "loss": 1.0}]
