"""Embedding a pile of images: one vector per image, with its file name, in a file others read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import MissingExtraError, UsageError
from patchloom.features.extract import extract
from patchloom.models.bundle import save_bundle

QUICK = {"num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("ccvit_tiny_patch4_32", image_size=16, embed_dim=48, depth=2, num_heads=3)


@pytest.fixture(scope="module")
def bundle(encoder, tmp_path_factory) -> str:
    return str(save_bundle(encoder, tmp_path_factory.mktemp("bundles") / "run" / "model").parent)


def write_images(folder: Path, names: tuple[str, ...]) -> str:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return str(folder)


@pytest.fixture
def labelled(tmp_path) -> str:
    return write_images(tmp_path / "labelled", ("cat/1.png", "cat/2.png", "dog/1.png"))


@pytest.fixture
def flat(tmp_path) -> str:
    return write_images(tmp_path / "flat", ("a.png", "b.png"))


def test_npz_holds_names_vectors_and_labels(encoder, bundle, labelled, tmp_path):
    out = pl.embed(bundle, data=labelled, out=str(tmp_path / "new" / "v.npz"), **QUICK)
    assert out == str(tmp_path / "new" / "v.npz")
    expected = extract(encoder, open_source(labelled), num_workers=0, progress=False)
    with np.load(out, allow_pickle=False) as held:
        assert held["files"].tolist() == ["cat/1.png", "cat/2.png", "dog/1.png"]
        assert held["labels"].tolist() == [0, 0, 1]
        assert held["vectors"].dtype == np.float32
        np.testing.assert_allclose(held["vectors"], expected.vectors.numpy(), rtol=1e-4, atol=1e-5)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["v.npz"]


@pytest.mark.extra("parquet")
def test_parquet_holds_the_same(bundle, labelled, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(pl.embed(bundle, data=labelled, out=str(tmp_path / "v.parquet"), **QUICK))
    with np.load(pl.embed(bundle, data=labelled, out=str(tmp_path / "v.npz"), **QUICK)) as held:
        np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), held["vectors"])
    assert table.column_names == ["file", "label", "vector"]
    assert table["file"].to_pylist() == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert table["label"].to_pylist() == [0, 0, 1]
    assert str(table.schema.field("vector").type.value_type) == "float"


@pytest.mark.extra("parquet")
def test_images_without_labels_have_no_label_column(bundle, flat, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(pl.embed(bundle, data=flat, out=str(tmp_path / "v.parquet"), **QUICK))
    assert table.column_names == ["file", "vector"]
    with np.load(pl.embed(bundle, data=flat, out=str(tmp_path / "v.npz"), **QUICK)) as held:
        assert held["labels"].tolist() == [-1, -1]


def test_size_pooling_and_precision_are_taken(bundle, flat, tmp_path):
    out = str(tmp_path / "v.npz")
    options = {"image_size": 24, "pool": "cls+avg", "precision": "bf16"}
    with np.load(pl.embed(bundle, data=flat, out=out, **options, **QUICK)) as held:
        assert held["vectors"].shape == (2, 96)
        assert held["vectors"].dtype == np.float32


def test_broken_images_are_left_out_and_named(bundle, flat, tmp_path, capsys):
    (Path(flat) / "broken.png").write_bytes(b"not an image")
    with np.load(pl.embed(bundle, data=flat, out=str(tmp_path / "v.npz"), **QUICK)) as held:
        assert held["files"].tolist() == ["a.png", "b.png"]
    assert "left out broken.png: " in capsys.readouterr().err


def test_nothing_is_replaced_unasked(bundle, flat, tmp_path):
    out = tmp_path / "v.npz"
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists; choose another file, or set overwrite"):
        pl.embed(bundle, data=flat, out=str(out), **QUICK)
    assert out.read_bytes() == b"precious"
    pl.embed(bundle, data=flat, out=str(out), overwrite=True, **QUICK)
    assert np.load(out)["vectors"].shape == (2, 48)


def test_a_write_that_fails_leaves_the_old_file(bundle, flat, tmp_path, monkeypatch):
    out = tmp_path / "out" / "v.npz"
    out.parent.mkdir()
    out.write_bytes(b"precious")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pl.embed(bundle, data=flat, out=str(out), overwrite=True, **QUICK)
    assert out.read_bytes() == b"precious"
    assert [p.name for p in out.parent.iterdir()] == ["v.npz"]


def test_parquet_without_pyarrow_names_the_extra_before_any_work(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "patchloom\[parquet\]"'):
        pl.embed(bundle, data="no/such/folder", out=str(tmp_path / "v.parquet"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "v.csv"}, r"out is v\.csv; name a file that ends in \.parquet or \.npz"),
        ({"out": "."}, "is a folder; name a file in it"),
        ({"model": "no/such/run"}, "unknown encoder 'no/such/run'"),
        ({"model": "ccvit_tiny_patch4_32"}, "has no published weights"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"image_size": 18}, "not divisible by patch size 4"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, bundle, flat, tmp_path):
    asked = {"model": bundle, "data": flat, "out": str(tmp_path / "v.npz")} | settings
    with pytest.raises(UsageError, match=message):
        pl.embed(**asked, **QUICK)
    assert not (tmp_path / "v.npz").exists()


def test_captions_go_into_the_file_and_one_that_cannot_be_read_costs_no_vector(bundle, flat, tmp_path, capsys):
    (Path(flat) / "a.txt").write_bytes(b"caf\xe9")
    (Path(flat) / "b.txt").write_text("a hat\n")
    with np.load(pl.embed(bundle, data=flat, out=str(tmp_path / "v.npz"), **QUICK)) as held:
        assert held["captions"].tolist() == ["", "a hat"]
    assert "no caption for a.png: its caption is not UTF-8" in capsys.readouterr().err
    parquet = pytest.importorskip("pyarrow.parquet")
    write_images(Path(flat), ("c.png",))
    (Path(flat) / "a.csv").write_text("file,words\nc.png,see\na.png,\n")
    out = pl.embed(bundle, data=f"{flat}/a.csv", out=str(tmp_path / "v.parquet"), caption_field="words", **QUICK)
    table = parquet.read_table(out).to_pydict()
    assert (table["file"], table["caption"]) == (["c.png", "a.png"], ["see", None])
    assert "label" not in table
