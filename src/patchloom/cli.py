"""The command line: `patchloom VERB [METHOD] --option value …`, made from the Python API.

Every option of a command is an argument of the function, or a field of the settings class, that carries the
command out; their docstrings are the help texts. Only the modules of the command at hand are imported.

Exit codes: 0 done, 1 failed, 2 bad usage, 128 + the signal that ended it (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1).
Errors are one sentence; `--debug` shows the traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from patchloom import stopping
from patchloom.errors import UsageError, unknown_name
from patchloom.io import encodable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """One command: where its function (or the settings class and the function that takes it) lives."""

    help: str
    function: str
    settings: str = ""
    positional: tuple[str, ...] = ()
    speaks: bool = False  # prints what there is to say by itself


class Verb(NamedTuple):
    """A verb whose second word names a method; the methods are the entries of one dict."""

    help: str
    module: str
    listing: str


COMMANDS: dict[str, Command | Verb] = {
    "demo": Command("from embedded photographs to a trained encoder and a report", "patchloom.demo:demo", speaks=True),
    "tokenize fit": Command("build a centroid codebook from images", "patchloom.tokenizers:fit_codebook"),
    "tokenize show": Command(
        "draw a codebook and what images look like through it",
        "patchloom.tokenizers:show_codebook",
        positional=("codebook",),
    ),
    "pretrain": Verb("train an encoder on unlabelled images", "patchloom.pretrain", "METHODS"),
    "pretrain compare": Command(
        "several methods under one budget: one table, one plot",
        "patchloom.pretrain.compare:compare",
        positional=("recipe",),
    ),
    "adapt": Verb("train an encoder further on labelled images", "patchloom.adapt", "METHODS"),
    "distill": Verb("teach a small model what a large one knows", "patchloom.distill", "METHODS"),
    "explain": Verb("show what an encoder or a classifier looks at", "patchloom.explain", "EXPLANATIONS"),
    "adapt compare": Command(
        "several methods, label budgets and seeds: one table, one plot",
        "patchloom.adapt.compare:compare",
        positional=("recipe",),
    ),
    "evaluate": Verb("measure an encoder on labelled images", "patchloom.evaluate", "EVALUATIONS"),
    "evaluate suite": Command(
        "a table of encoders, data sets and protocols", "patchloom.evaluate.suite:suite", positional=("recipe",)
    ),
    "evaluate scaling": Command(
        "what more model, pixels and labels are worth: one probe over a grid of them",
        "patchloom.evaluate.scaling:scaling",
    ),
    "embed": Command(
        "write the feature vector of every image to a file", "patchloom.embed:embed", positional=("model",)
    ),
    "data atari": Command(
        "record frames of Atari games in time order", "patchloom.rl.record:record_frames", positional=("games",)
    ),
    "slides tile": Command(
        "find the tissue of whole-slide images and the tiles on it",
        "patchloom.evaluate.slides.embed:run_tile",
        "patchloom.evaluate.slides.embed:TileConfig",
        positional=("slides",),
    ),
    "slides embed": Command(
        "make the features of the tiles of whole-slide images",
        "patchloom.evaluate.slides.embed:run_embed",
        "patchloom.evaluate.slides.embed:EmbedConfig",
        positional=("slides",),
    ),
    "export": Command("write a bundle in another format", "patchloom.export:export", positional=("bundle",)),
    "import": Command(
        "turn a published checkpoint into a bundle",
        "patchloom.reference:import_reference",
        positional=("system", "checkpoint"),
    ),
    "cache": Command("list or delete the features kept on disk", "patchloom.features.cache:show_cache"),
    "merge": Command(
        "write an adapter into its encoder's weights", "patchloom.adapters:merge_to_bundle", positional=("adapter",)
    ),
    "list": Command(
        "list the methods, data sources and published systems", "patchloom.cli:list_everything", positional=("verb",)
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with stopping.stoppable():
        code = _main(arguments, debug)
        number = stopping.received()
        # A signal that something swallowed is answered all the same.
        return code if number is None or code or stopping.is_helper() else stopping.Stopped(number).exit_code


def _main(arguments: list[str], debug: bool) -> int:
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt as stop:
        print(f"patchloom: {_one_sentence(stop) if stop.args else 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"patchloom: {encodable(_one_sentence(error))}", file=sys.stderr)
        if (number := stopping.received()) is not None:  # what failed may have failed for it
            return stopping.Stopped(number).exit_code
        return 2 if isinstance(error, UsageError) else 1


def list_everything(verb: str | None = None) -> dict[str, list[str]]:
    """List what this installation can do.

    Args:
        verb: Show one list only: pretrain, adapt, distill, explain, evaluate, data or references.
    """
    import patchloom
    from patchloom.data import list_sources

    lists = {
        **{name: patchloom.list_methods(name) for name in ("pretrain", "adapt", "distill", "explain", "evaluate")},
        "data": sorted(list_sources()),
        "references": patchloom.list_references(),
    }
    if verb is None:
        return lists
    if verb not in lists:
        raise unknown_name("list", verb, lists)
    return {verb: lists[verb]}


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        import patchloom

        print(f"patchloom {patchloom.__version__}")
        return 0
    words, rest = _command_words(arguments)
    command = COMMANDS.get(" ".join(words)) or COMMANDS[words[0]]
    if rest[:1] in (["-h"], ["--help"]) and len(words) == 1 and isinstance(command, Verb):
        print(_verb_overview(words[0], command))
        return 0
    if isinstance(command, Verb):
        if not rest or rest[0].startswith("-"):
            raise UsageError(f"patchloom {words[0]} needs the name of a method: {', '.join(_methods(command))}")
        return _run_method(words[0], command, rest[0], rest[1:])
    return _run_function(" ".join(words), command, rest)


def _command_words(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the words that name the command from its options."""
    first = arguments[0]
    if " ".join(arguments[:2]) in COMMANDS:
        return arguments[:2], arguments[2:]
    second_words = sorted(name.split()[1] for name in COMMANDS if name.startswith(f"{first} "))
    if second_words and first not in COMMANDS:
        raise UsageError(f"patchloom {first} is followed by one of: {', '.join(second_words)}")
    if first not in COMMANDS:
        raise unknown_name("command", first, {name.split()[0] for name in COMMANDS})
    return [first], arguments[1:]


