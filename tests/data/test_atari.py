"""Atari games: named, played, recorded; the same arguments give the same frames."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("ale_py")

from patchloom.data import atari, open_source
from patchloom.data.atari import AtariGame, list_games, record_atari
from patchloom.errors import UsageError

PAPER = {"Alien", "Assault", "BankHeist", "Breakout", "ChopperCommand", "Freeway", "Frostbite", "Kangaroo"}


def test_the_paper_s_games_are_there_and_unknown_ones_get_the_nearest():
    assert {*PAPER, "MsPacman", "Pong"} <= set(list_games())
    with pytest.raises(UsageError, match="unknown Atari game 'Pongg'; did you mean Pong"):
        AtariGame("Pongg")
    with pytest.raises(UsageError, match="did you mean Breakout"):
        record_atari("Breakot", steps=3)
    with pytest.raises(UsageError, match="sticky is 1"):
        AtariGame("Pong", sticky=1)


def test_a_recording_repeats_and_holds_what_was_played(tmp_path):
    first, second = (record_atari(["Breakout"], steps=150, frame_skip=4, seed=3)[0] for _ in range(2))
    assert np.array_equal(first.frames, second.frames)
    assert (first.frames.shape, first.frames.dtype) == ((150, 84, 84), np.uint8)
    assert {name: len(values) for name, values in first.parts.items()} == dict.fromkeys(
        ("actions", "rewards", "episode_starts", "ram"), 150
    )
    assert first.parts["episode_starts"][0]
    assert first.parts["actions"].max() < first.about["num_actions"] == 4
    assert not np.array_equal(first.frames, record_atari("Breakout", steps=150, seed=4)[0].frames)
    written = record_atari("Breakout,Pong", steps=40, seed=3, out=tmp_path)
    assert np.array_equal(written[0].frames, first.frames[:40])  # games do not disturb each other
    assert json.loads((tmp_path / "Pong" / "recording.json").read_text())["policy"] == "random"
    with pytest.raises(UsageError, match="overwrite"):
        record_atari("Pong", steps=40, out=tmp_path)
    source = open_source(f"frames:{tmp_path}")
    assert source.class_names == ["Breakout", "Pong"]
    assert source.triplets(respect_episodes=True).read(5).image.shape == (9, 84, 84)


def test_a_policy_sees_the_latest_frames_and_is_obeyed():
    class Follower:
        stack = 2

        def __init__(self):
            self.seen = []

        def __call__(self, frames, generator):
            self.seen.append(frames.copy())
            return len(self.seen) % 3

    player = Follower()
    recording = record_atari("Pong", steps=20, policy=player)[0]
    assert recording.parts["actions"].tolist() == [(i + 1) % 3 for i in range(20)]
    for step in range(1, 20):
        assert np.array_equal(player.seen[step], recording.frames[step - 1 : step + 1])
    assert recording.about["policy"] == "Follower"


def test_games_named_as_a_source_are_recorded_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atari, "CACHE", str(tmp_path))
    options = {"root": str(tmp_path)}
    source = open_source("atari:Pong,Freeway@30", **options)
    assert (len(source), source.class_names) == (56, ["Freeway", "Pong"])
    assert "recording 30 frames of Pong" in capsys.readouterr().err
    again = open_source("atari:Pong,Freeway@30", in_chans=4, **options)
    assert capsys.readouterr().err == ""
    assert again.read(0).image.shape == (4, 84, 84)
    test = open_source("atari:Pong@30:test", **options)
    assert test.fingerprint() != open_source("atari:Pong@30", **options).fingerprint()
    for wrong, message in (
        ("Pongo", "did you mean Pong"),
        ("Pong:tset", "did you mean test"),
        ("Pong@many", "number of"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(f"atari:{wrong}", **options)
