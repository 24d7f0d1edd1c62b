"""One way to be stopped, whoever asks: Ctrl-C, SIGTERM (docker stop, systemd, preemption), SIGUSR1 (schedulers).

Inside `stoppable` a signal raises `Stopped`, which ends a command at once with exit code 128 + its number. What has
work to save asks for a delay instead: after `defer` the first signal is only noted (`received`), and a second one
raises. Processes that another of ours has started only take note: the one that started them decides.

>>> with stoppable():
...     try:
...         signal.raise_signal(signal.SIGTERM)
...     except Stopped as stop:
...         print(stop, stop.exit_code)
stopped by SIGTERM 143
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

SOON = 0.05
"""Seconds until a signal is sent once more that came where exceptions are dropped."""
WATCHED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked for the end.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it: 130, 143 or 138."""
        return 128 + self.number


class _State:
    """What this process knows of signals."""

    received: int | None = None
    words: str | None = None
    pass_on: Callable[[int], Any] | None = None
    before: dict[int, Any] | None = None
    again: threading.Timer | None = None


def received() -> int | None:
    """Return the signal that asked for the end, if one did."""
    return _State.received


def is_helper() -> bool:
    """Return whether another process of ours has started this one to share the work."""
    return os.environ.get("LOCAL_RANK", "0") != "0" or multiprocessing.parent_process() is not None


@contextmanager
def stoppable() -> Iterator[None]:
    """Watch the signals meanwhile; inside another such block, and outside the main thread, nothing changes."""
    if _State.before is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.received = _State.words = _State.pass_on = None
    before = sys.unraisablehook
    watch()
    sys.unraisablehook = partial(_raise_elsewhere, before)
    try:
        yield
    finally:
        sys.unraisablehook = before
        _give_back()


def _raise_elsewhere(otherwise: Callable[[Any], Any], lost: Any) -> None:
    """Send a signal once more that came where Python drops exceptions: in finalisers and callbacks of the collector."""
    if not isinstance(lost.exc_value, Stopped):
        otherwise(lost)
        return
    _State.again = threading.Timer(SOON, _send_again, (lost.exc_value.number,))
    _State.again.daemon = True
    _State.again.start()


def _send_again(number: int) -> None:
    if _State.before is not None:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _give_back() -> None:
    if _State.again is not None:
        _State.again.cancel()
        _State.again = None
    for number, handler in (_State.before or {}).items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _State.before = _State.received = None
    end_deferral()


def watch() -> None:
    """Take over the signals, and let through what was held back; SIGUSR1 under SLURM is left to Lightning's requeue."""
    if threading.current_thread() is not threading.main_thread():
        return
    watched = [n for n in WATCHED if n in (signal.SIGINT, signal.SIGTERM) or "SLURM_JOB_ID" not in os.environ]
    before = {number: signal.signal(number, _handle) for number in watched}
    if _State.before is None:
        _State.before = before
    release()


def defer(words: str, pass_on: Callable[[int], Any] | None = None) -> None:
    """From here on the first signal is only noted; called again, it changes what is said.

    Args:
        words: What is then said.
        pass_on: Called with its number, for processes that have to hear of it.

    Raises:
        Stopped: One has come already.
    """
    if _State.words is None and _State.received is not None and not is_helper():
        raise Stopped(_State.received)
    _State.words, _State.pass_on = words, pass_on


def end_deferral() -> None:
    """From here on a signal ends the work at once again."""
    _State.words = _State.pass_on = None


@contextmanager
def finishing(words: str) -> Iterator[None]:
    """Defer a signal meanwhile; whoever works inside asks `received` after each step."""
    defer(words)
    try:
        yield
    finally:
        end_deferral()


def hold() -> None:
    """Keep signals back, here and in processes that are started from now on, until each watches them itself."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)


def release() -> None:
    """Let through what was kept back."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


@contextmanager
def through_lightning() -> Iterator[None]:
    """Let `Stopped` out of a Lightning trainer, which answers it with `sys.exit(1)`."""
    try:
        yield
    except SystemExit as end:
        if _State.received is None:
            raise
        raise Stopped(_State.received) from end


def run_child(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end; a signal is passed on to it, and it may save its work. A second one kills it.

    Returns:
        Its exit code and what it said on standard error.

    Raises:
        Stopped: A signal came, here or there.
    """
    # In a group of its own: Ctrl-C reaches whole groups, and the second of two signals ends a run at once.
    group: dict[str, Any] = {"process_group": 0} if hasattr(os, "setpgid") else {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **group) as child:
        try:
            try:
                _, stderr = child.communicate()
            except Stopped as stop:
                child.send_signal(stop.number)
                child.communicate()
                raise
        except BaseException:
            child.kill()
            raise
    if child.returncode - 128 in WATCHED:
        raise Stopped(child.returncode - 128)
    return subprocess.CompletedProcess(command, child.returncode, None, stderr)


def _handle(number: int, frame: FrameType | None) -> None:
    first = _State.received is None
    if first:
        _State.received = number
    if is_helper():
        return
    if first and _State.words is not None:
        print(f"\n{_State.words} (once more: now) …", file=sys.stderr, flush=True)
        if _State.pass_on is not None:
            _State.pass_on(number)
        return
    raise Stopped(number)
