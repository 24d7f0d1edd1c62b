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
