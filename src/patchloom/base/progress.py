"""How far long work has come: a live bar on a terminal, plain lines with rate and time left elsewhere.

The bar is tqdm's; the lines are ours. Lightning's own bars (tqdm's or rich's) rewrite themselves in log files too, and
count its batches, which are neither optimiser steps nor begin where a resumed run does.

>>> list(track([1, 2, 3], "counting"))
[1, 2, 3]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY_SECONDS = 15.0


class Ticker:
    """Says when a line is due, and what rate and time left are.

    Args:
        total: Steps in all, None where that is not known.
        first: Steps done before.
        every_seconds: Between lines; default: 15.
    """

    def __init__(self, total: int | None, first: int = 0, every_seconds: float | None = None) -> None:
        self.total, self.first = total, first
        self.every_seconds = EVERY_SECONDS if every_seconds is None else every_seconds
        self.started = self.reported = time.monotonic()

    def due(self, done: int) -> bool:
        """Return whether it is time for a line: every so many seconds, and at the end of what took that long."""
        now = time.monotonic()
        if now - self.reported < self.every_seconds and (done != self.total or self.reported == self.started):
            return False
        self.reported = now
        return True

    def line(self, what: str, done: int, unit: str | None, more: str = "") -> str:
        """Return `what 120/500  3.1 images/s  2 min 3 s left`; without a unit no rate."""
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        parts = [f"{what} {done}" + (f"/{self.total}" if self.total is not None else "")]
        parts += [more] if more else []
        parts += [f"{rate:.{0 if rate >= 10 else 2}f} {_several(unit)}/s"] if unit else []
        if self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - done) / rate)} left")
        return "  ".join(parts)


class Meter:
    """Shows on stderr how far work has come: a bar on a terminal, lines elsewhere.

    Args:
        what: The work.
        total: Units in all, None where that is not known.
        unit: Name of one; None: lines leave the rate out.
        first: Units done before.
        stays: Whether the bar stays, and a last line is printed however short the work was.
    """

    def __init__(
        self, what: str, total: int | None, *, unit: str | None = "image", first: int = 0, stays: bool = False
    ) -> None:
        self.what, self.unit, self.stays = what, unit, stays
        self.ticker = Ticker(total, first)
        self.bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(desc=what, total=total, initial=first, unit=unit or "step", leave=stays, dynamic_ncols=True)

    def reach(self, done: int, more: Callable[[], str] = lambda: "") -> None:
        """Show so many units done.

        Args:
            done: Of all.
            more: Returns what else belongs beside them.
        """
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            self.bar.set_postfix_str(more(), refresh=False)
        elif self.ticker.due(done) or (self.stays and done == self.ticker.total):
            print(self.ticker.line(self.what, done, self.unit, more()), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def track(
    items: Iterable[T],
    what: str,
    *,
    unit: str = "image",
    total: int | None = None,
    show: bool = True,
    say: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yield the items; say how far it has come, on stderr.

    Args:
        items: What is worked through.
        what: The work, for the line.
        unit: Name of one item.
        total: How many there are; default: the length of `items`, where it has one.
        show: False to say nothing.
        say: Returns what else belongs into the line.
    """
    if total is None and isinstance(items, Sized):
        with suppress(TypeError):  # a loader of a stream
            total = len(items)
    if not show:
        yield from items
        return
    meter = Meter(what, total, unit=unit)
    try:
        for done, item in enumerate(items, 1):
            yield item
            meter.reach(done, say or str)
    finally:
        meter.close()


def duration(seconds: float) -> str:
    """Return a duration as a person says it.

    >>> duration(75), duration(3 * 3600 + 120)
    ('1 min 15 s', '3 h 2 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _several(unit: str) -> str:
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"
