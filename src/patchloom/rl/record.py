"""`patchloom data atari`: games recorded as frames, played at random or by an agent that `evaluate rl` trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from patchloom.data.atari import STEPS, Policy, record_atari
from patchloom.errors import UsageError
from patchloom.io import write_json
from patchloom.rl.agent import AgentConfig, RainbowAgent
from patchloom.rl.networks import rebuild_vision
from patchloom.stored import read_tensors

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


def record_frames(
    games: str,
    out: str,
    steps: int = STEPS,
    policy: str = "random",
    epsilon: float = 0.05,
    frame_skip: int = 4,
    sticky: float = 0.25,
    size: int = 84,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, object]:
    """Record frames of Atari games in time order, for `--data frames:OUT`.

    Args:
        games: Games with commas between, such as Pong,Freeway.
        out: Folder that gets a folder per game.
        steps: Frames per game; the paper has 100 000 of each of three players.
        policy: Who plays: random, or the folder of an agent that `patchloom evaluate rl` left behind.
        epsilon: Share of an agent's actions that are drawn at random.
        frame_skip: Emulator frames per step.
        sticky: Probability that the emulator repeats the last action.
        size: Side of the frames in pixels.
        seed: Seed of game and player.
        overwrite: Replace recordings that are there.

    Returns:
        The data source to name, and what is in it.

    Raises:
        UsageError: Unknown game or agent, or recordings that are there already.
    """
    player: Policy | None = None
    if not 0 <= epsilon <= 1:
        raise UsageError(f"epsilon is {epsilon}; it is a share, between 0 and 1")
    if policy != "random":
        player = AgentPlayer(load_agent(policy), epsilon)
        size = int(json.loads((find_agent(policy) / ABOUT).read_text(encoding="utf-8"))["size"])
    recordings = record_atari(
        games, steps, frame_skip, seed, out=out, policy=player, sticky=sticky, size=size, overwrite=overwrite
    )
    episodes = {recording.name: int(recording.parts["episode_starts"].sum()) for recording in recordings}
    return {"data": f"frames:{out}", "frames": steps * len(recordings), "episodes": episodes}


def save_agent(agent: RainbowAgent, folder: Path, game: str, size: int) -> None:
    """Write an agent's weights and what rebuilds it."""
    state = {name: value.detach().cpu().contiguous() for name, value in agent.online.state_dict().items()}
    about = {
        "game": game,
        "size": size,
        "vision": agent.online.vision.made,
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
