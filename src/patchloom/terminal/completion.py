"""Tab completion in bash, zsh and fish, by argcomplete: commands, methods, options and their choices.

    source <(patchloom completion bash)        # in ~/.bashrc; zsh alike, in ~/.zshrc
    patchloom completion fish | source         # in ~/.config/fish/config.fish

The shell asks `patchloom` itself, which answers from the tables and settings classes alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import FilesCompleter

from patchloom import registry
from patchloom.terminal.options import option_types

Options = Callable[[], Callable[..., Any]]
"""Imports what describes the options of one command, see `read_options`."""

_NAMES: dict[str, Sequence[str]] = {
    "system": list(registry.REFERENCES),
    "verb": [*registry.METHODS, "data", "references"],
}
"""Words that options of these names take, beside those whose type says so."""


class _Sources(FilesCompleter):
    """Names of data sources, and files."""

    def __call__(self, prefix: str, **context: Any) -> list[str]:
        names = [name.partition(":")[0] for name in registry.SOURCES if name[0].islower()]
        return [name for name in names if name.startswith(prefix)] + list(super().__call__(prefix, **context))


def script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """Print the script that completes commands, methods and options with the tab key.

    Args:
        shell: bash or zsh: source <(patchloom completion bash); fish: patchloom completion fish | source.
    """
    return argcomplete.shellcode(["patchloom"], shell=shell).strip()


def answer(commands: Mapping[str, Options], positional: Mapping[str, Sequence[str]]) -> None:
    """Answer the shell that asks what may follow, and end the process.

    Args:
        commands: What describes the options of each command, by its words.
        positional: Options of a command that may come as bare words first.
    """
    asked = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode(errors="ignore")
    try:
        words = shlex.split(asked)[1:]
    except ValueError:  # an open quotation mark
        words = asked.split()[1:]
    argcomplete.autocomplete(command_parser(words, commands, positional), always_complete_options="long")


def command_parser(
    words: Sequence[str], commands: Mapping[str, Options], positional: Mapping[str, Sequence[str]]
) -> argparse.ArgumentParser:
    """Return a parser that knows all commands, and the options of the one that `words` name."""
    parser = argparse.ArgumentParser(prog="patchloom", add_help=False)
    parser.add_argument("--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    _add_words(parser, (), words, commands, positional)
    return parser


def _add_words(
    parser: argparse.ArgumentParser,
    said: tuple[str, ...],
    words: Sequence[str],
    commands: Mapping[str, Options],
    positional: Mapping[str, Sequence[str]],
) -> None:
    """Let a parser know the words that may follow those that were said, or the options of the command they name."""
    name, count = " ".join(said), len(said)
    if name in commands:
        _add_options(parser, commands[name](), positional.get(name, ()))
        return
    following: Any = parser.add_subparsers()
    parts = [tuple(each.split()) for each in commands]
    for word in dict.fromkeys(part[count] for part in parts if part[:count] == said and len(part) > count):
        inner = following.add_parser(word, add_help=False)
        if list(words[: count + 1]) == [*said, word]:
            _add_words(inner, (*said, word), words, commands, positional)


def _add_options(parser: argparse.ArgumentParser, described: Callable[..., Any], positional: Sequence[str]) -> None:
    for name in ("--help", "--debug", "--json"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--config")
    for name, hint in option_types(described).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
        choices = [str(choice) for kind in kinds for choice in get_args(kind)]
        word = parser.add_argument(name, nargs="?") if name in positional else parser.add_argument(f"--{name}")
        if name in _NAMES:
            choices = [*_NAMES[name]]
        if hint is bool:
            word.nargs, choices = "?", ["true", "false"]
        if choices:
            word.choices = choices
        elif name in ("data", "train", "test", "probe_data", "images"):
            word.completer = _Sources()  # type: ignore[attr-defined]
