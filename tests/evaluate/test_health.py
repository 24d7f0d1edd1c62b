"""The health figures of an encoder, whole."""

from __future__ import annotations

import json

import pytest
import torch

from patchloom import cli, evaluate
from patchloom.encoders import create_encoder, depth
from patchloom.errors import UsageError

SETTINGS = {"data": "digits:test", "images": 60, "num_workers": 0}


def test_every_figure_is_there_and_in_its_range(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("ccvit_tiny_patch8_64")
    page = tmp_path / "health.html"
    figures = evaluate("health", encoder=encoder, report=str(page), **SETTINGS)
    blocks = depth(encoder)
    for name in ("attention_entropy", "artifact_share", "position_leakage", "layer_accuracy"):
        assert len(figures[name]) == blocks, name
    assert all(0 <= value <= 1 + 1e-9 for value in figures["attention_entropy"] + figures["artifact_share"])
    assert 1 <= figures["effective_rank"] <= figures["n"] == 60
    assert 0 < figures["alignment"] < 4
    assert -8 < figures["uniformity"] <= 0
    assert max(figures["layer_accuracy"]) > 0.3  # ten classes
    assert page.read_text().count("data:image/png") == 4
    json.dumps(figures)


def test_an_encoder_whose_features_are_constant_is_called_collapsed():
    encoder = create_encoder("ccvit_tiny_patch8_64")
    torch.nn.init.zeros_(encoder.norm.weight)
    torch.nn.init.ones_(encoder.norm.bias)
    figures = evaluate("health", encoder=encoder, **SETTINGS)
    assert "collapsed" in figures["verdict"]


def test_what_cannot_be_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match="images is 2"):
        evaluate("health", encoder="x", data="digits", images=2)
    (tmp_path / "there.html").write_text("")
    with pytest.raises(UsageError, match="exists; choose another report"):
        evaluate("health", encoder="x", data="digits", report=str(tmp_path / "there.html"))
    assert cli.main(["evaluate", "health", "--encoder", "no_such", "--data", "digits"]) == 2
