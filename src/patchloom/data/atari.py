"""Atari games through gymnasium and ale-py (extra `rl`), which ship the ROMs: played, and recorded as frames.

>>> game = AtariGame("Pong")
>>> game.reset(seed=0).shape
(84, 84)
>>> frame, reward, over = game.step(0)
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from annotated_types import Ge

from patchloom.base.progress import track
from patchloom.base.ranges import Fraction, PositiveInt, checked
from patchloom.data.frames import ABOUT, FRAMES, FrameSource, Recording, read_recording, reduced
from patchloom.data.hub import CACHE
from patchloom.errors import MissingExtraError, UsageError, unknown_name
from patchloom.io import check_place, make_folder

STEPS = 10_000
LONGEST_EPISODE = 108_000
"""Emulator frames after which an episode ends: half an hour of play, as in the literature."""


class Policy(Protocol):
    """What plays a game."""

    stack: int
    """Frames it looks at."""

    def __call__(self, frames: np.ndarray, generator: np.random.Generator) -> int:
        """Return the action for the latest frames, (stack, H, W) uint8."""


class AtariGame:
    """One game, seen as grey frames.

    Each step repeats the action for `frame_skip` emulator frames and shows the brighter of the last two, pixel by pixel
    (sprites flicker), reduced to `size` pixels.

    Args:
        game: Name as in `list_games`: Pong, MsPacman, …
        frame_skip: Emulator frames per step.
        sticky: Probability that the emulator repeats the last action instead of taking the new one.
        size: Side of a frame in pixels.

    Attributes:
        num_actions: Actions that do something in this game.

    Raises:
        UsageError: Unknown game, with the nearest.
        MissingExtraError: gymnasium or ale-py is not installed.
    """

    @checked
    def __init__(
        self, game: str, frame_skip: PositiveInt = 4, sticky: Fraction = 0.25, size: Annotated[int, Ge(8)] = 84
    ) -> None:
        gymnasium = _gymnasium()
        if game not in (known := list_games()):
            raise unknown_name("Atari game", game, known)
        self.game, self.frame_skip, self.sticky, self.size = game, frame_skip, sticky, size
        environment = gymnasium.make(
            f"ALE/{game}-v5",
            obs_type="grayscale",
            frameskip=1,
            repeat_action_probability=sticky,
            max_num_frames_per_episode=LONGEST_EPISODE,
        )
        self.console: Any = environment.unwrapped
        self.num_actions = int(self.console.action_space.n)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start an episode and return its first frame; a seed makes all that follows repeatable."""
        frame, _ = self.console.reset(seed=seed)
        return reduced(frame, self.size)

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Play an action; return the next frame, the reward and whether the episode is over."""
        reward, over = 0.0, False
        latest: deque[np.ndarray] = deque(maxlen=2)
        for _ in range(self.frame_skip):
            frame, gained, ended, cut, _ = self.console.step(action)
            latest.append(frame)
            reward += float(gained)
            over = bool(ended or cut)
            if over:
                break
        return reduced(np.maximum(latest[0], latest[-1]), self.size), reward, over

    @property
    def lives(self) -> int:
        """Lives left; 0 in games that count none."""
        return int(self.console.ale.lives())

    @property
    def ram(self) -> np.ndarray:
        """The console's memory, (128,) uint8."""
        return np.asarray(self.console.ale.getRAM())


def list_games() -> list[str]:
    """Return the names of the games that can be played.

    Raises:
        MissingExtraError: gymnasium or ale-py is not installed.
    """
    gymnasium = _gymnasium()
    return sorted(name[4:-3] for name in gymnasium.registry if name.startswith("ALE/") and name.endswith("-v5"))


@checked
def record_atari(
    games: str | Sequence[str],
    steps: PositiveInt = STEPS,
    frame_skip: int = 4,
    seed: int = 0,
    *,
    out: str | Path | None = None,
    policy: Policy | None = None,
    sticky: float = 0.25,
    size: int = 84,
    overwrite: bool = False,
) -> list[Recording]:
    """Play games and keep what is seen: frames, actions, rewards, episode borders and the console's memory.

    Frame t is what the player saw when it chose action t. The same arguments give the same recording.

    Args:
        games: Names, or one string of them with commas between.
        steps: Frames per game.
        frame_skip: Emulator frames per step.
        seed: Seed of the game and of the player.
        out: Folder in which each game gets a folder of NumPy arrays; default: they are kept in memory.
        policy: Who plays; default: a player that chooses actions at random.
        sticky: Probability that the emulator repeats the last action.
        size: Side of the frames in pixels.
        overwrite: Replace recordings that are there.

    Raises:
        UsageError: Unknown game, too few steps, or a recording that is there already.
        MissingExtraError: gymnasium or ale-py is not installed.
    """
    names = [name.strip() for name in games.split(",")] if isinstance(games, str) else list(games)
    for name in names:
        if name not in (known := list_games()):
            raise unknown_name("Atari game", name, known)
        if out is not None and check_place(Path(out) / name).exists() and not overwrite:
            raise UsageError(f"{Path(out) / name} exists; choose another out, or set overwrite to replace it")
    recordings = []
    for name in names:
        recording = _play(AtariGame(name, frame_skip, sticky, size), steps, seed, policy)
        recordings.append(recording if out is None else write_recording(recording, Path(out) / name))
    return recordings


