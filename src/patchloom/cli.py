"""The command line: `patchloom VERB [METHOD] --option value …`, made from the Python API.

Every option of a command is an argument of the function, or a field of the settings class, that carries the
command out; their docstrings are the help texts. Help pages, tab completion and refusals read these and the tables of
`patchloom.registry`, none of which loads torch; only the modules of the command at hand are imported, when it runs.

Exit codes: 0 done, 1 failed, 2 bad usage, 128 + the signal that ended it (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1).
Errors are one sentence, warnings one line; `--debug` shows the traceback, and where a warning comes from. Figures are
printed as a table, with `--json` as JSON.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from patchloom import registry
from patchloom.base import stopping
from patchloom.errors import UsageError, unknown_name
from patchloom.io import encodable
from patchloom.registry import load
from patchloom.terminal.options import option, read_options, with_positionals
from patchloom.terminal.printing import columns, report


class Command(NamedTuple):
    """One command: where its function (or the settings class and the function that takes it) lives."""

    help: str
    function: str
    settings: str = ""
    positional: tuple[str, ...] = ()
    speaks: bool = False  # prints what there is to say to a person by itself


class Verb(NamedTuple):
    """A verb (of one word or two) whose next word names a method of `registry.METHODS`, and what carries it out."""

    help: str
    function: str = ""  # of `patchloom.api`, where it is called otherwise than the verb


METHOD_VERBS = (
    *("pretrain", "adapt", "distill", "align", "segment", "detect", "anomaly", "explain", "evaluate", "attack"),
    "clean",
    *("tokenize train", "generate"),
)

COMMANDS: dict[str, Command | Verb] = {
    "demo": Command("from embedded photographs to a trained encoder and a report", "demo:demo", speaks=True),
    "tokenize fit": Command("build a centroid codebook from images", "tokenizers.commands:fit_codebook"),
    "tokenize show": Command(
        "draw a codebook and what images look like through it",
        "tokenizers.commands:show_codebook",
        positional=("codebook",),
    ),
    "tokenize train": Verb("train a tokenizer on unlabelled images", "train_tokenizer"),
    "tokenize drift": Command(
        "has the camera, the scanner or the stain changed? two piles of images by the codes of a codebook",
        "tokenizers.drift_command:measure_drift",
        positional=("first", "second"),
    ),
    "pretrain": Verb("train an encoder on unlabelled images"),
    "pretrain compare": Command(
        "several methods under one budget: one table, one plot",
        "sweep.pretrain:compare",
        positional=("recipe",),
    ),
    "adapt": Verb("train an encoder further on labelled images"),
    "distill": Verb("teach a small model what a large one knows"),
    "align": Verb("train an encoder to meet language, or what another sense gives"),
    "align scaling": Command(
        "how what captions teach grows with pairs and with the image tower: runs, table and slopes",
        "sweep.align:scaling",
    ),
    "segment": Verb("train a decoder that gives every pixel a class"),
    "segment predict": Command(
        "write the masks a trained decoder makes of images", "segment.commands:predict", positional=("run",)
    ),
    "segment export": Command(
        "write a trained decoder with its encoder as one ONNX file", "segment.commands:export", positional=("run",)
    ),
    "clean": Verb("rid the features of an encoder of artefacts, and ship the result"),
    "clean dvt decompose": Command(
        "take the features of images apart: meaning, position artefact, residual (DVT, first stage)",
        "systems.dvt.commands:decompose",
        "systems.dvt.config:DecomposeConfig",
    ),
    "clean dvt apply": Command(
        "write an encoder and the denoiser trained for it as one bundle (DVT)",
        "systems.dvt.commands:apply",
        positional=("run",),
    ),
    "generate": Verb("train a model that makes images"),
    "generate sample": Command(
        "draw images by a trained model", "systems.vim.commands:sample_images", positional=("run",)
    ),
    "generate probe": Command(
        "measure the features of each block of a trained model", "evaluate.generation:probe_blocks", positional=("run",)
    ),
    "detect": Verb("train a detector of objects on boxes and outlines"),
    "detect predict": Command(
        "write the objects a trained detector finds in images",
        "systems.vit_comer.detect_commands:predict",
        positional=("run",),
    ),
    "anomaly": Verb("train a detector of defects on good images alone"),
    "anomaly predict": Command(
        "write scores, maps and overlays of images by a trained detector",
        "evaluate.anomaly.commands:predict",
        positional=("run",),
    ),
    "anomaly export": Command(
        "write a trained detector as one ONNX file", "evaluate.anomaly.commands:export", positional=("run",)
    ),
    "explain": Verb("show what an encoder or a classifier looks at"),
    "adapt compare": Command(
        "several methods, label budgets and seeds: one table, one plot",
        "sweep.adapt:compare",
        positional=("recipe",),
    ),
    "evaluate": Verb("measure an encoder on labelled images"),
    "attack": Verb("measure how easily models are fooled, on labelled images"),
    "evaluate suite": Command(
        "a table of encoders, data sets and protocols", "sweep.suite:suite", positional=("recipe",)
    ),
    "evaluate scaling": Command(
        "what more model, pixels and labels are worth: one probe over a grid of them",
        "sweep.scaling:scaling",
    ),
    "embed": Command(
        "write the feature vector of every image to a file", "features.embed:embed", positional=("model",)
    ),
    "data atari": Command(
        "record frames of Atari games in time order", "evaluate.atari.commands:record_frames", positional=("games",)
    ),
    "data inspect": Command(
        "what a pile of images holds: sizes, broken files, copies, leaks into the test",
        "curation.inspect:run_inspect",
        "curation.config:InspectConfig",
        positional=("data",),
    ),
    "data dedup": Command(
        "list the images without copies",
        "curation.dedup:run_dedup",
        "curation.config:DedupConfig",
        positional=("data",),
    ),
    "data split": Command(
        "divide images into parts that share no copy and no patient",
        "curation.split:run_split",
        "curation.config:SplitConfig",
        positional=("data",),
    ),
    "data curate": Command(
        "choose a balanced part of many images",
        "curation.curate:run_curate",
        "curation.config:CurateConfig",
        positional=("data",),
    ),
    "data shards": Command(
        "write images as tar shards",
        "curation.shards:run_shards",
        "curation.config:ShardsConfig",
        positional=("data",),
    ),
    "slides tile": Command(
        "find the tissue of whole-slide images and the tiles on it",
        "evaluate.slides.embed:run_tile",
        "evaluate.slides.embed_config:TileConfig",
        positional=("slides",),
    ),
    "slides embed": Command(
        "make the features of the tiles of whole-slide images",
        "evaluate.slides.embed:run_embed",
        "evaluate.slides.embed_config:EmbedConfig",
        positional=("slides",),
    ),
    "export": Command("write a bundle in another format", "models.export:export", positional=("bundle",)),
    "import": Command(
        "turn a published checkpoint into a bundle",
        "systems.published:import_reference",
        positional=("system", "checkpoint"),
    ),
    "runs list": Command(
        "list the runs in a folder: what they are, how far they are, their figures",
        "sweep.runs:list_runs",
        positional=("folder",),
    ),
    "runs compare": Command(
        "several runs side by side: figures, curves, what was set differently",
        "sweep.runs:compare_runs",
        positional=("runs",),
    ),
    "cache": Command("list or delete the features kept on disk", "features.commands:show_cache"),
    "merge": Command(
        "write an adapter into its encoder's weights", "models.merge:merge_to_bundle", positional=("adapter",)
    ),
    "list": Command(
        "list the methods, data sources and published systems", "cli:list_everything", positional=("verb",), speaks=True
    ),
    "completion": Command(
        "print a script that completes commands and options with the tab key",
        "terminal.completion:script",
        positional=("shell",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with stopping.stoppable(), _plain_warnings(debug):
        code = _main(arguments, debug)
        number = stopping.received()
        # A signal that something swallowed is answered all the same.
        return code if number is None or code or stopping.is_helper() else stopping.Stopped(number).exit_code


@contextmanager
def _plain_warnings(debug: bool) -> Iterator[None]:
    """Show warnings as one line each, without the place in the source; those for programmers not at all."""
    for_programmers = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)

    def show(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if not issubclass(category, for_programmers) and not stopping.is_helper():
            print(f"warning: {encodable(' '.join(str(message).split()))}", file=sys.stderr)

    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = show
        yield


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
        verb: Show one list only: pretrain, adapt, distill, align, segment, detect, anomaly, explain, evaluate, attack,
            clean, "tokenize train", generate, data or references.
    """
    lists: dict[str, dict[str, str]] = {
        **{name: {method: entry.summary for method, entry in registry.METHODS[name].items()} for name in METHOD_VERBS},
        "data": registry.SOURCES,
        "references": dict.fromkeys(registry.REFERENCES, ""),
    }
    if verb is not None:
        if verb not in lists:
            raise unknown_name("list", verb, lists)
        lists = {verb: lists[verb]}
    titles = {"data": "data (--data NAME)", "references": "references (patchloom import NAME CHECKPOINT)"}
    for number, (name, listed) in enumerate(lists.items()):
        print("\n" * (number > 0) + titles.get(name, f"patchloom {name} METHOD"))
        for line in columns([[method, summary] for method, summary in sorted(listed.items())]).splitlines():
            print(f"  {line}")
    return {name: sorted(listed) for name, listed in lists.items()}


