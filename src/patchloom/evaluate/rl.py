"""Reinforcement learning: how soon an agent plays well that sees through an encoder.

A data-efficient Rainbow agent learns a game for 100 000 steps from the frames alone; encoders are compared by the score
it reaches. The paper's protocol for TOV-VICReg (arXiv 2209.10901); its hyper-parameters were not published, so those of
the data-efficient Rainbow (arXiv 1906.05243) stand in.

>>> import patchloom as pl
>>> pl.evaluate("rl", encoder="runs/frames", game="Pong", out="runs/pong", preset="short")  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from patchloom.data.atari import AtariGame
from patchloom.encoders import create_encoder, image_size
from patchloom.errors import UsageError
from patchloom.evaluate.atari.agent import AgentConfig, RainbowAgent
from patchloom.evaluate.atari.loop import LoopConfig, Training
from patchloom.evaluate.atari.networks import CONVOLUTIONAL, Vision, make_vision, rebuild_vision, vision_of
from patchloom.evaluate.atari.record import save_agent
from patchloom.evaluate.atari.scores import SCORES, human_normalized
from patchloom.evaluate.rl_config import RLConfig
from patchloom.features.extract import torch_device
from patchloom.io import make_folder, write_bytes, write_json
from patchloom.models.bundle import open_encoder, save_bundle

RESULTS, SETTINGS, CURVE = "results.json", "settings.json", "learning_curve.png"
FREE = ("out", "resume", "overwrite", "device", "checkpoint_every", "preset")


class RL:
    """Score of an agent that learns a game through the encoder, data-efficiently."""

    config_class = RLConfig
    writes_out = True

    def __init__(self, config: RLConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return the scores of all seeds and what goes with them."""
        config, start = self.config, time.perf_counter()
        device = torch_device(config.device)
        vision = self.vision(config.seed)
        game = AtariGame(config.game, config.frame_skip, config.sticky, self._size(vision))
        out = self._claim()
        seeds = [self._seed(number, game, out, device) for number in range(config.seeds)]
        figures = summarize(config.game, seeds)
        figures |= {
            "encoder": "module" if isinstance(config.encoder, nn.Module) else str(config.encoder),
            "untrained": config.untrained,
            "freeze": config.freeze,
            "steps": config.steps,
            "protocol_100k": config.steps == 100_000 and config.update_every == 1,
            "frames": vision.frames,
            "seconds": round(time.perf_counter() - start, 1),
        }
        if out is not None:
            write_json(out / RESULTS, figures)
            write_bytes(out / CURVE, learning_curve(config.game, seeds, config.steps))
            print(f"results {out / RESULTS}, learning curve {out / CURVE}", file=sys.stderr)
        return figures

    def vision(self, seed: int) -> Vision:
        """Return what the agent of a seed sees with.

        Raises:
            UsageError: There is no such encoder, it has no trained weights and `untrained` is not set, or it takes
                another number of frames.
        """
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not isinstance(config.encoder, nn.Module) and str(config.encoder) in CONVOLUTIONAL:
                return make_vision(str(config.encoder), config.frames or 4)
            if config.untrained and not isinstance(config.encoder, nn.Module) and not Path(config.encoder).exists():
                return vision_of(create_encoder(str(config.encoder), in_chans=config.frames or 3))
            vision = vision_of(open_encoder(config.encoder))
            if config.frames not in (None, vision.frames):
                raise UsageError(f"the encoder takes {vision.frames} frames, not {config.frames}; leave frames out")
            # From Python the same module may be given for several seeds: each agent gets its own.
            fresh = rebuild_vision(vision.settings)
            if not config.untrained:
                fresh.load_state_dict(vision.state_dict())
            return fresh

    def _size(self, vision: Vision) -> int:
        if vision.settings["kind"] != "timm":
            return int(vision.settings["size"])
        height, width = image_size(vision.encoder)
        if height != width:
            raise UsageError(f"the encoder takes images of {height}x{width}; frames are square")
        return height

    def _seed(self, number: int, game: AtariGame, out: Path | None, device: torch.device) -> dict[str, Any]:
        """Train and judge one agent, or return the figures it left behind."""
        config = self.config
        seed = config.seed + number
        folder = None if out is None else out / f"seed_{seed}"
        if folder is not None:
            if (folder / RESULTS).exists():
                done: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
                return done
            make_folder(folder)
        settings = AgentConfig(
            batch_size=config.batch_size,
            n_step=config.n_step,
            lr=config.lr,
            encoder_lr=config.encoder_lr or config.lr,
            freeze=config.freeze,
        )
        lengths = LoopConfig(
            config.steps,
            config.warmup,
            config.update_every,
            config.target_every,
            config.eval_episodes,
            config.eval_steps,
            config.checkpoint_every,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            agent = RainbowAgent(self.vision(seed), game.num_actions, settings, device)
            label = f"{config.game}  seed {number + 1}/{config.seeds}"
            training = Training(game, agent, lengths, seed, folder, label)
            training.run()
            scores = training.evaluate()
        figures = {
            "seed": seed,
            "score": float(np.mean(scores)),
            "scores": scores,
            "human_normalized": human_normalized(config.game, float(np.mean(scores))),
            "episodes": [list(episode) for episode in training.episodes],
        }
        if folder is not None:
            save_agent(agent, folder, config.game, game.size)
            if agent.online.vision.settings["kind"] == "timm":
                lineage = {"made_by": f"evaluate rl {config.game}", "steps": config.steps, "seed": seed}
                save_bundle(agent.online.vision.encoder, folder / "model", lineage=lineage, overwrite=True)
            write_json(folder / RESULTS, figures)
            (folder / "frames.raw").unlink(missing_ok=True)
        return figures

    def _claim(self) -> Path | None:
        """Take the folder, or say why not."""
        config = self.config
        if config.out is None:
            return None
        out = Path(config.out)
        values = {name: value for name, value in _settings(config).items() if name not in FREE}
        held = out / SETTINGS
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not held.exists():
                raise UsageError(f"{out} is not empty and holds no evaluation; choose another out")
            if config.overwrite:
                shutil.rmtree(out)
            elif not config.resume:
                raise UsageError(
                    f"{out} holds an evaluation; resume goes on with it, overwrite deletes it, or choose another out"
                )
            else:
                before = json.loads(held.read_text(encoding="utf-8"))
                for name, value in values.items():
                    # More seeds may be asked for: the ones that are done stay as they are.
                    if name != "seeds" and before.get(name) != value:
                        raise UsageError(f"the evaluation in {out} has {name}={before.get(name)}, not {value}")
        make_folder(out)
        write_json(held, values)
        return out


def summarize(game: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds, raw and on the human scale."""
    scores = [figures["score"] for figures in seeds]
    figures: dict[str, Any] = {
        "game": game,
        "score": float(np.mean(scores)),
        "score_deviation": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "scores": scores,
        "seeds": [one["seed"] for one in seeds],
        "human_normalized": human_normalized(game, float(np.mean(scores))),
        "training_score": _late_score(seeds),
    }
    if game in SCORES:
        figures |= {"random_player": SCORES[game][0], "human": SCORES[game][1]}
    return figures


def learning_curve(game: str, seeds: list[dict[str, Any]], steps: int) -> bytes:
    """Return a PNG of the score of the last ten training episodes, over steps, of each seed."""
    from patchloom.report import curves

    series: dict[str, tuple[list[float], list[float]]] = {}
    for figures in seeds:
        episodes = figures["episodes"]
        means = [float(np.mean([s for _, s in episodes[max(0, i - 9) : i + 1]])) for i in range(len(episodes))]
        if means:
            series[f"seed {figures['seed']}"] = ([step for step, _ in episodes], means)
    if game in SCORES:
        series["random player"] = ([0, steps], [SCORES[game][0]] * 2)
    if not series:
        series["no episode ended"] = ([0, steps], [0.0, 0.0])
    return curves(series, x_label="step", y_label="score, last 10 episodes", title=f"{game}, while learning").png


def _late_score(seeds: list[dict[str, Any]]) -> float | None:
    """Return the mean over seeds of the score of the last ten training episodes; None where none ended."""
    means = [np.mean([score for _, score in one["episodes"][-10:]]) for one in seeds if one["episodes"]]
    return float(np.mean(means)) if means else None


def _settings(config: RLConfig) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {**values, "encoder": "module" if isinstance(config.encoder, nn.Module) else str(config.encoder)}