def _play(game: AtariGame, steps: int, seed: int, policy: Policy | None) -> Recording:
    # Each game has draws of its own, so that a game's recording does not depend on those recorded beside it.
    generator = np.random.default_rng([seed, zlib.crc32(game.game.encode())])
    frames = np.empty((steps, game.size, game.size), np.uint8)
    actions, rewards = np.empty(steps, np.int16), np.empty(steps, np.float32)
    starts, ram = np.zeros(steps, bool), np.empty((steps, 128), np.uint8)
    frame, over = game.reset(seed=int(generator.integers(2**31))), True
    recent: deque[np.ndarray] = deque([frame], maxlen=policy.stack if policy else 1)
    for step in track(range(steps), game.game, unit="frame"):
        if over and step:
            frame = game.reset()
        if over:
            recent.extend([frame] * (recent.maxlen or 1))
        frames[step], starts[step], ram[step] = frame, over, game.ram
        action = int(generator.integers(game.num_actions)) if policy is None else policy(np.stack(recent), generator)
        actions[step] = action
        frame, rewards[step], over = game.step(action)
        recent.append(frame)
    about = {
        "game": game.game,
        "steps": steps,
        "seed": seed,
        "policy": "random" if policy is None else type(policy).__name__,
        "frame_skip": game.frame_skip,
        "sticky": game.sticky,
        "num_actions": game.num_actions,
    }
    parts: dict[str, np.ndarray] = {"actions": actions, "rewards": rewards, "episode_starts": starts, "ram": ram}
    return Recording(game.game, frames, parts, about)


def write_recording(recording: Recording, folder: Path) -> Recording:
    """Write a recording as a folder of NumPy arrays, whole or not at all, and return it mapped from there."""
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        np.save(temporary / FRAMES, recording.frames)
        for part, values in recording.parts.items():
            np.save(temporary / f"{part}.npy", values)
        (temporary / ABOUT).write_text(json.dumps(recording.about, indent=2), encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return read_recording(folder)


def open_atari(name: str, *, stack: int = 3, steps: int = STEPS, root: str = CACHE) -> FrameSource:
    """Open `atari:Pong,Freeway`: games played at random, recorded on first use.

    Args:
        name: Games with commas between; `@3000` behind them for another number of frames per game, and `:test` for
            recordings of another seed.
        stack: Frames of an observation.
        steps: Frames per game.
        root: Where recordings are kept.

    Raises:
        UsageError: Unknown game or split, or a number of frames that is none.
    """
    listed, _, split = name.partition(":")
    if split not in ("", "train", "test"):
        raise unknown_name(f"split of atari:{listed}", split, ("train", "test"))
    listed, _, count = listed.partition("@")
    if count and not count.isdigit():
        raise UsageError(f"{count!r} in atari:{name} is no number of frames; write atari:Pong,Freeway@{STEPS}")
    steps, seed = int(count) if count else steps, int(split == "test")
    known = list_games()
    recordings = []
    for game in (part.strip() for part in listed.split(",")):
        if game not in known:
            raise unknown_name("Atari game", game, known)
        folder = Path(root).expanduser() / "atari" / f"{game}_{steps}_{seed}"
        if not (folder / FRAMES).exists():
            print(f"recording {steps:,} frames of {game}, played at random, in {folder} …", file=sys.stderr)
            recording = record_atari([game], steps, seed=seed)[0]
            write_recording(recording, folder)
        recordings.append(read_recording(folder))
    return FrameSource(f"atari:{name}", recordings, stack)


def _gymnasium() -> Any:
    try:
        import ale_py
        import gymnasium
    except ImportError as error:
        raise MissingExtraError("gymnasium and ale-py", "rl", "playing Atari games") from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    if not any(name.startswith("ALE/") for name in gymnasium.registry):
        gymnasium.register_envs(ale_py)
    return gymnasium
