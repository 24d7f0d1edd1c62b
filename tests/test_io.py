"""Names of files as text, and files that appear whole."""

from __future__ import annotations

import csv
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchloom import io
from patchloom.errors import UsageError

BROKEN = os.fsdecode(b"br\xe9ken.png")


@given(st.binary(max_size=20).filter(lambda name: b"\0" not in name))
def test_every_name_is_text_and_is_found_again(name):
    text = io.printable(os.fsdecode(name))
    assert text.encode().decode() == text
    assert "\n" not in text
    assert os.fsencode(io.raw_name(text)) == name


def test_names_that_are_utf_8_stay_as_they_are():
    for name in ("größe 1.png", "100%.png", "a\\b.png", "a%20b.png"):
        assert io.printable(name) == name
    assert io.printable(BROKEN) == r"br\xe9ken.png"
    assert io.raw_name(io.printable(r"a\xe9.png")) == r"a\xe9.png"


def test_a_path_is_found_by_either_form(tmp_path):
    (tmp_path / BROKEN).touch()
    assert io.existing(tmp_path / BROKEN).exists()
    assert io.existing(io.printable(tmp_path / BROKEN)).exists()
    assert io.existing(tmp_path / "none") == tmp_path / "none"


def test_tables_and_json_take_such_names(tmp_path):
    io.write_rows(tmp_path / "a.csv", ["file", "n"], [[BROKEN, 1]])
    assert list(csv.reader((tmp_path / "a.csv").open()))[1] == [r"br\xe9ken.png", "1"]
    io.write_json(tmp_path / "a.json", {"file": BROKEN})
    assert io.raw_name(json.loads((tmp_path / "a.json").read_text())["file"]) == BROKEN


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    io.write_text(tmp_path / "deep" / "a.txt", "one")

    def fail() -> None:
        with io.written_whole(tmp_path / "deep" / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.read_text() for file in (tmp_path / "deep").iterdir()] == ["one"]


@pytest.mark.parametrize("write", [io.make_folder, io.check_place, lambda path: io.write_text(path, "x")])
def test_a_place_that_cannot_be_made_is_named_with_the_reason(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/run cannot be made: .*file is a file; choose another out"):
        write(tmp_path / "file" / "run")
    with pytest.raises(UsageError, match=r"cannot be made: file name too long; choose another out"):
        write(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UsageError, match="cannot be made"):
        io.check_place(tmp_path / "run")
