"""Towers measured by words: zero-shot classification and retrieval by captions."""

import json

import pytest

pytest.importorskip("open_clip")

import timm
import torch

import patchloom as pl
from patchloom.models.bundle import save_bundle
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.saved import save_clip
from patchloom.systems.clip.text import TextTower

QUICK = {"num_workers": 0, "device": "cpu", "draws": 20}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    torch.manual_seed(0)
    trunk = timm.create_model("vitamin_tiny_32", num_classes=0)
    model = CLIP(trunk, TextTower(context_length=16, width=32, heads=2, layers=1, output_dim=16))
    folder = save_bundle(trunk, tmp_path_factory.mktemp("towers") / "bundle")
    save_clip(model, folder)
    return folder


def test_classes_are_named_by_sentences(towers, tmp_path):
    figures = pl.evaluate("zero_shot", encoder=towers, test="digits:test", **QUICK, predictions=tmp_path / "p.npz")
    assert 0 <= figures["accuracy"] <= figures["accuracy_top5"] <= 1
    assert figures["n"] == 450
    assert "train_images" not in figures
    assert (tmp_path / "p.npz").exists()
    spoken = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    other = pl.evaluate("zero_shot", encoder=towers, test="digits:test", class_names=spoken, templates=("{}",), **QUICK)
    assert other["templates"] == ["{}"]
    assert set(other["per_class_accuracy"]) == set("0123456789")


def test_captions_are_found_and_out_is_written(towers, tmp_path):
    out = tmp_path / "figures.json"
    figures = pl.evaluate("caption_retrieval", encoder=towers, test="digits:test", captions="labels", out=out, **QUICK)
    assert figures["captions_from"] == "labels"
    assert figures["different_captions"] <= 80
    assert json.loads(out.read_text())["score"] == figures["score"]


def test_what_cannot_be_measured_is_refused(towers, tmp_path):
    trunk = timm.create_model("vitamin_tiny_32", num_classes=0)
    bare = save_bundle(trunk, tmp_path / "bare")
    with pytest.raises(pl.UsageError, match="there are no aligned towers at"):
        pl.evaluate("zero_shot", encoder=bare, test="digits:test", **QUICK)
    with pytest.raises(pl.UsageError, match="class_names has 1 names, and digits:test has 10 classes"):
        pl.evaluate("zero_shot", encoder=towers, test="digits:test", class_names=("a",), **QUICK)
    with pytest.raises(pl.UsageError, match="'a photo' has not"):
        pl.evaluate("zero_shot", encoder=towers, test="digits:test", templates=("a photo",), **QUICK)
    with pytest.raises(pl.UsageError, match="digits:test has no captions"):
        pl.evaluate("caption_retrieval", encoder=towers, test="digits:test", captions="data", **QUICK)
