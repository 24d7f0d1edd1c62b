"""The command line: what it offers, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Literal

import pytest

import patchloom as pl
from patchloom import cli, registry
from patchloom.errors import UsageError
from patchloom.terminal.options import read_options


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overview_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("verb", cli.METHOD_VERBS)
def test_the_page_of_a_verb_keeps_names_and_summaries_apart(verb, capsys):
    _, out, _ = run(capsys, verb, "--help")
    names = [*registry.METHODS[verb], *(c.removeprefix(f"{verb} ") for c in cli.COMMANDS if c.startswith(f"{verb} "))]
    for name in names:
        assert f"\n  {name}  " in out


HELP = """
import contextlib, io, pathlib, sys
from patchloom import cli, registry
for words in [*cli.COMMANDS, *(f"{verb} {name}" for verb in registry.METHODS for name in registry.METHODS[verb])]:
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        cli.main([*words.split(), "--help"])
    assert "--" in page.getvalue() and " at 0x" not in page.getvalue(), words
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    assert cli.main(["list"]) == 0
    assert cli.main(["completion", "bash"]) == 0
    assert cli.main(["pretrain", "ccvit", "--epoch", "3"]) == 2
    assert cli.main(["pretrain", "ccvti"]) == 2
    assert cli.main(["pretrain", "ccvit", "--data", "photos"]) == 2
heavy = ["torch", "lightning", "timm", "sklearn", "skimage", "numpy", "scipy", "matplotlib", "PIL", "torchvision"]
print([name for name in heavy if name in sys.modules])
status = pathlib.Path("/proc/self/status")  # not getrusage, whose peak a process inherits
peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
print(int(peak) // 1024)
"""


def test_every_help_page_and_refusal_is_light():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    loaded, megabytes = done.stdout.split("\n")[:2]
    assert loaded == "[]", done.stdout + done.stderr
    assert int(megabytes) < 120


def test_one_help_page_takes_less_than_half_a_second_of_cpu_time():
    script = "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'patchloom', *sys.argv[1:]]); "
    script += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    command = [sys.executable, "-c", script, "distill", "scalekd", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.5


@pytest.mark.parametrize("verb", registry.METHODS)
def test_every_entry_stands_for_a_method_its_settings_and_its_summary(verb):
    assert sorted(registry.METHODS[verb]) == pl.list_methods(verb)
    for name, entry in registry.METHODS[verb].items():
        method = registry.method_class(verb, name)
        assert registry.settings_class(verb, name) is method.config_class, name
        assert method.__doc__.strip().splitlines()[0] == entry.sentence, name
    with pytest.raises(UsageError, match=r"unknown .* 'nothing'"):
        registry.entry(verb, "nothing")


def test_every_name_of_a_published_system_stands_for_its_loader():
    assert all(callable(registry.load(place)) for place in registry.REFERENCES.values())


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "patchloom", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("patchloom ")


@pytest.mark.parametrize("name", [n for n, c in cli.COMMANDS.items() if isinstance(c, cli.Command)])
def test_every_command_explains_all_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    options = [line for line in lines if line.startswith("  --")]
    assert options, lines
    text = "\n".join(lines)
    for option in options:
        name = option.split()[0]
        help_text = text.split(f"\n  {name} ")[1].split("\n  --")[0]
        assert any(word.isalpha() and word.islower() for word in help_text.split("(type")[0].split()), name


@pytest.mark.parametrize("verb", ["pretrain", "adapt", "evaluate"])
def test_every_method_explains_all_its_options(verb, capsys):
    from patchloom import list_methods

    for method in list_methods(verb):
        with pytest.raises(SystemExit) as stop:
            cli.main([verb, method, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        for option in out.split("\n  --")[1:]:
            described = option.split("(type")[0].split("(required")[0]
            assert len(described.split()) > 3, f"{verb} {method} --{option.split()[0]} has no help text"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretran"], "did you mean pretrain"),
        (["pretrain"], "needs the name of a method"),
        (["pretrain", "ccvti"], "did you mean ccvit"),
        (["pretrain", "ccvit", "--epoch", "3"], "did you mean --epochs"),
        (["pretrain", "ccvit", "--steps", "3"], "did you mean --max_steps or"),
        (["pretrain", "ccvit", "--data", "photos"], "missing --out"),
        (
            ["pretrain", "ccvit", "--data", "photos", "--out", "x", "--lr", "fast"],
            "--lr: expected float, got fast",
        ),
        (["tokenize"], "followed by one of: "),
        (["embed", "a", "b"], "unexpected argument 'b'"),
        (["list", "pretrian"], "did you mean pretrain"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(arguments, expected, capsys):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert expected in err
    assert err.count("\n") == 1


def test_failure_is_exit_code_1_and_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(verb: str | None = None) -> None:
        """Fail.

        Args:
            verb: Anything.
        """
        raise RuntimeError("the disk is\nfull")

    monkeypatch.setattr(cli, "list_everything", fail)
    code, _, err = run(capsys, "list")
    assert (code, err) == (1, "patchloom: the disk is full\n")
    with pytest.raises(RuntimeError):
        cli.main(["list", "--debug"])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Made up."""

    out: str
    """where"""
    resume: bool = False
    """go on"""
    batch_size: int = 8
    """images"""
    area: tuple[float, float] = (0.2, 1.0)
    """share of the image"""
    blocks: tuple[int, ...] | None = None
    """numbers of blocks"""
    colour: Literal["red", "blue"] | None = None
    """a colour"""


def parse(*arguments: str) -> dict[str, object]:
    return read_options("made up", "Made up.", Settings, arguments)


def test_a_value_may_begin_with_a_minus():
    assert parse("--out", "-100,3000")["out"] == "-100,3000"
    assert parse("--out=-1.5,3")["out"] == "-1.5,3"


@pytest.mark.parametrize("spelling", ["--batch_size=4", "--batch-size=4"])
def test_options_take_dashes_or_underscores(spelling):
    assert parse("--out", "x", spelling)["batch_size"] == 4


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        (["--resume"], True),
        (["--resume", "false"], False),
        (["--no-resume"], False),
        (["--resume=true"], True),
        ([], False),
    ],
)
def test_switches_need_no_value(switch, value):
    assert parse(*switch, "--out", "x")["resume"] is value


