"""Label files: classes, several labels, splits; what they may not say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.data import open_source
from patchloom.errors import UsageError


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in "abcd":
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "deep" / f"{name}.png")
    return tmp_path


def write(folder: Path, text: str) -> str:
    (folder / "labels.csv").write_text(text)
    return str(folder / "labels.csv")


def test_one_class_each(folder):
    source = open_source(write(folder, "file,label\ndeep/b.png,ill\ndeep/a.png,well\ndeep/c.png,\n"))
    assert source.class_names == ["ill", "well"]
    assert source.labels.tolist() == [0, 1, -1]
    assert not source.multilabel
    assert (source.key(0), source.read(1).label, source.read(0).image.shape) == ("deep/b.png", 1, (3, 8, 8))


def test_grades_are_in_the_order_of_their_numbers(folder):
    source = open_source(write(folder, "file,grade\na.png,10\nb.png,2\nc.png,0\nd.png,2\n"))
    assert source.class_names == ["0", "2", "10"]
    assert source.labels.tolist() == [2, 1, 0, 1]


def test_several_labels_each_with_gaps(folder):
    source = open_source(write(folder, "Image, Edema ,Mass\ndeep/a.png,1,0\ndeep/b.png,,1\ndeep/c.png,-1,0.5\n"))
    assert source.multilabel
    assert source.class_names == ["Edema", "Mass"]
    np.testing.assert_array_equal(source.labels, np.array([[1, 0], [np.nan, 1], [np.nan, 0.5]], dtype=np.float32))


def test_splits(folder):
    path = write(folder, "file,split,label\na.png,train,x\nb.png,test,y\nc.png,test,x\n")
    assert len(open_source(path)) == 3
    test = open_source(f"{path}:test")
    assert [test.key(n) for n in range(2)] == ["deep/b.png", "deep/c.png"]
    assert open_source(f"{path}:train").fingerprint() != test.fingerprint()


@pytest.mark.parametrize(
    ("text", "ending", "message"),
    [
        ("file,label\n", "", "lists no image"),
        ("label\nx\n", "", "has the columns label; it needs file"),
        ("file\na.png\n", "", "it needs file, and label"),
        ("file,label\na.png,x\na.png,y\n", "", "names a.png 2 times"),
        ("file,label\nz.png,x\n", "", "z.png"),
        ("file,A,B\na.png,1,0\nb.png,yes,0\n", "", "line 3: A is 'yes'"),
        ("file,A,B\na.png,1,7\n", "", "line 2: B is '7'"),
        ("file,label\na.png,x\n", ":test", "has no column split"),
        ("file,label,split\na.png,x,train\n", ":test", r"has no split 'test' \(it has train\)"),
    ],
)
def test_what_a_label_file_may_not_say(folder, text, ending, message):
    with pytest.raises(UsageError, match=message):
        open_source(write(folder, text) + ending)


def test_a_label_file_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"no label file there\.csv"):
        open_source("there.csv")
    with pytest.raises(UsageError, match=r"no label file there\.csv"):
        open_source("there.csv:test")
