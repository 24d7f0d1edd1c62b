"""What belongs to an image is found alike in folders, tables, shards and data sets of the hub."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchloom.data import EvalTransform, make_loader, open_source
from patchloom.data.base import Unreadable
from patchloom.data.sample import WithNamed
from patchloom.data.shards import ShardSource
from patchloom.errors import UsageError

datasets = pytest.importorskip("datasets")
pytest.importorskip("webdataset")
pytest.importorskip("pyarrow")

NAMES = ["cat", "dog", "cat", "", "owl"]
SETS: list[list[str] | None] = [["cat"], ["dog", "owl"], [], None, ["owl"]]


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_images(folder: Path, count: int = 5) -> list[str]:
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(pixels(number)).save(folder / name)
    return names


def written(kind: str, folder: Path, column: str, values: list[Any]) -> str:
    """Return a source of five images with values of a column (or key, or ending) of that name."""
    names = write_images(folder)
    if kind == "csv":
        cells = ["|" if value == [] else "|".join(value) if isinstance(value, list) else value for value in values]
        rows = [f"{name},{'' if cell is None else cell}" for name, cell in zip(names, cells, strict=True)]
        (folder / "a.csv").write_text("\n".join([f"file,{column}", *rows]))
        return f"{folder}/a.csv"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        given = [None if value == "" else value for value in values]
        parquet.write_table(pyarrow.table({"file": names, column: given}), folder / "a.parquet")
        return f"{folder}/a.parquet"
    if kind == "json":
        files: dict[str, bytes] = {}
        for number, value in enumerate(values):
            files[f"{number}.png"] = png(pixels(number))
            files[f"{number}.json"] = json.dumps({column: value}).encode()
        return write_tar(folder / "a.tar", files)
    if kind == "tar":
        files = {}
        for number, value in enumerate(values):
            files[f"{number}.{column}"] = value.encode()
            files[f"{number}.png"] = png(pixels(number))
        return write_tar(folder / "a.tar", files)
    given = [None if value == "" else value for value in values]
    rows = {"picture": [str(folder / name) for name in names], column: given}
    datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image()).save_to_disk(folder / "a")
    return f"hf:{folder}/a"


@pytest.mark.parametrize(
    ("kind", "column", "options"),
    [
        ("csv", "label", {}),
        ("csv", "Kind", {"label_field": "kind"}),
        ("parquet", "class", {}),
        ("parquet", "kind", {"label_field": "kind"}),
        ("tar", "cls", {}),
        ("tar", "label", {}),
        ("tar", "kind", {"label_field": ".kind"}),
        ("json", "label", {}),
        ("json", "grade", {}),
        ("json", "kind", {"label_field": "kind"}),
        ("hf", "label", {}),
        ("hf", "kind", {"label_field": "kind"}),
    ],
)
def test_a_class_is_the_same_wherever_it_stands(tmp_path, kind, column, options):
    source = open_source(written(kind, tmp_path, column, NAMES), by_index=True, **options)
    assert source.class_names == ["cat", "dog", "owl"]
    assert source.labels.tolist() == [0, 1, 0, -1, 2]
    assert [source.read(index).label for index in range(5)] == [0, 1, 0, -1, 2]
    assert (source.read(3).image.numpy() == pixels(3).transpose(2, 0, 1)).all()
    assert not source.multilabel


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "hf"])
@pytest.mark.parametrize(("column", "options"), [("labels", {}), ("found", {"label_field": "found"})])
def test_several_labels_are_the_same_wherever_they_stand(tmp_path, kind, column, options):
    source = open_source(written(kind, tmp_path, column, SETS), by_index=True, **options)
    assert source.class_names == ["cat", "dog", "owl"]
    expected = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [np.nan] * 3, [0, 0, 1]]
    assert np.array_equal(source.labels, np.array(expected, np.float32), equal_nan=True)
    assert np.array_equal(source.read(1).label, [0, 1, 1])
    assert source.multilabel


@pytest.mark.parametrize("kind", ["parquet", "json", "hf"])
def test_lists_of_numbers_are_shares_of_every_label_or_the_numbers_of_some(tmp_path, kind):
    (tmp_path / "a").mkdir()
    shares = open_source(
        written(kind, tmp_path / "a", "labels", [[0, 1, 1], [1, 0, 0], None, [0, 0, 0], [1, 1, 1]]), by_index=True
    )
    assert shares.class_names == ["0", "1", "2"]
    expected = [[0, 1, 1], [1, 0, 0], [np.nan] * 3, [0, 0, 0], [1, 1, 1]]
    assert np.array_equal(shares.labels, np.array(expected, np.float32), equal_nan=True)
    (tmp_path / "b").mkdir()
    numbers = open_source(written(kind, tmp_path / "b", "labels", [[2], [10, 2], [], [1], [0, 1]]), by_index=True)
    assert numbers.class_names == ["0", "1", "2", "10"]
    assert numbers.labels.tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]


def test_columns_and_keys_of_several_labels_are_chosen(tmp_path):
    rows = [{"Edema": 1, "Effusion": None, "age": 70}, {"Edema": 0, "Effusion": 0.5, "age": 51}]
    files = {}
    for number, row in enumerate(rows):
        files |= {f"{number}.png": png(pixels(number)), f"{number}.json": json.dumps(row).encode()}
    name = write_tar(tmp_path / "a.tar", files)
    write_images(tmp_path, 2)
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    made = datasets.Dataset.from_dict({"image": [f"{tmp_path}/{n}.png" for n in range(2)], **columns})
    made.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    for source in (name, f"hf:{tmp_path}/set"):
        opened = open_source(source, label_field="Edema,Effusion", by_index=True)
        assert opened.class_names == ["Edema", "Effusion"]
        assert np.array_equal(opened.labels, np.array([[1, np.nan], [0, 0.5]], np.float32), equal_nan=True)
        with pytest.raises(UsageError, match=r"label_field is Efusion, and .*; did you mean Effusion\?"):
            open_source(source, label_field="Edema,Efusion")


def test_shards_of_nothing_but_masks_say_how_they_are_taken_for_images(tmp_path):
    name = write_tar(tmp_path / "a.tar", {"1.mask.png": png(pixels(1))})
    with pytest.raises(UsageError, match=r"mask.png is taken for a mask, --image_field mask.png for an image"):
        open_source(name)
    assert open_source(name, image_field="mask.png").num_samples == 1


def test_columns_of_several_labels_are_chosen(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "a.csv").write_text("file,Edema,Effusion,patient\n0.png,1,0,p7\n1.png,,1,p8\n")
    source = open_source(f"{tmp_path}/a.csv", label_field="Edema,Effusion")
    assert source.class_names == ["Edema", "Effusion"]
    with pytest.raises(UsageError, match="patient is 'p7'"):
        open_source(f"{tmp_path}/a.csv")
    assert open_source(f"{tmp_path}/a.csv", label_field="patient").class_names == ["p7", "p8"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[0, 1, 1], [1, 0, 0]], [[0, 1, 1], [1, 0, 0]]),
        ([[2, 0], [1]], [[1, 0, 1], [0, 1, 0]]),
        ([{"a": 1, "b": None}, {"a": 0, "b": 0.5}], [[1, np.nan], [0, 0.5]]),
        (["a", ["a", "b"]], [[1, 0], [1, 1]]),
    ],
)
def test_json_holds_several_labels_as_shares_numbers_or_names(tmp_path, value, expected):
    files = {}
    for number, labels in enumerate(value):
        files |= {f"{number}.png": png(pixels(number)), f"{number}.json": json.dumps({"labels": labels}).encode()}
    stream = ShardSource(write_tar(tmp_path / "a.tar", files))
    assert stream.multilabel
    found = [sample.label for sample in stream.samples(epoch=0, seed=0, shuffle=False)]
    assert np.array_equal(found, np.array(expected, np.float32), equal_nan=True)
    assert np.array_equal(stream.by_index().labels, np.array(expected, np.float32), equal_nan=True)


def test_numbers_in_shards_stay_the_numbers_of_classes(tmp_path):
    files = {
        f"{n}.{end}": c
        for n, label in enumerate((5, -1, 2))
        for end, c in (("png", png(pixels(n))), ("cls", b"%d" % label))
    }
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert source.class_names == ["0", "1", "2", "3", "4", "5"]
    assert source.unlabelled == 1
    assert source.by_index().labels.tolist() == [5, -1, 2]


def test_words_for_a_missing_label_are_named_in_shards_too(tmp_path):
    files = {
        f"{n}.{end}": c
        for n, word in enumerate(("cat", "?", "dog"))
        for end, c in (("png", png(pixels(n))), ("cls", word.encode()))
    }
    source = open_source(write_tar(tmp_path / "a.tar", files), missing="NA,?", by_index=True)
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [0, -1, 1])


def test_which_file_of_a_shard_is_the_image_can_be_said(tmp_path):
    files = {}
    for number in range(2):
        files |= {f"{number}.left.png": png(pixels(number)), f"{number}.right.png": png(pixels(number + 7))}
        files |= {f"{number}.mask.png": png(pixels(number + 9))}
    name = write_tar(tmp_path / "a.tar", files)
    for asked, first in (
        ({}, 0),
        ({"image_field": "right"}, 7),
        ({"image_field": ".right.png"}, 7),
        ({"image_field": "mask.png"}, 9),
    ):
        source = open_source(name, by_index=True, **asked)
        assert len(source) == 2
        assert (source.read(0).image.numpy() == pixels(first).transpose(2, 0, 1)).all()


def test_what_is_asked_for_is_part_of_the_fingerprint(tmp_path):
    files = {f"{n}.{end}.png": png(pixels(n)) for n in range(2) for end in ("a", "b")}
    name = write_tar(tmp_path / "a.tar", files)
    assert len({open_source(name, image_field=one).fingerprint() for one in ("a", "b")}) == 2
    write_images(tmp_path, 2)
    rows = {column: [f"{tmp_path}/0.png", f"{tmp_path}/1.png"] for column in ("a", "b")}
    made = datasets.Dataset.from_dict(rows).cast_column("a", datasets.Image()).cast_column("b", datasets.Image())
    made.save_to_disk(tmp_path / "set")
    assert len({open_source(f"hf:{tmp_path}/set", image_field=one).fingerprint() for one in ("a", "b")}) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet", "json", "hf"])
@pytest.mark.parametrize("option", ["image_field", "label_field", "mask_field", "caption_field"])
def test_a_field_that_is_not_there_is_refused_with_those_that_are(tmp_path, kind, option):
    name = written(kind, tmp_path, "kind", NAMES)
    with pytest.raises(
        UsageError, match=rf"{option} is kinds, and .* has .*; did you mean kind\?|{option} is kinds, and"
    ):
        open_source(name, **{option: "kinds"})


def test_an_unknown_field_names_the_nearest(tmp_path):
    name = written("csv", tmp_path, "lable", NAMES)
    with pytest.raises(UsageError, match=r"label_field is label, and .*a.csv has lable; did you mean lable\?$"):
        open_source(name, label_field="label")


def test_sources_without_fields_refuse_their_names():
    with pytest.raises(UsageError, match="label_field is 'kind', which the source photos cannot obey"):
        open_source("photos", label_field="kind")


def test_a_label_may_be_called_mask(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "a.csv").write_text("file,mask,hat\n0.png,1,0\n1.png,0,1\n")
    assert open_source(f"{tmp_path}/a.csv").class_names == ["mask", "hat"]


def test_images_by_number_of_shards_read_what_the_stream_does(tmp_path):
    files = {}
    for number in range(5):
        files |= {f"{number}.png": b"junk" if number == 2 else png(pixels(number)), f"{number}.cls": b"%d" % number}
    stream = ShardSource([write_tar(tmp_path / "a.tar", files), write_tar(tmp_path / "b.tar", files)])
    indexed = stream.by_index()
    for index, sample in enumerate(stream.samples(epoch=0, seed=0, shuffle=False)):
        assert indexed.key(index) == sample.key
        if isinstance(sample, Unreadable):
            with pytest.raises(Exception, match=f"cannot read image '{sample.key}'"):
                indexed.read(index)
            continue
        assert (indexed.read(index).image == sample.image).all()
        assert indexed.read(index).label == sample.label
    packed = ShardSource(write_tar(tmp_path / "c.tar.gz", files, "w:gz"))
    with pytest.raises(UsageError, match=r"c.tar.gz is compressed, so it can only be read from its front; unpack it"):
        packed.by_index()


CAPTIONS = ["a cat", "größe", "", "two\nlines", "5.0"]


def captioned(kind: str, folder: Path, column: str) -> str:
    """Return a source of five images with captions."""
    if kind in ("csv", "parquet", "hf", "json"):
        given = [caption.replace("\n", " ") if kind == "csv" else caption for caption in CAPTIONS]
        return written(kind, folder, column, given)
    names = write_images(folder)
    if kind == "folder":
        for name, caption in zip(names, CAPTIONS, strict=True):
            if caption:
                (folder / column.replace("*", name.removesuffix(".png"))).parent.mkdir(exist_ok=True)
                (folder / column.replace("*", name.removesuffix(".png"))).write_text(caption)
        return str(folder)
    files = {}
    for number, caption in enumerate(CAPTIONS):
        files[f"{number}.png"] = png(pixels(number))
        files |= {f"{number}.{column}": caption.encode()} if caption else {}
    return write_tar(folder / "a.tar", files)


@pytest.mark.parametrize(
    ("kind", "column", "options"),
    [
        ("folder", "*.txt", {}),
        ("folder", "*_en.txt", {"caption_field": "_en.txt"}),
        ("folder", "words/*.txt", {"caption_field": "words/"}),
        ("csv", "caption", {}),
        ("csv", "words", {"caption_field": "words"}),
        ("parquet", "Text", {}),
        ("tar", "txt", {}),
        ("tar", "words", {"caption_field": "words"}),
        ("json", "caption", {}),
        ("json", "words", {"caption_field": "words"}),
        ("hf", "caption", {}),
        ("hf", "words", {"caption_field": "words"}),
    ],
)
@pytest.mark.parametrize("by_index", [True, False])
def test_a_caption_is_the_same_wherever_it_stands(tmp_path, kind, column, options, by_index):
    source = open_source(captioned(kind, tmp_path, column), by_index=by_index, **options)
    assert source.captions
    loader = make_loader(source, WithNamed(EvalTransform(8), "caption"), 3, shuffle=False, num_workers=0)
    found = [caption for batch in loader for caption in batch["caption"]]
    assert found == [caption.replace("\n", " ") if kind == "csv" else caption for caption in CAPTIONS]
    if by_index:
        assert [source.caption(index) for index in range(5)] == found
    plain = next(iter(make_loader(source, EvalTransform(8), 5, shuffle=False, num_workers=0)))
    assert "caption" not in plain


@pytest.mark.parametrize("kind", ["folder", "csv", "tar"])
def test_a_caption_that_is_not_utf_8_costs_its_image_only_where_captions_are_read(tmp_path, kind):
    write_images(tmp_path, 2)
    if kind == "folder":
        (tmp_path / "0.txt").write_bytes(b"a caf\xe9")
        name = str(tmp_path)
    elif kind == "csv":
        (tmp_path / "a.csv").write_bytes(b"file,caption\n0.png,a caf\xe9\n1.png,tea\n")
        name = f"{tmp_path}/a.csv"
    else:
        files = {"0.png": png(pixels(0)), "0.txt": b"a caf\xe9", "1.png": png(pixels(1))}
        name = write_tar(tmp_path / "a.tar", files)
    source = open_source(name)
    for view, skipped in (
        (EvalTransform(8), []),
        (WithNamed(EvalTransform(8), "caption"), ["its caption is not UTF-8"]),
    ):
        batch = next(iter(make_loader(source, view, 2, shuffle=False, num_workers=0)))
        assert [reason for _, reason in batch["skipped"]] == skipped
        assert len(batch["key"]) == 2 - len(skipped)


def test_several_captions_are_read_as_their_first(tmp_path):
    source = open_source(written("hf", tmp_path, "caption", [["a", "b"], [], ["c"], None, ["d"]]))
    assert [source.caption(index) for index in range(5)] == ["a", "", "c", "", "d"]


def test_captions_are_no_files_passed_over_and_masks_no_images(tmp_path, capsys):
    write_images(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("words")
        Image.fromarray(pixels(number)).save(tmp_path / f"{number}_gt.png")
    (tmp_path / "notes.txt").write_text("x")
    source = open_source(str(tmp_path), mask_field="_gt")
    assert [source.key(index) for index in range(len(source))] == ["0.png", "1.png", "2.png"]
    assert "1 files are passed over for their suffix (.txt 1)" in capsys.readouterr().err
    kept = open_source(str(tmp_path), image_field="_gt")
    assert [kept.key(index) for index in range(len(kept))] == ["0_gt.png", "1_gt.png", "2_gt.png"]
    assert kept.caption(1) == "words"
    for option in ("image_field", "mask_field", "caption_field"):
        with pytest.raises(UsageError, match=f"{option} is _tg, and no file in .* is called so"):
            open_source(str(tmp_path), **{option: "_tg"})
    with pytest.raises(UsageError, match=r"label_field is 'kind', which the source .* cannot obey"):
        open_source(str(tmp_path), label_field="kind")
