"""How long attacks will take: what is counted, and when it is said."""

import pytest
import timm
import torch

from patchloom.attack import expected
from patchloom.attack.expected import announce, pace, passes
from patchloom.systems.dta.config import DTAConfig


def config(**changes):
    return DTAConfig(encoder="a", victim="b", data="c", out="d", **changes)


def test_passes_are_those_of_the_steps():
    plain = config(steps=10, curve_images=0)
    assert passes(plain, ["noise"], 50, 2, 12) == 0
    assert passes(plain, ["last"], 50, 2, 12) == 10 * 50
    assert passes(plain, ["white_box"], 50, 2, 12) == 10 * 50 * 2
    assert passes(config(steps=10, restarts=3), ["last"], 50, 1, 12) == 3 * 10 * 50
    searched = passes(plain, ["dta"], 200, 1, 12) - passes(
        config(steps=10, curve_images=0, candidates=(3,)), ["dta"], 200, 1, 12
    )
    assert searched == pytest.approx(0.6 * 11 * 10 * 128)
    assert passes(config(steps=10), ["dta"], 200, 1, 12) > passes(plain, ["dta"], 200, 1, 12)


def test_what_takes_long_is_said_with_what_would_take_less(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(expected, "pace", lambda *_: 0.05)
    announce(config(), ["noise", "last", "dta"], [], torch.zeros(1), 200, ["full"], 12, tmp_path)
    said = capsys.readouterr().err
    assert "3 attacks of 40 steps on 200 images; --limit 50 --search_images 32 --curve_images 0 takes about" in said
    (tmp_path / "dta").mkdir()
    (tmp_path / "dta/attack.json").touch()
    announce(config(), ["dta"], [], torch.zeros(1), 200, ["full"], 12, tmp_path)  # made already
    announce(config(), ["noise"], [], torch.zeros(1), 200, ["full"], 12, tmp_path)  # takes no time
    assert capsys.readouterr().err == ""


def test_the_pace_leaves_the_model_as_it_was():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    assert pace([model], torch.rand(2, 3, 32, 32)) > 0
    assert pace([model, model], torch.rand(2, 3, 16, 16)) > 0  # images have the size of the first encoder
    assert model.training
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
