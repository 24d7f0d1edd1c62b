"""`patchloom data atari`: games recorded as frames, played at random or by an agent that `evaluate rl` trained."""

from __future__ import annotations

import json
from typing import Annotated

from annotated_types import Ge

from patchloom.base.ranges import Count, Fraction, PositiveInt, Probability, checked


@checked
def record_frames(
    games: str,
    out: str,
    steps: PositiveInt = 10_000,
    policy: str = "random",
    epsilon: Probability = 0.05,
    frame_skip: PositiveInt = 4,
    sticky: Fraction = 0.25,
    size: Annotated[int, Ge(8)] = 84,
    seed: Count = 0,
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
    from patchloom.data.atari import record_atari
    from patchloom.evaluate.atari.record import ABOUT, AgentPlayer, find_agent, load_agent

    player: AgentPlayer | None = None
    if policy != "random":
        player = AgentPlayer(load_agent(policy), epsilon)
        size = int(json.loads((find_agent(policy) / ABOUT).read_text(encoding="utf-8"))["size"])
    recordings = record_atari(
        games, steps, frame_skip, seed, out=out, policy=player, sticky=sticky, size=size, overwrite=overwrite
    )
    episodes = {recording.name: int(recording.parts["episode_starts"].sum()) for recording in recordings}
    return {"data": f"frames:{out}", "frames": steps * len(recordings), "episodes": episodes}