def test_config_file_gives_options_and_the_command_line_wins(tmp_path):
    (tmp_path / "run.yaml").write_text("out: from_file\nbatch_size: 16\n")
    values = parse("--config", str(tmp_path / "run.yaml"), "--batch_size", "32")
    assert values == {
        "out": "from_file",
        "batch_size": 32,
        "resume": False,
        "area": (0.2, 1.0),
        "blocks": None,
        "colour": None,
    }


def test_a_setting_of_a_file_that_is_none_is_named_with_the_file_and_the_nearest(tmp_path):
    (tmp_path / "run.yaml").write_text("out: x\nbatch_siez: 16\n")
    with pytest.raises(
        UsageError, match=r"run.yaml has batch_siez, and patchloom made up has no .*did you mean --batch_size"
    ):
        parse("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("written", [["--area", "0.5,1"], ["--area=0.5,1"], ["--area", "[0.5, 1]"]])
def test_numbers_need_commas_and_no_brackets(written):
    assert parse("--out", "x", *written)["area"] == (0.5, 1.0)
    assert parse("--out", "3,4", "--blocks", "1,-2")["blocks"] == (1, -2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--area", "0.5"], "--area: expected numbers with commas between them, got 0.5"),
        (["--area", "1,2,3"], "--area: expected 2 numbers, got "),
        (["--colour", "gray"], "--colour: expected 'red' or 'blue' or null, got gray"),
        (["--blocks", "1,a"], "--blocks: expected numbers with commas between them or null, got 1,a"),
    ],
)
def test_other_than_numbers_are_refused_in_plain_words(given, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        parse("--out", "x", *given)


def test_missing_config_file_is_bad_usage(tmp_path):
    with pytest.raises(UsageError, match="--config"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_list_is_a_table_for_a_person_and_json_for_a_program(capsys):
    code, out, _ = run(capsys, "list", "pretrain")
    assert code == 0
    assert re.search(r"^  ccvit +Masked image modelling", out, re.MULTILINE)
    code, out, _ = run(capsys, "list", "--verb", "pretrain", "--json")
    assert (code, json.loads(out)) == (0, {"pretrain": pl.list_methods("pretrain")})
    _, out, _ = run(capsys, "list", "--json")
    assert json.loads(out)["references"] == pl.list_references()


def test_training_hears_of_what_was_given_alone(monkeypatch, tmp_path):
    from patchloom.training import run as module

    seen = {}
    monkeypatch.setattr(module, "fit", lambda command, method, config, given, **_: seen.update(given))
    cli.main(["pretrain", "mae", "--data", "photos", "--out", str(tmp_path / "x"), "--lr", "0.1"])
    assert seen == {"data": "photos", "out": str(tmp_path / "x"), "lr": 0.1}


def test_a_warning_is_one_line_without_its_place_in_the_source(monkeypatch, capsys):
    def warn(arguments: list[str]) -> int:
        warnings.warn("the codebook holds\n  3 patches twice", stacklevel=2)
        warnings.warn("a keyword will be renamed", FutureWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(cli, "_dispatch", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(capsys) == (0, "", "warning: the codebook holds 3 patches twice\n")
    with pytest.warns(UserWarning, match="twice"), pytest.warns(FutureWarning):
        cli.main(["--debug"])


def test_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "patchloom.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("patchloom 0.")


@pytest.mark.parametrize("spelling", [["--preset", "big"], ["--preset=big"], ["--config", "settings.yaml"]])
def test_a_preset_changes_the_defaults_of_a_command(spelling, monkeypatch, tmp_path):
    from patchloom.systems.ccvit.method import CCViTConfig
    from patchloom.training import run as module

    seen = {}
    monkeypatch.setitem(registry.METHODS["pretrain"], "made_up", registry.METHODS["pretrain"]["ccvit"])
    monkeypatch.setattr(module, "fit", lambda command, method, config, given, **_: seen.update(asdict(config)))
    monkeypatch.setattr(CCViTConfig, "PRESETS", {"big": {"batch_size": 77, "epochs": 5}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("preset: big\n")
    assert cli.main(["pretrain", "made_up", "--data", "photos", "--out", "x", "--epochs", "9", *spelling]) == 0
    assert (seen["batch_size"], seen["epochs"], seen["preset"]) == (77, 9, "big")
