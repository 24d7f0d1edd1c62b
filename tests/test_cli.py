"""The command line: what it offers, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest

import patchloom as pl
from patchloom import cli
from patchloom.errors import UsageError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overview_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert f"  {name} " in out


def test_a_command_loads_what_it_needs_and_nothing_else():
    script = """
import sys
from patchloom.evaluate import EVALUATIONS
assert "torch" not in sys.modules and len(EVALUATIONS) > 10, "naming the evaluations loads nothing"
assert EVALUATIONS["knn"].__name__ == "KNN"
print([name for name in ("lightning", "sklearn", "patchloom.evaluate.finetune") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["pretrain", "adapt", "distill", "evaluate"])
def test_every_name_of_a_table_stands_for_a_class(verb):
    import importlib

    module = importlib.import_module(f"patchloom.{verb}")
    table = module.EVALUATIONS if verb == "evaluate" else module.METHODS
    assert sorted(table) == pl.list_methods(verb)
    for name in table:
        assert hasattr(table[name], "config_class"), name
    with pytest.raises(KeyError):
        table["nothing"]


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
    assert options
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
        (["pretrain", "ccvit", "--data", "photos"], "missing --out"),
        (
            ["pretrain", "ccvit", "--data", "photos", "--out", "x", "--lr", "fast"],
            "--lr: expected float, got fast",
        ),
        (["tokenize"], "followed by one of: fit, show"),
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


def parse(*arguments: str) -> dict[str, object]:
    from typing import get_type_hints

    parser = cli._parser("made up", "Made up.")
    parser.add_class_arguments(Settings, fail_untyped=False)
    return cli._parse(parser, list(arguments), get_type_hints(Settings))


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
    assert values == {"out": "from_file", "batch_size": 32, "resume": False}


def test_missing_config_file_is_bad_usage(tmp_path):
    with pytest.raises(UsageError, match="--config"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_list_is_machine_readable(capsys):
    code, out, _ = run(capsys, "list", "--verb", "pretrain")
    assert code == 0
    assert "ccvit" in json.loads(out)["pretrain"]


def test_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "patchloom.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("patchloom 0.")


@pytest.mark.parametrize("spelling", [["--preset", "big"], ["--preset=big"], ["--config", "settings.yaml"]])
def test_a_preset_changes_the_defaults_of_a_command(spelling, monkeypatch, tmp_path):
    from patchloom import pretrain
    from patchloom.pretrain.ccvit import CCViTConfig, CCViTMethod

    seen = {}
    monkeypatch.setattr(pretrain, "METHODS", {"made_up": CCViTMethod})
    monkeypatch.setattr(pretrain, "fit", lambda command, method, config: seen.update(asdict(config)))
    monkeypatch.setattr(CCViTConfig, "PRESETS", {"big": {"batch_size": 77, "epochs": 5}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("preset: big\n")
    assert cli.main(["pretrain", "made_up", "--data", "photos", "--out", "x", "--epochs", "9", *spelling]) == 0
    assert (seen["batch_size"], seen["epochs"], seen["preset"]) == (77, 9, "big")
