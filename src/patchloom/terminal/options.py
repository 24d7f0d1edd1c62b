"""The options of a command: read from the fields or arguments that carry it out, whose docstrings are their help.

>>> from patchloom.evaluate.knn_config import KNNConfig
>>> given = ["--encoder", "pixels", "--train", "digits", "--test", "digits:test", "--k", "5"]
>>> read_options("evaluate knn", "", KNNConfig, given)["k"]
5
"""

from __future__ import annotations

import re
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import reduce
from inspect import Parameter, signature
from operator import or_
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from patchloom.base.settings import Cited, done_without
from patchloom.base.sizes import is_sides, is_size, parse_sides, parse_size
from patchloom.errors import UsageError, near_names
from patchloom.terminal.groups import grouped

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# A page with fewer options needs no headings.
FEW = 12


def read_options(
    name: str,
    summary: str,
    described: Callable[..., Any],
    given: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    *,
    all_of_them: bool = True,
) -> dict[str, Any]:
    """Return the options of a command by name.

    Args:
        name: The command, without `patchloom`.
        summary: What it does, for its help page.
        described: Settings class or function; its fields or arguments are the options.
        given: The words after the command.
        defaults: Instead of those of `described`.
        all_of_them: Return the defaults of options that were left out, too.

    Raises:
        UsageError: An option there is not (with the nearest), a missing one, or a value of the wrong kind.
        SystemExit: The help page was asked for and has been printed.
    """
    hints = option_types(described)
    given = [_underscored(word) for word in given]
    _refuse_unknown(name, given, hints)
    parser = _parser(name, summary, described, hints)
    if defaults:
        parser.set_defaults(dict(defaults))
    return _parse(parser, given, hints, all_of_them)


def option_types(described: Callable[..., Any]) -> dict[str, Any]:
    """Return the type of each option of a settings class or function, without its range."""
    return {
        name: reduce(or_, get_args(hint)) if get_origin(hint) is Union else hint
        for name, hint in get_type_hints(described).items()
        if name != "return" and not str(hint).startswith("typing.ClassVar")
    }


def help_texts(described: Callable[..., Any]) -> dict[str, str]:
    """Return the help text of each option: an argument's in the docstring; a field's below it and the recipe's note."""
    from docstring_parser import parse, parse_from_object

    if not isinstance(described, type):
        return {about.arg_name: about.description or "" for about in parse(described.__doc__ or "").params}
    texts: dict[str, str] = {}
    notes: dict[str, str] = {}
    for base in reversed(described.__mro__[:-1]):
        own = {about.arg_name: about.description or "" for about in parse_from_object(base).params}
        texts |= own
        recipe = vars(base).get("RECIPE", {})
        notes |= dict.fromkeys(own, "")
        notes |= {name: default.note if isinstance(default, Cited) else "" for name, default in recipe.items()}
    return {name: f"{text}; {notes[name]}" if notes[name] else text for name, text in texts.items()}


def with_positionals(positional: tuple[str, ...], rest: list[str]) -> list[str]:
    """Give leading bare words the names of the options they stand for (`patchloom embed MODEL --data …`).

    Raises:
        UsageError: There are more words than names.
    """
    bare = 0
    while bare < len(rest) and not rest[bare].startswith("-"):
        bare += 1
    if bare > len(positional):
        raise UsageError(f"unexpected argument {rest[len(positional)]!r}; options are written --name value")
    named = [f"--{name}={value}" for name, value in zip(positional, rest[:bare], strict=False)]
    return named + rest[bare:]


def option(rest: Sequence[str], name: str) -> str | None:
    """Return the value of an option as it was typed; the last one counts."""
    value = None
    for argument, following in zip(rest, [*rest[1:], None], strict=True):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _refuse_unknown(name: str, given: Sequence[str], hints: Mapping[str, Any]) -> None:
    for word in given:
        spelled = word.removeprefix("--").split("=")[0]
        if word.startswith("--") and spelled.split(".")[0].removeprefix("no_") not in {*hints, "config", "help"}:
            raise UsageError(f"patchloom {name} has no option --{spelled}{_near(spelled, hints)} (--help lists them)")


def _near(spelled: str, hints: Mapping[str, Any]) -> str:
    near = near_names(spelled, hints)
    return f"; did you mean {' or '.join(f'--{name}' for name in near)}?" if near else ""


