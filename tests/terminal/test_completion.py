"""Tab completion: what a shell is answered, by the command that it asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from patchloom import cli


def answered(line: str, folder) -> list[str]:
    told = folder / "told"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(told),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
        "COMP_TYPE": "9",
    }
    subprocess.run([sys.executable, "-m", "patchloom"], env=environment, check=True, cwd=folder, capture_output=True)
    return [word.strip() for word in told.read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("patchloom pre", {"pretrain"}),
        ("patchloom pretrain ", {"ccvit", "mae", "compare"}),
        ("patchloom evaluate kn", {"knn"}),
        ("patchloom pretrain ccvit --ba", {"--batch_size"}),
        ("patchloom pretrain ccvit --out größe --target ", {"dual", "token"}),
        ("patchloom pretrain mae --resume ", {"true", "false"}),
        ("patchloom tokenize fit --data d", {"digits"}),
        ("patchloom embed --po", {"--pool"}),
        ("patchloom import din", {"dinov2", "dinov3"}),
        ("patchloom list ref", {"references"}),
        ("patchloom completion ", {"bash", "zsh", "fish"}),
        ("patchloom export --js", {"--json"}),
    ],
)
def test_what_may_follow(line, among, tmp_path):
    assert among <= set(answered(line, tmp_path))


def test_files_complete_where_files_are_meant(tmp_path):
    (tmp_path / "photographs").mkdir()
    assert {"photos", "photographs/"} <= set(answered("patchloom pretrain ccvit --data phot", tmp_path))
    assert "photographs/" in answered("patchloom pretrain ccvit --out phot", tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_ARGCOMPLETE" in script
    assert "patchloom" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_another_shell_is_bad_usage(capsys):
    assert cli.main(["completion", "tcsh"]) == 2
    assert "expected one of 'bash', 'zsh', 'fish'; got tcsh" in capsys.readouterr().err
