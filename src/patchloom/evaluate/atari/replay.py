"""What an agent remembers: every frame once, and transitions over several steps drawn by priority.

Priorities are proportional (arXiv 1511.05952). They are summed up anew for every draw, which for the hundred thousand
steps of data-efficient learning takes a fraction of a millisecond and needs no tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transitions(NamedTuple):
    """A batch of steps to learn from."""

    stacks: Tensor
    """(B, frames, H, W) uint8: what was seen."""
    actions: Tensor
    """(B,) int64."""
    returns: Tensor
    """(B,) discounted rewards of the next n steps."""
    following: Tensor
    """(B, frames, H, W) uint8: what was seen n steps later."""
    discounts: Tensor
    """(B,) γⁿ, or 0 where the episode ended before."""
    weights: Tensor
    """(B,) importance weights, at most 1."""
    places: np.ndarray
    """(B,) where they are kept."""


class Replay:
    """A memory of `capacity` steps.

    Args:
        capacity: Most steps; data-efficient learning keeps them all.
        frames: Frames of a stack.
        size: Side of a frame.
        n_step: Steps of a return.
        discount: γ.
        alpha: Power of the priorities; 0 draws evenly.
        path: File the frames are kept in; default: memory.
    """

    def __init__(
        self,
        capacity: int,
        frames: int,
        size: int = 84,
        n_step: int = 20,
        discount: float = 0.99,
        alpha: float = 0.5,
        path: Path | None = None,
    ) -> None:
        self.capacity, self.frames, self.n_step, self.alpha = capacity, frames, n_step, alpha
        shape = (capacity, size, size)
        self.pixels: np.ndarray
        if path is None:
            self.pixels = np.zeros(shape, np.uint8)
        elif path.exists() and path.stat().st_size == int(np.prod(shape)):
            self.pixels = np.memmap(path, np.uint8, "r+", shape=shape)
        else:
            self.pixels = np.memmap(path, np.uint8, "w+", shape=shape)
        self.actions = np.zeros(capacity, np.int64)
        self.rewards = np.zeros(capacity, np.float32)
        self.over = np.zeros(capacity, bool)
        self.starts = np.zeros(capacity, np.int64)
        self.priorities = np.zeros(capacity, np.float64)
        self.discounts = discount ** np.arange(n_step + 1)
        self.size = 0
        self.highest = 1.0

    def add(self, frame: np.ndarray, action: int, reward: float, over: bool, first: bool) -> None:
        """Remember a step: the frame seen, what was done, what it brought.

        Args:
            frame: (H, W) uint8.
            action: What was done.
            reward: What it brought.
            over: Nothing that comes later counts: the episode, or a life, was lost.
            first: The frame is an episode's first, so no stack reaches back over it.
        """
        place = self.size
        self.pixels[place] = frame
        self.actions[place], self.rewards[place], self.over[place] = action, reward, over
        self.starts[place] = place if first or place == 0 else self.starts[place - 1]
        ready = place - self.n_step  # its return is known now
        if ready >= 0 and self._whole(ready):
            self.priorities[ready] = self.highest**self.alpha
        self.size += 1

    def _whole(self, place: int) -> bool:
        """Return whether a return does not run on into an episode that begins without the last one's end."""
        later = self.starts[place + self.n_step]
        if later <= place:
            return True
        return bool(self.over[place:later].any())

    def stack(self, place: int) -> np.ndarray:
        """Return what was seen at a step, (frames, H, W): an episode's first frame stands in for those before it."""
        return self.stacks(np.array([place]))[0]

    def stacks(self, places: np.ndarray) -> np.ndarray:
        """Return what was seen at steps, (B, frames, H, W)."""
        back = places[:, None] + np.arange(1 - self.frames, 1)
        stacked: np.ndarray = self.pixels[np.maximum(back, self.starts[places][:, None])]
        return stacked

    def sample(self, batch: int, generator: np.random.Generator, beta: float = 0.4) -> Transitions:
        """Draw transitions with probability in proportion to their priority.

        Args:
            batch: How many.
            generator: Where the draws come from.
            beta: How far the weights undo the unevenness of the draw, 0 … 1.
        """
        sums = np.cumsum(self.priorities[: self.size])
        drawn = generator.random(batch) * sums[-1] * (1 - 1e-12)  # rounding must not lead past the last priority
        places = np.searchsorted(sums, drawn, side="right")
        shares = self.priorities[places] / sums[-1]
        count = int(np.count_nonzero(self.priorities[: self.size]))
        weights = (count * shares) ** -beta
        steps = places[:, None] + np.arange(self.n_step)
        # A step counts while none before it, from the first on, was the last.
        ended = np.cumsum(self.over[steps], axis=1)
        alive = (ended - self.over[steps]) == 0
        returns = (self.rewards[steps] * alive * self.discounts[: self.n_step]).sum(1)
        return Transitions(
            torch.from_numpy(self.stacks(places)),
            torch.from_numpy(self.actions[places]),
            torch.from_numpy(returns.astype(np.float32)),
            torch.from_numpy(self.stacks(places + self.n_step)),
            torch.from_numpy((self.discounts[-1] * (ended[:, -1] == 0)).astype(np.float32)),
            torch.from_numpy((weights / weights.max()).astype(np.float32)),
            places,
        )

    def update(self, places: np.ndarray, errors: np.ndarray) -> None:
        """Set the priorities of transitions to their latest errors."""
        errors = np.abs(errors).astype(np.float64) + 1e-6
        self.priorities[places] = errors**self.alpha
        self.highest = max(self.highest, float(errors.max()))

    def state(self) -> dict[str, Any]:
        """Return everything but the frames, as tensors and numbers; frames in a file are written out."""
        if isinstance(self.pixels, np.memmap):
            self.pixels.flush()
        names = ("actions", "rewards", "over", "starts", "priorities")
        arrays = {name: torch.from_numpy(getattr(self, name)[: self.size].copy()) for name in names}
        return {**arrays, "size": self.size, "highest": self.highest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state; the frames are in the file."""
        self.size, self.highest = int(state["size"]), float(state["highest"])
        for name in ("actions", "rewards", "over", "starts", "priorities"):
            getattr(self, name)[: self.size] = state[name].numpy()
            getattr(self, name)[self.size :] = 0
