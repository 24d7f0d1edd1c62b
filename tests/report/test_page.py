"""The report page: self-contained, safe with any text, whole or not there."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from patchloom.errors import UsageError
from patchloom.report import Figure, Section, add_section, write_report


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
    assert "<script" not in page
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
    assert "Read &lt;this&gt;." in page
    (tmp_path / "other.html").write_text("<p>not ours</p>")
    with pytest.raises(UsageError, match="is not a report"):
        add_section(tmp_path / "other.html", Section("x"))