def _run_method(verb: str, command: Verb, method: str, rest: list[str]) -> int:
    listing = _methods(command)
    if method not in listing:
        raise unknown_name(f"{verb} method", method, listing)
    config_class = listing[method].config_class
    from patchloom.training.config import preset_values

    parser = _parser(f"{verb} {method}", (listing[method].__doc__ or config_class.__doc__ or "").strip())
    parser.add_class_arguments(config_class, fail_untyped=False)
    rest = _with_saved_settings(rest, f"{verb} {method}")
    parser.set_defaults(dict(preset_values(config_class, _named_preset(rest))))
    values = _parse(parser, rest, get_type_hints(config_class))
    run: Any = importlib.import_module(command.module)
    _report(run(method, **values))
    return 0


def _with_saved_settings(rest: list[str], command: str) -> list[str]:
    """Let `--resume --out RUN` do: what is not given anew is read from the run's own settings."""
    options = [_underscored(argument) for argument in rest]
    joined = " ".join(options)
    resumes = re.search(r"--resume(?:[= ]true)?(?= --|$)", joined)
    out = _option(options, "out")
    if not resumes or not out or "--config" in joined:
        return rest
    saved = Path(out) / "config.yaml"
    if not saved.exists():
        return rest
    from patchloom.training.saved import saved_settings

    saved_settings(saved.parent, command)  # refuses another method's run, puts damaged settings back
    return [f"--config={saved}", *rest]


def _named_preset(rest: list[str]) -> str | None:
    """Return the preset the options name, directly or in a file of settings: it changes the defaults of the rest."""
    from patchloom.training.config import read_config

    given = {name: _option(rest, name) for name in ("preset", "config")}
    if given["preset"] is None and given["config"] is not None and Path(given["config"]).is_file():
        return read_config(Path(given["config"])).get("preset")
    return given["preset"]


def _option(rest: list[str], name: str) -> str | None:
    """Return the value of an option as it was typed; the last one counts."""
    value = None
    for argument, following in zip(rest, [*rest[1:], None], strict=True):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _run_function(name: str, command: Command, rest: list[str]) -> int:
    function: Callable[..., Any] = _load(command.function)
    described: Any = _load(command.settings) if command.settings else function
    parser = _parser(name, (described.__doc__ or "").strip())
    rest = _with_positionals(command.positional, rest)
    if command.settings:
        parser.add_class_arguments(described, fail_untyped=False)
        result = function(described(**_parse(parser, rest, get_type_hints(described))))
    else:
        parser.add_function_arguments(function, fail_untyped=False)
        result = function(**_parse(parser, rest, get_type_hints(function)))
    if not command.speaks:
        _report(result)
    return 0


def _with_positionals(positional: tuple[str, ...], rest: list[str]) -> list[str]:
    """Give leading bare words the names of the options they stand for (`patchloom embed MODEL --data …`)."""
    bare = 0
    while bare < len(rest) and not rest[bare].startswith("-"):
        bare += 1
    if bare > len(positional):
        raise UsageError(f"unexpected argument {rest[len(positional)]!r}; options are written --name value")
    named = [f"--{name}={value}" for name, value in zip(positional, rest[:bare], strict=False)]
    return named + rest[bare:]


