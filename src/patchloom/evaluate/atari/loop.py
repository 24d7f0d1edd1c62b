"""An agent and a game, for a fixed number of steps; killed at any moment it goes on from its last checkpoint.

Lightning's trainer does not carry this loop: every batch depends on what the network in training has just played, so
acting, memory, target network and episodes would hide in a data loader, whose state the trainer does not checkpoint.
A step costs as much either way (the trainer adds 4 %), so what would change is where the same code stands.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from patchloom.base import stopping
from patchloom.base.progress import Ticker
from patchloom.base.stored import read_pickle
from patchloom.data.atari import AtariGame
from patchloom.evaluate.atari.agent import RainbowAgent
from patchloom.evaluate.atari.replay import Replay
from patchloom.io import write_rows, written_whole

CHECKPOINT, FRAMES = "agent.ckpt", "frames.raw"


@dataclass(frozen=True)
class LoopConfig:
    """How long and how often; the defaults are the 100k-step protocol's."""

    steps: int = 100_000
    warmup: int = 1600
    update_every: int = 1
    target_every: int = 2000
    eval_episodes: int = 10
    eval_steps: int = 27_000
    checkpoint_every: int = 5000


class Training:
    """One seed of one agent on one game.

    Args:
        game: The game it learns on.
        agent: Who learns.
        config: How long.
        seed: Seed of game and draws.
        folder: Where checkpoints, frames and the list of episodes are kept; default: nowhere.
        label: What the progress lines begin with.
    """

    def __init__(
        self, game: AtariGame, agent: RainbowAgent, config: LoopConfig, seed: int, folder: Path | None, label: str = ""
    ) -> None:
        self.game, self.agent, self.config, self.seed, self.folder, self.label = (
            game,
            agent,
            config,
            seed,
            folder,
            label,
        )
        self.generator = np.random.default_rng([seed, 1])
        settings = agent.config
        self.memory = Replay(
            config.steps,
            agent.online.vision.frames,
            game.size,
            settings.n_step,
            settings.discount,
            settings.alpha,
            None if folder is None else folder / FRAMES,
        )
        self.step = 0
        self.episodes: list[tuple[int, float]] = []
        self.losses: deque[float] = deque(maxlen=100)
        if folder is not None and (folder / CHECKPOINT).exists():
            self._go_on(folder / CHECKPOINT)

    def run(self) -> None:
        """Play and learn to the end; where there is a folder, a signal ends it after the step, with a checkpoint.

        Raises:
            Stopped: A signal came.
        """
        with nullcontext() if self.folder is None else stopping.finishing("stopping after this step"):
            self._run()

    def _run(self) -> None:
        config, game = self.config, self.game
        frame, first, gained, lives = game.reset(seed=self._game_seed()), True, 0.0, game.lives
        self.ticker = Ticker(config.steps, self.step)
        recent: deque[np.ndarray] = deque([frame] * self.memory.frames, maxlen=self.memory.frames)
        while self.step < config.steps:
            action = self._choose(np.stack(recent))
            following, reward, over = game.step(action)
            lost = over or game.lives < lives
            self.memory.add(frame, action, float(np.clip(reward, -1, 1)), lost, first)
            gained, lives, first = gained + reward, game.lives, False
            self.step += 1
            if over:
                self.episodes.append((self.step, gained))
                following, first, gained = game.reset(), True, 0.0
                lives = game.lives
                recent.extend([following] * self.memory.frames)
            else:
                recent.append(following)
            frame = following
            self._learn()
            if self.folder is not None and self.step % config.checkpoint_every == 0:
                self.save()
            self._speak()
            if self.folder is not None and (number := stopping.received()) is not None:
                self.save()
                print(f"stopped at step {self.step}; go on with --resume", file=sys.stderr)
                raise stopping.Stopped(number)
        self.save()

    def _choose(self, stack: np.ndarray) -> int:
        if self.step < self.config.warmup:
            return int(self.generator.integers(self.game.num_actions))
        return self.agent.act(stack)

    def _learn(self) -> None:
        config = self.config
        if self.step < config.warmup or self.step % config.update_every:
            return
        if not self.memory.priorities.any():
            return
        beta = self.agent.config.beta + (1 - self.agent.config.beta) * self.step / config.steps
        self.losses.append(self.agent.learn(self.memory, self.generator, beta))
        if self.step % config.target_every == 0:
            self.agent.copy_to_target()

    def evaluate(self) -> list[float]:
        """Return the scores of episodes played with the mean weights, on another seed of the game."""
        scores = []
        for episode in range(self.config.eval_episodes):
            frame = self.game.reset(seed=1_000_000 + 1000 * self.seed + episode)
            generator = np.random.default_rng([self.seed, 2, episode])
            recent: deque[np.ndarray] = deque([frame] * self.memory.frames, maxlen=self.memory.frames)
            gained, over = 0.0, False
            for _ in range(self.config.eval_steps):
                # One action in a thousand is drawn, as in the literature: a player that is stuck gets on.
                if generator.random() < 1e-3:
                    action = int(generator.integers(self.game.num_actions))
                else:
                    action = self.agent.act(np.stack(recent), noisy=False)
                frame, reward, over = self.game.step(action)
                gained += reward
                recent.append(frame)
                self._speak(f"episode {episode + 1}/{self.config.eval_episodes} of the final score")
                if over:
                    break
            scores.append(gained)
        return scores

    def save(self) -> None:
        """Write the checkpoint and the list of episodes, each whole or not at all."""
        if self.folder is None:
            return
        state = {
            "step": self.step,
            "agent": self.agent.state(),
            "memory": self.memory.state(),
            "generator": json.dumps(self.generator.bit_generator.state),
            "torch": torch.get_rng_state(),
            "episodes": [list(episode) for episode in self.episodes],
        }
        with written_whole(self.folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
        write_rows(self.folder / "episodes.csv", ["step", "score"], self.episodes)

    def _go_on(self, path: Path) -> None:
        """Go on from a checkpoint. The emulator's own state is not in it: a new episode begins there."""
        state = read_pickle(path, "delete it, and this seed begins anew")
        self.step = int(state["step"])
        self.agent.load_state(state["agent"])
        self.memory.load_state(state["memory"])
        self.generator.bit_generator.state = json.loads(state["generator"])
        torch.set_rng_state(state["torch"])
        self.episodes = [(int(step), float(score)) for step, score in state["episodes"]]

    def _game_seed(self) -> int:
        return int(np.random.default_rng([self.seed, 0, self.step]).integers(2**31))

    def _speak(self, doing: str | None = None) -> None:
        if not self.ticker.due(self.step if doing is None else -1):
            return
        latest = [score for _, score in self.episodes[-10:]]
        score = f"score {np.mean(latest):.1f} over {len(latest)} episodes" if latest else ""
        line = f"{doing}  {score}" if doing else self.ticker.line("step", self.step, "step", score)
        print(f"{self.label}  {line}".strip(), file=sys.stderr, flush=True)
