"""The reinforcement-learning evaluation: results, resume, what is refused, an agent as a player of recordings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("ale_py")

import patchloom as pl
from patchloom.cli import main
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.evaluate.atari.loop import Training
from patchloom.models.bundle import save_bundle

QUICK = {
    "game": "Breakout",
    "steps": 60,
    "warmup": 30,
    "update_every": 10,
    "target_every": 20,
    "n_step": 5,
    "batch_size": 4,
    "eval_episodes": 1,
    "eval_steps": 8,
    "seeds": 2,
    "checkpoint_every": 20,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch8_84", patch_size=12, embed_dim=24, depth=1, num_heads=2)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("bundles") / "frames"))


@pytest.fixture(scope="module")
def done(bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "breakout"
    return out, pl.evaluate("rl", encoder=bundle, out=str(out), **QUICK)


def test_results_curve_and_agents_are_left_behind(done, bundle):
    out, figures = done
    assert figures["seeds"] == [0, 1]
    assert figures["score"] == pytest.approx(np.mean(figures["scores"]))
    assert figures["human_normalized"] == pytest.approx((figures["score"] - 1.7) / (30.5 - 1.7))
    assert figures["protocol_100k"] is False
    saved = json.loads((out / "results.json").read_text())
    assert {**saved, "protocol": "rl"} == {**figures, "protocol": "rl"}
    assert (out / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    learned, before = pl.load(out / "seed_0" / "model"), pl.load(bundle)
    moved = [not torch.equal(a, b) for a, b in zip(learned.parameters(), before.parameters(), strict=True)]
    assert any(moved)


def test_an_evaluation_killed_goes_on_where_it_stopped(bundle, tmp_path, monkeypatch, done):
    out = tmp_path / "killed"
    original, saves = Training.save, []

    def save(self):
        original(self)
        saves.append(self.step)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", save)
    with pytest.raises(KeyboardInterrupt):
        pl.evaluate("rl", encoder=bundle, out=str(out), **QUICK)
    monkeypatch.setattr(Training, "save", original)
    first: list[int] = []
    run = Training.run
    monkeypatch.setattr(Training, "run", lambda self: (first.append(self.step), run(self))[1])
    figures = pl.evaluate("rl", encoder=bundle, out=str(out), resume=True, **QUICK)
    assert first == [40, 0]
    assert len(figures["scores"]) == 2
    assert figures["scores"][1] == done[1]["scores"][1]  # the seed that was not cut short
    again = pl.evaluate("rl", encoder=bundle, out=str(out), resume=True, **QUICK)
    assert again["scores"] == figures["scores"]
    assert len(first) == 2  # nothing was played again
    with pytest.raises(UsageError, match="steps=60, not 80"):
        pl.evaluate("rl", encoder=bundle, out=str(out), resume=True, **{**QUICK, "steps": 80})
    with pytest.raises(UsageError, match="resume goes on with it"):
        pl.evaluate("rl", encoder=bundle, out=str(out), **QUICK)


@pytest.mark.parametrize("encoder", ["nature", "untrained"])
def test_convolutional_and_untrained_encoders(bundle, encoder, capsys):
    changes = {"encoder": "nature"} if encoder == "nature" else {"encoder": bundle, "untrained": True, "freeze": True}
    figures = pl.evaluate("rl", **{**QUICK, "steps": 40, "seeds": 1, **changes})
    assert figures["frames"] == (4 if encoder == "nature" else 3)
    assert figures["score_deviation"] is None


def test_what_cannot_be_is_refused_in_words(bundle, tmp_path):
    for changes, message in (
        ({"game": "Breakot"}, "did you mean Breakout"),
        ({"frames": 4}, "the encoder takes 3 frames, not 4"),
        ({"steps": 0}, "steps is 0"),
        ({"encoder": "vit_tiny_patch8_84"}, "no published weights"),
        ({"resume": True}, "resume needs out"),
        ({"preset": "shrot"}, "did you mean short"),
        ({"out": str(tmp_path)}, "holds no evaluation"),
    ):
        (tmp_path / "something").write_text("x")
        with pytest.raises(UsageError, match=message):
            pl.evaluate("rl", **{**QUICK, "encoder": bundle, **changes})


def test_an_agent_plays_for_a_recording(done, tmp_path, capsys):
    out = tmp_path / "played"
    command = ["data", "atari", "Breakout", "--steps", "30", "--policy", str(done[0]), "--epsilon", "0"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["data"] == f"frames:{out}"
    about = json.loads((out / "Breakout" / "recording.json").read_text())
    assert about["policy"] == "AgentPlayer"
    assert main([*command, "--out", str(out)]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main(["data", "atari", "Pong", "--out", str(tmp_path / "x"), "--policy", str(tmp_path)]) == 2
    assert "no agent" in capsys.readouterr().err
