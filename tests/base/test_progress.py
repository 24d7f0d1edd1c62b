"""Lines on how far a long loop has come, where output is no terminal."""

from __future__ import annotations

import pytest

from patchloom.base import progress


@pytest.mark.parametrize(("unit", "shown"), [("image", "images/s"), ("batch", "batches/s")])
def test_lines_have_the_rate_in_their_unit_and_the_time_left(unit, shown, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    assert list(progress.track(range(3), "features", unit=unit)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("features 3/3")
    assert lines[-1].endswith("left")
    assert all(shown in line for line in lines)


def test_a_bar_is_drawn_on_a_terminal_and_counts_from_where_work_went_on(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    meter = progress.Meter("step", 10, unit=None, first=4, stays=True)
    meter.reach(7, lambda: "loss 0.5")
    meter.close()
    drawn = capsys.readouterr().err.split("\r")[-1]
    assert "7/10" in drawn
    assert "loss 0.5" in drawn


def test_a_line_that_stays_comes_at_the_end_of_short_work_too(capsys):
    for stays in (False, True):
        meter = progress.Meter("step", 3, unit=None, stays=stays)
        for done in (1, 2, 3):
            meter.reach(done, lambda: "loss 0.5")
    assert capsys.readouterr().err == "step 3/3  loss 0.5  0 s left\n"
