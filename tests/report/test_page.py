"""The report page: self-contained, safe with any text, whole or not there."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from patchloom.errors import UsageError
from patchloom.features.health import verdict
from patchloom.report import Figure, Section, add_section, write_report
from patchloom.report.page import format_value


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(tmp_path, **changes):
    arguments = {
        "title": "pretrain ccvit: photos",
        "facts": {"images": 1234567, "loss": 0.123456},
        "sections": [Section("Codebook", "All centroids.", [Figure(picture(), "a red square", "note the red")])],
        "command": "patchloom pretrain ccvit",
    }
    return write_report(tmp_path / "deep" / "report.html", **{**arguments, **changes})


def test_everything_is_in_the_one_file(tmp_path):
    page = write(tmp_path).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    encoded = re.search(r"base64,([^\"]+)", page)
    assert base64.b64decode(encoded[1]) == picture()
    assert "@import" not in page
    assert "url(" not in page


def test_text_of_users_cannot_become_markup(tmp_path):
    hostile = "<script>alert(1)</script>"
    page = write(
        tmp_path,
        title=hostile,
        command=hostile,
        facts={hostile: hostile},
        verdict=hostile,
        sections=[Section(hostile, hostile, [Figure(picture(), f'"{hostile}', hostile)], [{hostile: hostile}])],
    ).read_text()
    assert page.count("<script") == 1  # the page's own, for the copy button
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;") >= 9


def test_figures_read_like_figures(tmp_path):
    page = write(tmp_path).read_text()
    assert ">1,234,567<" in page
    assert ">0.1235<" in page
    assert 'alt="a red square"' in page
    assert "note the red" in page


def test_tables_have_their_header_and_a_verdict_of_collapse_stands_out(tmp_path):
    section = Section("Settings", table=[{"setting": "lr", "value": 0.1}, {"setting": "k", "value": 8}])
    page = write(tmp_path, sections=[section], verdict="The features have collapsed").read_text()
    assert "<th>setting</th><th>value</th>" in page
    assert "<td>lr</td><td>0.1</td>" in page
    assert 'class="verdict alarm"' in page
    diverged = verdict(math.nan, 0.5, 64)
    assert 'class="verdict alarm"' in write(tmp_path, verdict=diverged).read_text()
    assert 'class="verdict"' in write(tmp_path, verdict="healthy").read_text()


def test_a_report_is_replaced_whole(tmp_path):
    write(tmp_path, title="first")
    write(tmp_path, title="second")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    assert "second" in (tmp_path / "deep" / "report.html").read_text()


def test_a_section_is_added_in_front(tmp_path):
    path = add_section(write(tmp_path), Section("First of all", "Read <this>."))
    page = path.read_text()
    assert page.index('id="first-of-all"') < page.index('id="codebook"')
    assert page.index('href="#first-of-all"') < page.index('href="#codebook"')
    again = add_section(path, Section("Codebook")).read_text()
    assert again.count('id="codebook"') == again.count('id="codebook-2"') == again.count('href="#codebook-2"') == 1
    assert "Read &lt;this&gt;." in page
    (tmp_path / "other.html").write_text("<p>not ours</p>")
    with pytest.raises(UsageError, match="is not a report"):
        add_section(tmp_path / "other.html", Section("x"))


def test_every_entry_of_the_contents_leads_to_its_own_section(tmp_path):
    titles = ["Codebook", "Codebook", "Repeat this run", "???", "Größe"]
    page = write(tmp_path, sections=[Section(title) for title in titles]).read_text()
    targets = re.findall(r'<section id="([^"]+)"', page)
    assert len(targets) == len(set(targets)) == 6
    assert re.findall(r'href="#([^"]+)"', page) == targets


def test_values_read_as_people_write_them():
    values = [np.float32(0.5), np.int64(12345), True, None, math.inf, -math.inf, 1e-5, 123456.7, (0.9, 0.98)]
    shown = ["0.5", "12,345", "yes", "–", "∞", "−∞", "1e-05", "123,457", "(0.9, 0.98)"]
    assert [format_value(value) for value in values] == shown


def test_a_table_may_have_gaps(tmp_path):
    section = Section("Classes", table=[{"class": "cat", "images": 3}, {"class": "dog", "note": "new"}])
    page = write(tmp_path, sections=[section]).read_text()
    assert "<th>class</th><th>images</th><th>note</th>" in page
    assert "<tr><td>dog</td><td></td><td>new</td></tr>" in page
    assert "<table" not in write(tmp_path, sections=[Section("Empty", table=[])]).read_text()


def test_pictures_keep_their_place_while_loading(tmp_path):
    assert re.search(r'width="3" height="2"', write(tmp_path).read_text())
    with pytest.raises(UsageError, match="must be a PNG"):
        write(tmp_path, sections=[Section("Broken", figures=[Figure(b"GIF89a", "not a PNG")])])


def test_a_failed_write_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path, title="first")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, title="second")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    assert "first" in (tmp_path / "deep" / "report.html").read_text()


def test_file_names_that_are_no_text_do_not_stop_the_report(tmp_path):
    assert r"runs/\xff" in write(tmp_path, command="runs/\udcff").read_text()


def test_no_command_leaves_no_empty_box_and_no_script(tmp_path):
    page = write(tmp_path, command="").read_text()
    assert "Repeat this run" not in page
    assert "<script" not in page
