"""Settings of agents on Atari games."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from patchloom.base.ranges import Count, Fraction, Positive, PositiveInt
from patchloom.base.settings import Settings
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RLConfig(Settings):
    """Settings of the reinforcement-learning evaluation; the defaults are the 100k-step protocol."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "short": {
            "steps": 4000,
            "warmup": 400,
            "update_every": 4,
            "target_every": 400,
            "eval_episodes": 3,
            "eval_steps": 2000,
            "seeds": 1,
            "checkpoint_every": 1000,
        }
    }

    encoder: Any
    """Bundle or run, timm model (with untrained), or nature or data_efficient for a convolutional network"""
    game: str
    """Atari game: Pong, Freeway, MsPacman …"""
    out: str | None = None
    """Folder of results, learning curve and agents; with it a killed evaluation can be resumed"""
    preset: str | None = None
    """short: 4000 steps of one seed, to try things out; it is not the protocol"""
    untrained: bool = False
    """Give the encoder fresh weights first: what pre-training has to beat"""
    freeze: bool = False
    """Train the agent's head alone; default: the encoder learns too, as in the paper"""
    frames: PositiveInt | None = None
    """Frames the agent sees at once; default: the encoder's channels, 4 for a convolutional network"""
    steps: PositiveInt = 100_000
    """Steps of the agent per seed, four emulator frames each; protocol: 100 000"""
    seeds: PositiveInt = 5
    """Agents trained, each from its own seed"""
    seed: Count = 0
    """Seed of the first agent; the next ones count on"""
    warmup: PositiveInt = 1600
    """Random steps before learning begins; data-efficient Rainbow: 1600"""
    update_every: PositiveInt = 1
    """Steps per step of learning; data-efficient Rainbow: 1"""
    target_every: PositiveInt = 2000
    """Steps between copies to the target network; data-efficient Rainbow: 2000"""
    n_step: PositiveInt = 20
    """Steps of a return; data-efficient Rainbow: 20"""
    batch_size: PositiveInt = 32
    """Transitions per step of learning; data-efficient Rainbow: 32"""
    lr: Positive = 1e-4
    """Adam's learning rate of the head; data-efficient Rainbow: 1e-4"""
    encoder_lr: Positive | None = None
    """Adam's learning rate of the encoder; default: that of the head"""
    sticky: Fraction = 0.0
    """Probability that the emulator repeats the last action; protocol: 0"""
    frame_skip: PositiveInt = 4
    """Emulator frames per step; protocol: 4"""
    eval_episodes: PositiveInt = 10
    """Episodes of the final score, played without noise"""
    eval_steps: PositiveInt = 27_000
    """Most steps of such an episode; protocol: 27 000, half an hour of play"""
    checkpoint_every: PositiveInt = 5000
    """Steps between checkpoints"""
    device: str = "auto"
    """Where the agent computes: auto, cpu, cuda or cuda:1"""
    resume: bool = False
    """Go on with the evaluation in out where it stopped"""
    overwrite: bool = False
    """Delete an earlier evaluation in out first"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.resume and self.overwrite:
            raise UsageError("resume keeps the evaluation and overwrite deletes it; set one of them")
        if self.resume and self.out is None:
            raise UsageError("resume needs out, the folder of the evaluation to go on with")