def _parser(name: str, description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    summary = description.split("\n\n")[0]
    parser = ArgumentParser(prog=f"patchloom {name}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    return parser


def _parse(parser: ArgumentParser, rest: list[str], hints: dict[str, Any]) -> dict[str, Any]:
    """Read the options `rest`; `hints` gives the type of each option the command has."""
    from jsonargparse import ArgumentError

    known = {name for name in hints if name != "return"}
    switches = {name for name, hint in hints.items() if hint is bool}
    rest = [_underscored(argument) for argument in rest]
    for argument in rest:
        name = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and name.split(".")[0].removeprefix("no_") not in known | {"config", "help"}:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(f'--{n}' for n in near)}?" if near else ""
            raise UsageError(f"{parser.prog} has no option --{name}{hint} (--help lists them)")
    try:
        namespace = parser.parse_args(_spelled_out_switches(rest, switches))
    except ArgumentError as error:
        raise UsageError(_plain_words(_one_sentence(error))) from error
    values: dict[str, Any] = namespace.as_dict()
    values.pop("config", None)
    return values


def _underscored(argument: str) -> str:
    """Options are spelled with underscores or dashes, as the user likes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _spelled_out_switches(rest: list[str], switches: set[str]) -> list[str]:
    """Turn `--resume` and `--no_resume` into `--resume=true` and `--resume=false`."""
    spelled = []
    for position, argument in enumerate(rest):
        name = argument.removeprefix("--")
        followed = position + 1 < len(rest) and not rest[position + 1].startswith("--")
        if argument.startswith("--") and name in switches and not followed:
            spelled.append(f"--{name}=true")
        elif argument.startswith("--no_") and name.removeprefix("no_") in switches:
            spelled.append(f"--{name.removeprefix('no_')}=false")
        else:
            spelled.append(argument)
    return spelled


def _report(result: Any) -> None:
    """Print what a command returns: figures as JSON, a run or a file by its place."""
    if result is None or os.environ.get("LOCAL_RANK", "0") != "0":  # the first process speaks for all
        return
    if isinstance(result, (dict, list)):
        print(json.dumps(result, indent=2, default=_plain))
    else:
        print(result)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value) if f.default is not MISSING or f.init}
    return str(value) if isinstance(value, Path) else repr(value)


def _methods(command: Verb) -> dict[str, Any]:
    listing: dict[str, Any] = getattr(importlib.import_module(command.module), command.listing)
    return listing


def _load(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)


def _one_sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())


def _plain_words(complaint: str) -> str:
    """Rewrite a complaint of the parser about a value in the words of the command line."""
    complaint = re.sub(r'Parser key "([\w.]+)":', r"--\1:", complaint)
    union = re.search(r"Does not validate .*?Subtypes: \[(.*?)\] Errors: .*Given value: (.*)", complaint)
    if union:
        kinds = re.sub(r"<class '(\w+)'>", r"\1", union[1]).replace("NoneType", "null").replace(", ", " or ")
        complaint = f"{complaint[: union.start()]}expected {kinds}, got {union[2]}"
    complaint = re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1,", complaint)
    complaint = re.sub(r"Expected an? typing\.Literal\[(.*?)\]\.", r"expected one of \1;", complaint)
    complaint = complaint.replace("Got value:", "got")
    return re.sub(r"the following arguments are required: (.*)", _missing_options, complaint)


def _missing_options(match: re.Match[str]) -> str:
    return "missing " + ", ".join(f"--{name}" for name in match.group(1).split(", "))


def _overview() -> str:
    width = max(len(name) for name in COMMANDS) + 2
    lines = [
        "usage: patchloom COMMAND [METHOD] [--option value …]",
        "",
        "From a pile of images to a Vision Transformer you can use.",
        "",
        *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
        "",
        "patchloom COMMAND --help shows what a command takes; --debug shows the traceback of an error.",
    ]
    return "\n".join(lines)


def _verb_overview(name: str, verb: Verb) -> str:
    methods = _methods(verb)
    width = max(len(method) for method in methods) + 2
    lines = [
        f"usage: patchloom {name} METHOD [--option value …]",
        "",
        f"{verb.help[0].upper()}{verb.help[1:]}.",
        "",
    ]
    for method, listed in methods.items():
        summary = (listed.__doc__ or "").strip().split("\n")[0]
        lines.append(f"  {method:<{width}}{summary}")
    for full, command in COMMANDS.items():
        if full.startswith(f"{name} "):
            lines.append(f"  {full.removeprefix(f'{name} '):<{width}}{command.help}")
    lines += ["", f"patchloom {name} METHOD --help lists the options of a method."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
