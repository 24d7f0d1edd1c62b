"""Places in settings: absolute in `config.yaml`, found again from another folder and where a run has moved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from patchloom.errors import UsageError
from patchloom.io import read_config
from patchloom.registry import SOURCES
from patchloom.systems.mae.method import MAEMethod
from patchloom.training.config import TrainConfig, config_from_mapping, refuse_changes, write_config
from patchloom.training.places import absolute, relocated
from patchloom.training.run import resolve


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with images, a table, shards, a model, and a run that holds a codebook."""
    home = tmp_path / "home"
    for name in ("tr/1.png", "set/train.csv", "x-00.tar", "x-01.tar", "enc/config.json", "runs/a/codebook/c.npy"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "labels.csv").touch()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("data", "tr", "{}/tr"),
        ("data", "./tr", "{}/tr"),
        ("probe_data", "chexpert:set:train:ones", "chexpert:{}/set:train:ones"),
        ("test", "labels.csv:test", "{}/labels.csv:test"),
        ("data", "frames:tr", "frames:{}/tr"),
        ("data", "clips:tr", "clips:{}/tr"),
        ("data", "x-{00..01}.tar", "{}/x-{{00..01}}.tar"),
        ("data", "x-*.tar", "{}/x-*.tar"),
        ("encoder", "enc", "{}/enc"),
        ("teacher", "enc", "{}/enc"),
        ("codebook", "runs/a/codebook/c.npy", "{}/runs/a/codebook/c.npy"),
        ("cache", "features", "{}/features"),
        ("cache", "auto", "auto"),
        ("data", "photos:test", "photos:test"),
        ("data", "torchvision:CIFAR10:test", "torchvision:CIFAR10:test"),
        ("data", "hf:tr", "hf:{}/tr"),
        ("data", "hf:mnist", "hf:mnist"),
        ("encoder", "vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_what_leads_to_a_place_is_written_so_that_it_does_from_anywhere(here, name, value, written):
    assert absolute(name, value) == written.format(here)
    assert absolute(name, absolute(name, value)) == absolute(name, value)


def run_with(**settings: str) -> TrainConfig:
    config = config_from_mapping(TrainConfig, {"out": "runs/a", **settings})
    write_config(config, Path("runs/a/config.yaml"), "pretrain mae")
    return config


def test_a_run_is_gone_on_with_from_another_folder(here, monkeypatch):
    run_with(data="tr", probe_data="labels.csv:val", encoder="enc")
    monkeypatch.chdir(here.parent / "away")
    resumed = resolve("pretrain mae", MAEMethod, {"out": "../home/runs/a", "resume": True})
    assert (resumed.data, resumed.probe_data) == (f"{here}/tr", f"{here}/labels.csv:val")
    saved = read_config(here / "runs" / "a" / "config.yaml")
    refuse_changes(saved, resumed)
    refuse_changes(saved, resolve("pretrain mae", MAEMethod, {**saved, "out": "../home/runs/a", "resume": True}))
    same = resolve("pretrain mae", MAEMethod, {"out": "../home/runs/a", "encoder": "../home/enc", "resume": True})
    refuse_changes(saved, same)
    with pytest.raises(UsageError, match="has encoder="):
        refuse_changes(saved, config_from_mapping(TrainConfig, {**saved, "encoder": "vit_tiny_patch16_224"}))


def test_what_lies_inside_a_run_travels_with_it_and_what_lies_beside_may(here):
    run_with(data="tr")
    saved = read_config(Path("runs/a/config.yaml")) | {"codebook": f"{here}/runs/a/codebook/c.npy"}
    shutil.copytree("runs", "copied")
    assert relocated("codebook", saved, Path("copied/a")) == f"{here}/copied/a/codebook/c.npy"
    assert relocated("data", saved, Path("copied/a")) == f"{here}/tr"
    here.rename(here.parent / "moved")
    run = here.parent / "moved" / "runs" / "a"
    assert relocated("data", saved, run) == f"{here.parent}/moved/tr"


def test_runs_of_before_are_found_by_where_they_were_started(here, monkeypatch):
    saved = {"out": "runs/a", "data": "tr", "test": "c.csv:x", "encoder": "vit_tiny_patch16_224"}
    assert relocated("data", saved, Path("runs/a")) == f"{here}/tr"
    monkeypatch.chdir(here.parent / "away")
    assert relocated("data", saved, here / "runs" / "a") == f"{here}/tr"
    assert relocated("encoder", saved, here / "runs" / "a") == "vit_tiny_patch16_224"
    (here / "runs" / "a" / "c.csv").touch()
    assert relocated("test", saved, here / "runs" / "a") == f"{here}/runs/a/c.csv:x"


def test_a_place_that_is_gone_is_named_with_all_that_was_tried(here, monkeypatch):
    saved = {"out": "runs/a", "data": "gone"}
    monkeypatch.chdir(here.parent / "away")
    tried = [f"{os.getcwd()}/gone", f"{here}/gone", f"{here}/runs/a/gone"]  # noqa: PTH109
    with pytest.raises(UsageError, match=r"has data=gone.*give its place now as data") as caught:
        relocated("data", saved, here / "runs" / "a")
    assert all(place in str(caught.value) for place in tried)


def test_a_codebook_that_a_run_has_a_copy_of_may_be_gone(here):
    saved = {"out": f"{here}/runs/b", "codebook": f"{here}/cb"}
    (here / "runs/b").mkdir()
    with pytest.raises(UsageError, match="give its place now as codebook"):
        relocated("codebook", saved, Path("runs/b"))
    (here / "runs/b/codebook.safetensors").touch()
    assert relocated("codebook", saved, Path("runs/b")) == f"{here}/runs/b/codebook.safetensors"


def test_sets_that_ship_inside_packages_are_no_places():
    words = [word for word in SOURCES if word.islower() and ":" not in word and "{" not in word]
    assert {"photos", "digits", "moving", "shapes3d"} <= set(words)
    for word in words:
        assert absolute("data", word) == word
        assert relocated("data", {"data": word, "out": "runs/gone"}, Path("runs/gone")) == word
