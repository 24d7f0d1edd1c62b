"""Label files: classes, several labels, splits; what they may not say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.data import open_source
from patchloom.data.base import UnreadableImageError
from patchloom.data.labels import number_order
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


@pytest.mark.parametrize("word", ["none", "NA", "nan", "-1", "?", "null"])
def test_a_word_is_a_class_and_only_an_empty_cell_is_missing(folder, word):
    path = write(folder, f"file,label\na.png,{word}\nb.png,mild\nc.png,{word}\nd.png,\n")
    source = open_source(path)
    assert sorted(source.class_names) == sorted([word, "mild"])
    assert source.labelled().tolist() == [True, True, True, False]
    other = open_source(path, missing=f"x,{word}")
    assert other.class_names == ["mild"]
    assert other.labels.tolist() == [-1, 0, -1, -1]


def test_words_for_unknown_among_several_labels_are_named_and_numbers_that_are_no_share_counted(folder, capsys):
    path = write(folder, "file,A,B\na.png,1,?\nb.png,0,1\n")
    with pytest.raises(UsageError, match=r"line 2: B is '\?'.*--missing \?"):
        open_source(path)
    assert np.isnan(open_source(path, missing="?").labels).sum() == 1
    truths = open_source(write(folder, "file,A,B\na.png,True,0\nb.png,FALSE,1.0\n"))
    assert truths.labels.tolist() == [[1, 0], [0, 1]]
    open_source(write(folder, "file,A,B\na.png,1,-1\nb.png,nan,1\n"))
    assert "2 labels are -1 or nan and taken for unknown" in capsys.readouterr().err


def test_a_parquet_file_says_the_same_as_a_csv_file(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"file": ["a.png", "b.png", "c.png"], "split": ["x", "y", "y"], "label": [2.0, None, 10.0]}
    parquet.write_table(pyarrow.table(rows), folder / "labels.parquet")
    text = "file,split,label\na.png,x,2\nb.png,y,\nc.png,y,10\n"
    for ending in ("", ":y"):
        found, other = open_source(f"{folder}/labels.parquet{ending}"), open_source(write(folder, text) + ending)
        assert found.class_names == other.class_names
        assert found.labels.tolist() == other.labels.tolist()
        assert found.key(0) == other.key(0)
    (folder / "labels.parquet").write_text("no table")
    with pytest.raises(UsageError, match="is no Parquet file"):
        open_source(f"{folder}/labels.parquet")


def test_cells_are_read_as_they_are_meant(folder):
    text = 'file , label\na.png, mild \nb.png,mild\nc.png," "\n,\nd.png\n'
    source = open_source(write(folder, text))
    assert source.class_names == ["mild"]
    assert source.labels.tolist() == [0, 0, -1, -1]
    gaps = open_source(write(folder, "file,label\na.png,1.0\nb.png,0\nc.png,1\nd.png,-2.00\n"))
    assert gaps.class_names == ["-2", "0", "1"]


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_classes_that_are_no_rising_numbers_have_one_order(folder, first):
    # What is not told apart as numbers would come in the order of a set, which differs between processes.
    rows = ["a.png,nan", "b.png,2", "c.png,02", "d.png,1e1"]
    turned = [*rows[first:], *rows[:first]]
    assert open_source(write(folder, "\n".join(["file,label", *turned]))).class_names == ["02", "2", "1e1", "nan"]
    names = ["nan", "2", "02", "1e1"]
    assert number_order([*names[first:], *names[:first]]) == ["02", "2", "1e1", "nan"]


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


def test_a_parquet_file_that_holds_images_is_a_data_set_of_the_hub(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"image": [{"bytes": b"an image", "path": None}], "label": [1]}
    parquet.write_table(pyarrow.table(rows), folder / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet holds images in the column image .*; give its folder as hf:"):
        open_source(f"{folder}/a.parquet")


def test_a_split_has_the_labels_of_the_whole_table(folder):
    text = "file,labels,split\ndeep/a.png,x|y,train\ndeep/b.png,z,train\ndeep/c.png,y,test\n"
    test = open_source(write(folder, text) + ":test")
    assert (test.class_names, test.labels.tolist()) == (["x", "y", "z"], [[0, 1, 0]])


def test_an_image_with_captions_may_have_several_rows_and_some_may_be_missing(folder, capsys):
    rows = "file,caption\ndeep/a.png,one\ndeep/a.png,two\ndeep/a.png,one\ndeep/b.png,\ngone.png,x\ndeep/b.png,other\n"
    source = open_source(write(folder, rows))
    assert [source.key(index) for index in range(3)] == ["deep/a.png", "deep/b.png", "gone.png"]
    assert [list(source.captions_of(index)) for index in range(3)] == [["one", "two"], ["other"], ["x"]]
    assert source.caption(0) == "one"
    assert source.caption_counts.tolist() == [2, 1, 1]
    assert "1 of 3 images listed are not below" in capsys.readouterr().err
    with pytest.raises(UnreadableImageError, match=r"gone\.png"):
        source.read(2)
    with pytest.raises(UsageError, match="2 of 3 images listed are not below"):
        open_source(write(folder, "file,caption\ndeep/a.png,x\ngone.png,y\nlost.png,z\n"))
    with pytest.raises(UsageError, match=r"names a\.png several times, and label is 'x' and 'y'"):
        open_source(write(folder, "file,label,caption\na.png,x,one\na.png,y,two\n"))


@pytest.mark.parametrize(("ending", "mark"), [(".tsv", "\t"), (".csv", "\t"), (".csv", ";")])
def test_tables_of_open_clip_and_of_spreadsheets_are_read(folder, ending, mark):
    table = folder / f"pairs{ending}"
    table.write_text(f"filepath{mark}title\na.png{mark}a dog, running\n")
    assert open_source(str(table)).caption(0) == "a dog, running"
