"""Agents on disk, and as players of games to record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from patchloom.base.stored import read_tensors
from patchloom.errors import UsageError
from patchloom.evaluate.atari.agent import AgentConfig, RainbowAgent
from patchloom.evaluate.atari.networks import rebuild_vision
from patchloom.io import write_json

WEIGHTS, ABOUT = "agent.safetensors", "agent.json"


class AgentPlayer:
    """A trained agent as a player.

    Args:
        agent: The agent.
        epsilon: Share of the actions that are drawn at random.
    """

    def __init__(self, agent: RainbowAgent, epsilon: float = 0.05) -> None:
        self.agent, self.epsilon = agent, epsilon
        self.stack = agent.online.vision.frames

    def __call__(self, frames: np.ndarray, generator: np.random.Generator) -> int:
        """Return the action for (stack, H, W) uint8 frames."""
        if generator.random() < self.epsilon:
            return int(generator.integers(self.agent.online.num_actions))
        return self.agent.act(frames, noisy=False)


def save_agent(agent: RainbowAgent, folder: Path, game: str, size: int) -> None:
    """Write an agent's weights and what rebuilds it."""
    state = {name: value.detach().cpu().contiguous() for name, value in agent.online.state_dict().items()}
    about = {
        "game": game,
        "size": size,
        "vision": agent.online.vision.settings,
        "num_actions": agent.online.num_actions,
        "hidden": agent.config.hidden,
        "atoms": agent.config.atoms,
        "largest": agent.config.largest,
    }
    save_file(state, folder / WEIGHTS)
    write_json(folder / ABOUT, about)


def load_agent(path: str | Path) -> RainbowAgent:
    """Return an agent that `save_agent` wrote.

    Raises:
        UsageError: There is none.
    """
    folder = find_agent(path)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    config = AgentConfig(hidden=about["hidden"], atoms=about["atoms"], largest=about["largest"])
    with torch.random.fork_rng(devices=[]):
        agent = RainbowAgent(rebuild_vision(about["vision"]), about["num_actions"], config)
    agent.online.load_state_dict(read_tensors(folder / WEIGHTS))
    return agent


def find_agent(path: str | Path) -> Path:
    """Return the folder of an agent: itself, or the first seed's of an evaluation.

    Raises:
        UsageError: There is none.
    """
    folder = Path(path)
    for candidate in (folder, *sorted(folder.glob("seed_*"))):
        if (candidate / ABOUT).exists() and (candidate / WEIGHTS).exists():
            return candidate
    raise UsageError(f"there is no agent in {path}; name random, or what patchloom evaluate rl wrote")
