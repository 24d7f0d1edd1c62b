"""From slides to features on disk, from Python and from the command line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch

from patchloom import cli
from patchloom.errors import UsageError
from patchloom.evaluate.slides import embed as embed_module
from patchloom.evaluate.slides.embed import embed_tiles
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.wsi import Slide
from slides_support import slide_pixels, write_slide

pytestmark = pytest.mark.extra("slides")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
QUICK = {"tile_size": 32, "device": "cpu", "batch_size": 50}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "one.tif", slide_pixels((500, 400), (64, 64, 320, 256)))
    write_slide(folder / "deep" / "two.tif", slide_pixels((800, 600), (0, 0, 400, 400)), mpp=0.25)
    write_slide(folder / "glass.tif", slide_pixels((300, 300), None))
    write_slide(folder / "coarse.tif", slide_pixels((300, 300), (0, 0, 200, 200)), mpp=2.0)
    (folder / "broken.tif").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def made(encoder, slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "features"
    return embed_tiles(encoder, str(slides), str(out), **QUICK), out


def test_features_are_the_encoders_of_each_tile(made, encoder, slides):
    figures, out = made
    assert (figures["slides"], figures["new"]) == (2, 2)
    reasons = {row["slide"]: row["reason"] for row in figures["skipped"]}
    assert list(reasons) == ["broken", "coarse", "glass"]
    assert reasons["broken"] == "not a slide"
    assert reasons["coarse"].startswith("scanned at 2 um/px")
    assert reasons["glass"].startswith("no tissue")
    store = TileStore(out)
    assert store.names() == ["one", "two"]
    bag = store.bag("one")
    assert len(bag) == figures["tiles"] - len(store.bag("two"))
    assert isinstance(bag.features.base, np.memmap) or isinstance(bag.features, np.memmap)
    with Slide(slides / "one.tif") as slide, torch.no_grad():
        mean, std = (torch.tensor(encoder.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        for number in (0, len(bag) // 2, len(bag) - 1):
            tile = slide.tile(bag.level, *bag.places[number].tolist(), 32)
            image = (torch.from_numpy(tile.copy()).permute(2, 0, 1) / 255 - mean) / std
            expected = encoder.forward_features(image[None])[0, 0]
            torch.testing.assert_close(torch.from_numpy(bag.features[number].copy()), expected, atol=1e-5, rtol=1e-5)
    table = np.load(out / "one" / "features.npy")
    assert table.dtype == np.float32
    assert table.shape == (len(bag), 3 + 24)
    assert (table[:, 0] == bag.level).all()
    # Both are cut at half a micrometre: the finer slide one level below its own.
    assert store.slide("two")["tile_mpp"] == store.slide("one")["tile_mpp"] == 0.5


def test_a_second_run_only_does_what_is_missing(made, encoder, slides, monkeypatch):
    _, out = made
    before = (out / "one" / "features.npy").stat().st_mtime_ns
    shutil.rmtree(out / "two")
    figures = embed_tiles(encoder, str(slides), str(out), **QUICK)
    assert (figures["slides"], figures["new"]) == (2, 1)
    assert (out / "one" / "features.npy").stat().st_mtime_ns == before

    def stop(*_):
        raise KeyboardInterrupt

    shutil.rmtree(out / "two")
    monkeypatch.setattr(embed_module, "pooled", stop)
    with pytest.raises(KeyboardInterrupt):
        embed_tiles(encoder, str(slides), str(out), **QUICK)
    monkeypatch.undo()
    assert not (out / "two").exists()
    assert embed_tiles(encoder, str(slides), str(out), **QUICK)["new"] == 1


@pytest.mark.parametrize("change", ["weights", "tiles"])
def test_a_store_holds_features_of_one_kind(made, encoder, slides, change):
    _, out = made
    other = timm.create_model("vit_tiny_patch16_224", **TINY).eval() if change == "weights" else encoder
    settings = QUICK | ({"min_tissue": 0.3} if change == "tiles" else {})
    with pytest.raises(UsageError, match=f"was made with {change}"):
        embed_tiles(other, str(slides), str(out), **settings)


def test_threads_sizes_and_types_change_little(made, encoder, slides, tmp_path):
    _, out = made
    settings = QUICK | {"num_workers": 0, "batch_size": 7}
    embed_tiles(encoder, str(slides / "one.tif"), str(tmp_path / "serial"), **settings)
    embed_tiles(encoder, str(slides / "one.tif"), str(tmp_path / "half"), **QUICK, dtype="float16")
    one = TileStore(out).bag("one")
    serial, half = (TileStore(tmp_path / name).bag("one") for name in ("serial", "half"))
    np.testing.assert_allclose(serial.features, one.features, atol=1e-5)
    assert half.features.dtype == np.float16
    np.testing.assert_allclose(half.features, one.features, atol=2e-3, rtol=2e-3)
    np.testing.assert_array_equal(half.places, one.places)


def test_from_the_command_line(slides, tmp_path, capsys):
    out = tmp_path / "tiles"
    assert cli.main(["slides", "tile", str(slides), "--out", str(out), "--tile_size", "32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["slides"] == 2
    page = (out / "report.html").read_text()
    assert all(word in page for word in ("Tissue and tiles", "Left out", "glass", "--tile_size 32"))
    assert (out / "one" / "overview.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="no features; make them: patchloom slides embed"):
        TileStore(out).bag("one")
    arguments = ["--encoder", "vit_tiny_patch16_224", "--untrained", "--image_size", "32", "--tile_size", "64"]
    target = ["--out", str(tmp_path / "features"), "--max_tiles", "5", "--device", "cpu"]
    assert cli.main(["slides", "embed", str(slides), *arguments, *target]) == 0
    assert TileStore(tmp_path / "features").bag("one").features.shape == (5, 192)
    capsys.readouterr()
    assert cli.main(["slides", "embed", str(slides / "glass.tif"), *arguments, "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "none of the 1 slides" in error
    assert "no tissue" in error


def test_stores_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="holds no tile features"):
        TileStore(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no tile features"):
        TileStore(tmp_path, {"encoder": None})
    published = tmp_path / "published"
    (published / "slide-1").mkdir(parents=True)
    np.save(published / "slide-1" / "features.npy", np.ones((4, 8), np.float32))
    bag = TileStore(published).bag("slide-1")
    assert bag.features.shape == (4, 5)
    (published / "slide-1" / "features.npy").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"features.npy is damaged"):
        TileStore(published).bag("slide-1")
    with pytest.raises(UsageError, match="no features of slide 'slide-2'"):
        TileStore(published).bag("slide-2")