def _parser(name: str, summary: str, described: Callable[..., Any], hints: Mapping[str, Any]) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parameters = signature(described).parameters
    required = [option for option in hints if parameters[option].default is Parameter.empty]
    needed = [f"--{option} {option.upper()}" for option in required]
    parser = ArgumentParser(
        prog=f"patchloom {name}",
        usage=" ".join(["%(prog)s", *needed, "[--option value …]"]),
        description=summary,
        epilog="--json prints figures as JSON; --debug shows the traceback of an error.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    # One by one, not `add_class_arguments`, which runs the `if TYPE_CHECKING:` imports of the module: torch, mostly.
    texts = help_texts(described)
    factories = {one.name: one.default_factory for one in fields(described)} if is_dataclass(described) else {}
    for option, hint in hints.items():
        about: dict[str, Any] = {
            "type": _kind(option, hint, described),
            "help": texts.get(option, "").replace("%", "%%"),
        }
        if option in required:
            about["required"] = True
        elif (factory := factories.get(option, MISSING)) is not MISSING:
            about["default"] = factory()
        else:
            about["default"] = parameters[option].default
        parser.add_argument(f"--{option}", **about)
    for option in done_without(described):  # read from files of settings, and judged where settings are made
        parser.add_argument(f"--{option}", type=Any, default=SUPPRESS, help=SUPPRESS)
    _group(parser, required, getattr(described, "ABLATIONS", ()))
    return parser


class _SizeOption:
    """What reads a size; a help page shows how it reads."""

    def __call__(self, value: Any) -> Any:
        return parse_size(value)

    def __repr__(self) -> str:
        return "int or height,width"


class _SidesOption:
    """What reads the sides of volumes; a help page shows how it reads."""

    def __call__(self, value: Any) -> Any:
        return parse_sides(value)

    def __repr__(self) -> str:
        return "int or depth,height,width"


def _kind(option: str, hint: Any, described: Callable[..., Any]) -> Any:
    """Return what reads an option: sizes are written in several ways, and a trial settles what is `auto`."""
    if is_size(hint):
        return _SizeOption()
    if is_sides(hint):
        return _SidesOption()
    return hint | Literal["auto"] if option in getattr(described, "SETTLED", ()) else hint


def _group(parser: ArgumentParser, required: Sequence[str], ablations: Sequence[str]) -> None:
    """Put the options under the headings of `terminal.groups`, where there are many."""
    actions = {action.dest: action for action in parser._actions if action.dest != "print_config"}
    groups = grouped(actions, required, ablations) if len(actions) > FEW else {"Options": list(actions)}
    parser._action_groups = []
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        group._group_actions.extend(actions[name] for name in names)


def _parse(parser: ArgumentParser, given: Sequence[str], hints: Mapping[str, Any], defaults: bool) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    switches = {name for name, hint in hints.items() if hint is bool}
    try:
        spelled = _with_negative_values(_spelled_out_switches(given, switches))
        spelled = _with_brackets(spelled, {name for name, hint in hints.items() if _is_tuple_of_numbers(hint)})
        namespace = parser.parse_args(spelled, defaults=defaults)
    except ArgumentError as error:
        complaint = " ".join(str(error).split())
        # Words of the line were looked at before: what is unknown stands in the file.
        if unknown := re.search(r"Option '([\w.]+)' is not accepted", complaint):
            file, name = option(given, "config"), str(unknown[1])
            raise UsageError(f"{file} has {name}, and {parser.prog} has no such option{_near(name, hints)}") from error
        raise UsageError(_plain_words(complaint)) from error
    values: dict[str, Any] = namespace.as_dict()
    values.pop("config", None)
    return values


def _underscored(argument: str) -> str:
    """Options are spelled with underscores or dashes, as the user likes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _spelled_out_switches(given: Sequence[str], switches: set[str]) -> list[str]:
    """Turn `--resume` and `--no_resume` into `--resume=true` and `--resume=false`."""
    spelled = []
    for position, argument in enumerate(given):
        name = argument.removeprefix("--")
        followed = position + 1 < len(given) and not given[position + 1].startswith("--")
        if argument.startswith("--") and name in switches and not followed:
            spelled.append(f"--{name}=true")
        elif argument.startswith("--no_") and name.removeprefix("no_") in switches:
            spelled.append(f"--{name.removeprefix('no_')}=false")
        else:
            spelled.append(argument)
    return spelled


def _with_negative_values(given: Sequence[str]) -> list[str]:
    """Join `--value_range -100,3000`: the parser takes what begins with a minus, and is no number, for an option."""
    joined: list[str] = []
    for argument in given:
        before = joined[-1] if joined else ""
        if re.match(r"-[\d.]+,", argument) and before.startswith("--") and "=" not in before:
            joined[-1] = f"{before}={argument}"
        else:
            joined.append(argument)
    return joined


def _is_tuple_of_numbers(hint: Any) -> bool:
    kinds = [
        kind
        for kind in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        if kind is not type(None)
    ]
    return all(get_origin(kind) is tuple and {*get_args(kind)} <= {int, float, ...} for kind in kinds)


def _with_brackets(given: Sequence[str], names: set[str]) -> list[str]:
    """Let numbers be written with commas alone: `--crop_scale 0.2,1` for `--crop_scale [0.2,1]`."""
    bracketed: list[str] = []
    for argument in given:
        before = bracketed[-1] if bracketed else ""
        name, equals, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        if name.removeprefix("--") in names and re.fullmatch(r"[-+.\de]+(,[-+.\de]+)+", value):
            argument = f"{name}=[{value}]" if equals else f"[{value}]"
        bracketed.append(argument)
    return bracketed


def _plain_words(complaint: str) -> str:
    """Rewrite a complaint of the parser about a value in the words of the command line."""
    complaint = re.sub(r'Parser key "([\w.]+)":', r"--\1:", complaint)
    union = re.search(r"Does not validate .*?Subtypes: \[(.*?)\] Errors: .*Given value: (.*)", complaint)
    if union:
        kinds = re.sub(r"tuple\[.*?\]", "numbers with commas between them", union[1])
        kinds = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds)
        kinds = re.sub(r"<class '(\w+)'>", r"\1", kinds).replace("NoneType", "null").replace(", ", " or ")
        complaint = f"{complaint[: union.start()]}expected {kinds}, got {union[2]}"
    complaint = complaint.replace("Expected a <class 'tuple'>.", "expected numbers with commas between them,")
    complaint = re.sub(r"Expected a tuple with (\d+) elements\.", r"expected \1 numbers,", complaint)
    complaint = re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1,", complaint)
    complaint = re.sub(r"Expected an? typing\.Literal\[(.*?)\]\.", r"expected one of \1;", complaint)
    complaint = complaint.replace("Got value:", "got")
    return re.sub(r"the following arguments are required: (.*)", _missing_options, complaint)


def _missing_options(match: re.Match[str]) -> str:
    return "missing " + ", ".join(f"--{name}" for name in match.group(1).split(", "))
