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


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three names that are near one: those of which it is a word, then those spelled alike.

    >>> near_names("steps", ["eps", "max_steps", "epochs"])
    ['max_steps', 'eps', 'epochs']
    """
    known = list(known)
    holding = [other for other in known if name in other.split("_")]
    return list(dict.fromkeys([*holding, *get_close_matches(name, known, n=3, cutoff=0.5)]))[:3]


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Return the error for a `name` that is not among `choices`, naming the nearest ones.

    >>> print(unknown_name("method", "ccvti", ["ccvit", "mae"]))
    unknown method 'ccvti'; did you mean ccvit? (known: ccvit, mae)
    """
    known = sorted(set(choices))
    near = near_names(name, known)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    listing = f" (known: {', '.join(known)})" if len(known) <= 20 else ""
    return UsageError(f"unknown {kind} {name!r}{hint}{listing}")