def _dispatch(arguments: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        import patchloom

        print(f"patchloom {patchloom.__version__}")
        return 0
    words, rest = _command_words(arguments)
    verb = " ".join(words)
    command = COMMANDS[verb]
    if isinstance(command, Verb):
        if rest[:1] in (["-h"], ["--help"]):
            print(_verb_overview(verb, command))
            return 0
        if not rest or rest[0].startswith("-"):
            known = ", ".join(registry.METHODS[verb])
            raise UsageError(f"patchloom {verb} needs the name of a method: {known}")
        name, rest = _method_name(verb, rest)
        run, speaks = _method(verb, name, rest), False
    else:
        run, speaks = _function(verb, command, rest), command.speaks
    if as_json:
        with redirect_stdout(sys.stderr):  # what is said on the way is not for the program that reads the figures
            result = run()
    else:
        result = run()
    if as_json or not speaks:
        report(result, as_json)
    return 0


def _complete() -> None:
    """Answer the shell, which asks what may follow the words on its line, and end."""
    from patchloom.terminal.completion import answer

    described = {name: c.settings or c.function for name, c in COMMANDS.items() if isinstance(c, Command)}
    described |= {
        f"{verb} {name}": entry.settings for verb in METHOD_VERBS for name, entry in registry.METHODS[verb].items()
    }
    positional = {name: c.positional for name, c in COMMANDS.items() if isinstance(c, Command)}
    answer({name: partial(load, place) for name, place in described.items()}, positional)


def _command_words(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the words that name the command from its options."""
    first = arguments[0]
    for count in (3, 2):
        if " ".join(arguments[:count]) in COMMANDS:
            return arguments[:count], arguments[count:]
    second_words = sorted(name.split()[1] for name in COMMANDS if name.startswith(f"{first} "))
    if second_words and first not in COMMANDS:
        raise UsageError(f"patchloom {first} is followed by one of: {', '.join(second_words)}")
    if first not in COMMANDS:
        raise unknown_name("command", first, {name.split()[0] for name in COMMANDS})
    return [first], arguments[1:]


def _method_name(verb: str, rest: list[str]) -> tuple[str, list[str]]:
    """Split the name of a method from its options; a name of two parts may be given as two words, `dvt train`."""
    joined = "_".join(rest[:2])
    return (joined, rest[2:]) if joined in registry.METHODS[verb] else (rest[0], rest[1:])


def _method(verb: str, method: str, rest: list[str]) -> Callable[[], Any]:
    """Read the options of a method and return what runs it."""
    from patchloom import api
    from patchloom.training.config import preset_values

    entry = registry.entry(verb, method)
    config_class = load(entry.settings)
    rest = _with_saved_settings(rest, f"{verb} {method}")
    defaults = preset_values(config_class, _named_preset(rest))
    # Only what was given of training's: what is left open may be settled by the size of the data.
    settles = verb in ("pretrain", "adapt", "distill", "align", "anomaly", "clean", "tokenize train", "generate")
    values = read_options(f"{verb} {method}", entry.sentence, config_class, rest, defaults, all_of_them=not settles)
    command = COMMANDS[verb]
    assert isinstance(command, Verb)
    return partial(getattr(api, command.function or verb), method, **values)


def _with_saved_settings(rest: list[str], command: str) -> list[str]:
    """Let `--resume --out RUN` do: what is not given anew is read from the run's own settings."""
    joined = " ".join(rest)
    resumes = re.search(r"--resume(?:[= ]true)?(?= --|$)", joined)
    out = option(rest, "out")
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
    from patchloom.io import read_config

    given = {name: option(rest, name) for name in ("preset", "config")}
    if given["preset"] is None and given["config"] is not None and Path(given["config"]).is_file():
        return read_config(Path(given["config"])).get("preset")
    return given["preset"]


def _function(name: str, command: Command, rest: list[str]) -> Callable[[], Any]:
    """Read the options of a command and return what runs it."""
    rest = with_positionals(command.positional, rest)
    described = load(command.settings or command.function)
    summary = (described.__doc__ or "").strip().split("\n\n")[0]
    values = read_options(name, summary, described, rest)
    if command.settings:
        return lambda: load(command.function)(described(**values))
    return partial(described, **values)


def _one_sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())


def _overview() -> str:
    width = max(len(name) for name in COMMANDS) + 2
    lines = [
        "usage: patchloom COMMAND [METHOD] [--option value …]",
        "",
        "From a pile of images to a Vision Transformer you can use.",
        "",
        *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
        "",
        "patchloom COMMAND --help shows what a command takes; --json prints figures as JSON,",
        "--debug the traceback of an error.",
    ]
    return "\n".join(lines)


def _verb_overview(name: str, verb: Verb) -> str:
    listed = {method: entry.summary for method, entry in registry.METHODS[name].items()}
    listed |= {full.removeprefix(f"{name} "): c.help for full, c in COMMANDS.items() if full.startswith(f"{name} ")}
    width = max(map(len, listed)) + 2
    lines = [
        f"usage: patchloom {name} METHOD [--option value …]",
        "",
        f"{verb.help[0].upper()}{verb.help[1:]}.",
        "",
    ]
    lines += [f"  {words:<{width}}{summary}" for words, summary in listed.items()]
    lines += ["", f"patchloom {name} METHOD --help lists the options of a method."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
