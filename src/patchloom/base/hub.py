"""What the Hugging Face hub says while weights and data sets are fetched, in one line instead of a dozen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HUB = "huggingface_hub"


class _OneLine(logging.Filter):
    """Lets errors through; the first sign of trouble becomes a line for people, the others are dropped."""

    warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown as it is."""
        if record.levelno >= logging.ERROR:
            return True
        if record.levelno == logging.WARNING and not self.warned and "Retrying in" in record.getMessage():
            self.warned = True
            print("the Hugging Face hub does not answer; trying for a minute …", file=sys.stderr, flush=True)
        return False


@contextmanager
def fetching() -> Iterator[None]:
    """Keep what the hub's client says of its attempts to itself meanwhile, but for one line where it has to wait."""
    import huggingface_hub.utils  # noqa: F401 - makes the handler

    quiet = _OneLine()
    handlers = logging.getLogger(HUB).handlers
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)


def reason(error: BaseException) -> str:
    """Return why something could not be fetched: what the system says of the network, else the error's words.

    >>> reason(FileNotFoundError("no such\\nrevision"))
    'FileNotFoundError: no such revision'
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for one in chain:
        if type(one).__name__ in ("ConnectError", "ConnectTimeout", "gaierror", "OfflineModeIsEnabled"):
            return f"no connection: {' '.join(str(one).split())[:100]}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
