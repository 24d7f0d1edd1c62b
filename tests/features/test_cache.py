"""Features on disk: found again by content, replaced when weights or images change, never half written."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.cli import main
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.features import cache as module
from patchloom.features.cache import cache_folder, cached_features, clear, list_entries
from patchloom.features.extract import extract
from patchloom.features.fingerprint import source_hash, weights_hash

QUICK = {"num_workers": 0, "device": "cpu", "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("ccvit_tiny_patch4_32", image_size=16, embed_dim=48, depth=3, num_heads=3).eval()


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.bmp")
    (tmp_path / "images" / "b" / "broken.png").write_bytes(b"no image")
    return tmp_path / "images"


def never(*args, **kwargs):
    raise AssertionError("extracted again")


def same(one, other) -> bool:
    return (
        torch.equal(one.vectors, other.vectors)
        and torch.equal(one.labels, other.labels)
        and (one.keys, one.skipped) == (other.keys, other.skipped)
    )


def test_the_second_time_comes_from_disk_and_is_the_same(encoder, images, tmp_path, monkeypatch):
    source = open_source(str(images))
    plain = extract(encoder, source, **QUICK)
    first = cached_features(encoder, source, cache=tmp_path / "c", **QUICK)
    monkeypatch.setattr(module, "extract_into", never)
    again = cached_features(encoder, open_source(str(images)), cache=tmp_path / "c", **QUICK)
    assert same(plain, first)
    assert same(plain, again)
    assert len(plain.keys) == 10
    assert plain.skipped[0][0] == "b/broken.png"
    again.vectors[0] = 0  # a reader's own copy
    assert same(plain, cached_features(encoder, source, cache=tmp_path / "c", **QUICK))


def test_workers_batches_and_devices_do_not_make_other_features(encoder, images, tmp_path, monkeypatch):
    cached_features(encoder, open_source(str(images)), cache=tmp_path, **QUICK)
    monkeypatch.setattr(module, "extract_into", never)
    cached_features(encoder, open_source(str(images)), cache=tmp_path, num_workers=1, batch_size=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": "avg"},
        {"layers": (-1,)},
        {"layers": (-2, -1)},
        {"image_size": 24},
        {"precision": "bf16"},
        {"view": "whole"},
    ],
)
def test_other_ways_of_making_vectors_are_other_entries(encoder, images, tmp_path, settings):
    source = open_source(str(images))
    cached_features(encoder, source, cache=tmp_path, **QUICK)
    other = cached_features(encoder, source, cache=tmp_path, **QUICK, **settings)
    assert same(other, extract(encoder, source, **QUICK, **settings))
    assert len(list_entries(tmp_path)) == 2


def changes(encoder):
    """Encoders that differ from one in a single respect each."""
    changed = copy.deepcopy(encoder)
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.weight[3, 4] += 1e-6
    yield "one weight", changed
    negated = copy.deepcopy(encoder)
    with torch.no_grad():
        negated.blocks[0].attn.proj.weight[:, 0].neg_()
    yield "signs", negated
    shown = copy.deepcopy(encoder)
    shown.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    yield "normalisation", shown
    active = copy.deepcopy(encoder)
    active.blocks[0].mlp.act = torch.nn.ReLU()
    yield "activation", active
    with_buffer = copy.deepcopy(encoder)
    with_buffer.register_buffer("angles", torch.ones(2), persistent=False)
    yield "a buffer outside the state dict", with_buffer


def test_all_that_makes_the_output_is_in_the_hash(encoder):
    own = weights_hash(encoder)
    assert own == weights_hash(copy.deepcopy(encoder))
    for what, other in changes(encoder):
        assert weights_hash(other) != own, what


def test_changed_weights_take_the_place_of_the_old_entry(encoder, images, tmp_path, capsys):
    source = open_source(str(images))
    first = cached_features(encoder, source, cache=tmp_path, name="runs/x", **QUICK)
    other = cached_features(encoder, source, cache=tmp_path, name="runs/y", **QUICK)
    assert capsys.readouterr().err == ""
    changed = next(changes(encoder))[1]
    anew = cached_features(changed, source, cache=tmp_path, name="runs/x", **QUICK)
    assert "the weights of runs/x changed since features were kept" in capsys.readouterr().err
    assert same(first, other)
    assert not torch.equal(first.vectors, anew.vectors)
    assert sorted(entry["encoder"] for entry in list_entries(tmp_path)) == ["runs/x", "runs/y"]


def test_changed_images_are_extracted_anew(encoder, images, tmp_path, capsys):
    before = cached_features(encoder, open_source(str(images)), cache=tmp_path, name="e", **QUICK)
    file = images / "a" / "0.bmp"
    Image.new("RGB", (16, 16), (9, 200, 9)).save(file)  # of the same size
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1000))
    after = cached_features(encoder, open_source(str(images)), cache=tmp_path, name="e", **QUICK)
    assert f"{images} changed since" in capsys.readouterr().err
    assert (before.vectors != after.vectors).any(1).tolist() == [True] + [False] * 9
    (images / "a" / "0.bmp").unlink()
    assert len(cached_features(encoder, open_source(str(images)), cache=tmp_path, name="e", **QUICK).keys) == 9


def test_other_labels_are_another_source(images):
    one, other = open_source(str(images)), open_source(str(images))
    assert source_hash(one) == source_hash(other)
    other.labels = one.labels[::-1].copy()
    assert source_hash(one) != source_hash(other)
    assert source_hash(one) != source_hash(open_source(str(images), in_chans=1))


def test_a_damaged_entry_is_made_again(encoder, images, tmp_path):
    source = open_source(str(images))
    whole = extract(encoder, source, **QUICK)
    cached_features(encoder, source, cache=tmp_path, **QUICK)
    for name in ("vectors.npy", "labels.npy", "keys.npy", "about.json"):
        (entry,) = tmp_path.glob(f"*/*/{name}")
        entry.write_bytes(entry.read_bytes()[:-9])
        assert same(whole, cached_features(encoder, source, cache=tmp_path, **QUICK)), name


def test_nothing_is_left_of_an_extraction_that_fails(encoder, images, tmp_path, monkeypatch):
    def fails(take, *args, **kwargs):
        take(torch.zeros(2, 3), torch.zeros(2), ["x", "y"])
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "extract_into", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_features(encoder, open_source(str(images)), cache=tmp_path / "c", **QUICK)
    assert not list((tmp_path / "c").glob("*/*"))


def test_the_least_used_go_when_the_limit_is_reached(encoder, images, tmp_path, monkeypatch, capsys):
    source = open_source(str(images))
    cached_features(encoder, source, cache=tmp_path, name="old", **QUICK)
    size = list_entries(tmp_path)[0]["megabytes"] / 1000
    for about in tmp_path.glob("*/*/about.json"):
        os.utime(about, (1, 1))
    monkeypatch.setenv("PATCHLOOM_CACHE_GB", str(2.5 * max(size, 3e-6)))
    for name in ("middle", "new"):
        cached_features(encoder, source, cache=tmp_path, name=name, **QUICK)
    assert list_entries(tmp_path)[0]["encoder"] == "new"
    assert "old" not in [entry["encoder"] for entry in list_entries(tmp_path)]
    assert "deleting the features of old" in capsys.readouterr().err
    monkeypatch.setenv("PATCHLOOM_CACHE_GB", "much")
    with pytest.raises(UsageError, match="PATCHLOOM_CACHE_GB is 'much'"):
        cached_features(encoder, source, cache=tmp_path, name="newer", **QUICK)


def test_clearing_deletes_entries_and_nothing_else(encoder, images, tmp_path):
    cached_features(encoder, open_source(str(images)), cache=tmp_path / "c", **QUICK)
    (tmp_path / "c" / "mine" / "own").mkdir(parents=True)
    (tmp_path / "c" / "mine" / "own" / "about.json").write_text("{}")
    assert clear(tmp_path / "c") == 1
    assert list_entries(tmp_path / "c") == []
    assert (tmp_path / "c" / "mine" / "own" / "about.json").exists()


def test_the_command_lists_and_clears(encoder, images, tmp_path, capsys):
    cached_features(encoder, open_source(str(images)), cache=tmp_path / "c", name="e", **QUICK)
    assert main(["cache", "--json", "--cache", str(tmp_path / "c")]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["entries"][0]["images"] == 10
    assert main(["cache", "--cache", str(tmp_path / "c"), "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == 1


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_folder("none") is None
    assert cache_folder(None) is None
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "p"))
    assert cache_folder() == tmp_path / "p"
    monkeypatch.delenv("PATCHLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "patchloom" / "features"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file, which is a file"):
        cache_folder(tmp_path / "file")


def test_without_a_cache_nothing_is_written(encoder, images, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "p"))
    cached_features(encoder, open_source(str(images)), cache="none", **QUICK)
    assert not (tmp_path / "p").exists()


def test_a_cache_that_cannot_be_written_is_done_without(encoder, images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        found = cached_features(encoder, open_source(str(images)), cache=tmp_path / "file" / "c", **QUICK)
    assert len(found.keys) == 10


def test_parts_of_several_blocks_stand_in_order(encoder, images):
    from patchloom.encoders import intermediate_layers, normalize

    source = open_source(str(images))
    found = extract(encoder, source, layers=(-2, -1), pool="cls+avg", **QUICK)
    batch = torch.stack([source.read(number).image for number in range(10)]) / 255
    with torch.no_grad():
        below, last = intermediate_layers(encoder, normalize(batch, encoder), [-2, -1])
    expected = [below.prefix[:, 0], below.patches.mean(1), last.prefix[:, 0], last.patches.mean(1)]
    torch.testing.assert_close(found.vectors, torch.cat(expected, 1))
    with pytest.raises(UsageError, match="raw pixels have no layers"):
        extract(None, source, layers=(-1,), **QUICK)
    bare = create_encoder(
        "vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        embed_dim=48,
        depth=2,
        num_heads=3,
        class_token=False,
        global_pool="avg",
    )
    assert extract(bare, source, layers=(-1,), **QUICK).vectors.shape == (10, 48)
    with pytest.raises(UsageError, match="no class token"):
        cached_features(bare, source, layers=(-1,), pool="cls", **QUICK)
