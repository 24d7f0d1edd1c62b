"""Signals: ended at once where nothing is lost, after the step where something is, with exit code 128 + the signal."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest

from patchloom.base import stopping
from patchloom.cli import main
from patchloom.sweep.study import Cell, run_cells


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_ends_the_work_and_the_handlers_are_given_back(name, code):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stopping.stoppable(), pytest.raises(stopping.Stopped) as stop:
        signal.raise_signal(number)
    assert stop.value.exit_code == code
    assert signal.getsignal(number) is before
    assert stopping.received() is None


def test_what_has_work_to_save_is_told_once_and_ended_by_a_second_signal(capsys):
    with stopping.stoppable():
        with stopping.finishing("stopping after this step"):
            signal.raise_signal(signal.SIGTERM)
            assert stopping.received() == signal.SIGTERM
            assert "stopping after this step (once more: now) …" in capsys.readouterr().err
            with pytest.raises(stopping.Stopped):
                signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stopping.Stopped):  # one that came before: nothing is begun
            stopping.defer("too late")


def test_a_process_that_helps_another_only_takes_note(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with stopping.stoppable():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stopping.received() == signal.SIGTERM


def test_signals_held_back_arrive_when_they_are_let_through():
    with stopping.stoppable():
        stopping.hold()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.received() is None
        with pytest.raises(stopping.Stopped):
            stopping.release()


def test_lightnings_way_out_of_an_interruption_is_not_the_exit_code():
    def as_lightning_does() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            sys.exit(1)

    with stopping.stoppable(), pytest.raises(stopping.Stopped), stopping.through_lightning():
        as_lightning_does()
    with pytest.raises(SystemExit), stopping.through_lightning():
        sys.exit(1)


def test_a_signal_that_comes_where_exceptions_are_dropped_comes_again(capsys):
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    hook = sys.unraisablehook
    with stopping.stoppable():
        Finalised()
        with pytest.raises(stopping.Stopped, match="SIGTERM"):
            time.sleep(10)
    assert sys.unraisablehook is hook
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_command_line_says_what_ended_it(monkeypatch, capsys):
    monkeypatch.setattr("patchloom.cli._dispatch", lambda arguments: signal.raise_signal(signal.SIGTERM))
    assert main(["list"]) == 143
    assert capsys.readouterr().err == "patchloom: stopped by SIGTERM\n"


def test_a_swallowed_signal_and_a_failure_for_it_are_no_success(monkeypatch):
    def swallowed(arguments: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            if "fail" in arguments:
                raise RuntimeError("a data worker was killed") from None
        return 0

    monkeypatch.setattr("patchloom.cli._dispatch", swallowed)
    assert [main([]), main(["fail"])] == [143, 143]


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_a_child_hears_of_a_signal_and_may_end_in_order():
    threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()
    started = time.monotonic()
    with stopping.stoppable(), pytest.raises(stopping.Stopped, match="stopped by SIGTERM"):
        stopping.run_child([sys.executable, "-c", CHILD])
    assert time.monotonic() - started < 30


def test_a_child_that_was_signalled_itself_stops_its_parent():
    with pytest.raises(stopping.Stopped, match="stopped by SIGUSR1"):
        stopping.run_child([sys.executable, "-c", "raise SystemExit(138)"])
    assert stopping.run_child([sys.executable, "-c", "raise SystemExit(1)"]).returncode == 1


def test_a_study_stops_where_a_cell_fails_for_a_signal(tmp_path):
    def work(cell: Cell) -> dict[str, int]:
        try:
            signal.raise_signal(signal.SIGTERM)
        except stopping.Stopped:
            raise RuntimeError("its data worker died") from None
        return {}

    cells = [Cell({"name": name}, {}) for name in "ab"]
    with stopping.stoppable(), pytest.raises(stopping.Stopped):
        run_cells(cells, work, tmp_path, say=lambda line: None)
    assert not list((tmp_path / "cells").iterdir())
