"""Errors meant for the person at the keyboard, and the nearest-name hint they carry."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """The request cannot be carried out as written; the message says what would be right.

    The command line prints the message alone and exits with code 2.
    """


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package}; install it with: pip install "patchloom[{extra}]"')


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Return the error for a `name` that is not among `choices`, naming the nearest ones.

    >>> print(unknown_name("method", "ccvti", ["ccvit", "mae"]))
    unknown method 'ccvti'; did you mean ccvit? (known: ccvit, mae)
    """
    known = sorted(set(choices))
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    listing = f" (known: {', '.join(known)})" if len(known) <= 20 else ""
    return UsageError(f"unknown {kind} {name!r}{hint}{listing}")
