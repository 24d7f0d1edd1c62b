"""A data-efficient Rainbow agent: distributional double Q-learning over several steps, noise instead of chance.

"Rainbow", arXiv 1710.02298; its data-efficient settings: "When to use parametric models in reinforcement learning?",
arXiv 1906.05243. No well-kept library in the project's dependencies has it; this is its own few lines in torch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.evaluate.atari.networks import RainbowNetwork, Vision
from patchloom.evaluate.atari.replay import Replay


@dataclass(frozen=True)
class AgentConfig:
    """Settings of the agent; the defaults are those of the data-efficient Rainbow."""

    batch_size: int = 32
    n_step: int = 20
    discount: float = 0.99
    hidden: int = 256
    atoms: int = 51
    largest: float = 10.0
    sigma: float = 0.1
    lr: float = 1e-4
    encoder_lr: float = 1e-4
    eps: float = 1.5e-4
    clip_grad: float = 10.0
    alpha: float = 0.5
    beta: float = 0.4
    freeze: bool = False


class RainbowAgent:
    """Acts, and learns from its memory.

    Args:
        vision: What it sees with; trained with it unless `config.freeze`.
        num_actions: Actions of the game.
        config: Settings.
        device: Where it computes.
    """

    def __init__(
        self, vision: Vision, num_actions: int, config: AgentConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.online = RainbowNetwork(vision, num_actions, config.hidden, config.atoms, config.largest, config.sigma).to(
            self.device
        )
        vision.requires_grad_(not config.freeze)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        heads = [p for name, p in self.online.named_parameters() if not name.startswith("vision.")]
        groups: list[dict[str, Any]] = [{"params": heads, "lr": config.lr}]
        if not config.freeze:
            groups.append({"params": list(vision.parameters()), "lr": config.encoder_lr})
        self.optimizer = torch.optim.Adam(groups, eps=config.eps)
        self._settle()

    def _settle(self) -> None:
        """Noise is on while learning; a frozen encoder stays in eval mode."""
        self.online.train()
        self.target.train()
        if self.config.freeze:
            self.online.vision.eval()
            self.target.vision.eval()

    @torch.no_grad()
    def act(self, stack: np.ndarray, *, noisy: bool = True) -> int:
        """Return the action of highest expected return for (frames, H, W) uint8.

        Args:
            stack: What is seen.
            noisy: Explore with noise in the weights; without, the mean weights act.
        """
        if noisy:
            self.online.draw_noise()
        else:
            self.online.eval()
        values = self.online.values(self._pixels(torch.from_numpy(np.ascontiguousarray(stack))[None]))
        if not noisy:
            self._settle()
        return int(values.argmax(1))

    def learn(self, memory: Replay, generator: np.random.Generator, beta: float) -> float:
        """Take one step of learning from the memory and return its loss."""
        batch = memory.sample(self.config.batch_size, generator, beta)
        self.online.draw_noise()
        logs = self.online(self._pixels(batch.stacks))
        chosen = logs[torch.arange(len(logs)), batch.actions.to(self.device)]
        aim = self.aim(batch.returns, batch.discounts, self._pixels(batch.following))
        errors = -(aim * chosen).sum(1)
        self.optimizer.zero_grad()
        loss = (batch.weights.to(self.device) * errors).mean()
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.config.clip_grad)
        self.optimizer.step()
        memory.update(batch.places, errors.detach().cpu().numpy())
        return float(loss.detach())

    @torch.no_grad()
    def aim(self, returns: Tensor, discounts: Tensor, following: Tensor) -> Tensor:
        """Return the distributions of returns to learn: those n steps later, moved and laid on the support.

        The online network chooses the action later, the target network says what it is worth (double Q-learning).

        Args:
            returns: (B,) rewards of the steps between.
            discounts: (B,) 0 where nothing follows.
            following: (B, frames, H, W) in [0, 1].

        Returns:
            (B, atoms) probabilities.
        """
        best = self.online.values(following).argmax(1)
        self.target.draw_noise()
        later = self.target(following).exp()[torch.arange(len(following)), best]
        support: Any = self.online.support
        moved = returns.to(self.device)[:, None] + discounts.to(self.device)[:, None] * support
        return project(moved, later, support)

    def copy_to_target(self) -> None:
        """Let the target network be what the online one is now."""
        self.target.load_state_dict(self.online.state_dict())

    def state(self) -> dict[str, Any]:
        """Return weights and optimiser."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _pixels(self, stacks: Tensor) -> Tensor:
        return stacks.to(self.device).float().div_(255)


def project(values: Tensor, probabilities: Tensor, support: Tensor) -> Tensor:
    """Lay a distribution over `values` on the evenly spaced `support`, each value shared by its two neighbours.

    Args:
        values: (B, atoms); beyond the ends of the support they count as the ends.
        probabilities: (B, atoms).
        support: (atoms,) ascending.

    Returns:
        (B, atoms) probabilities.
    """
    low, high, count = float(support[0]), float(support[-1]), len(support)
    places = (values.clamp(low, high) - low) / (high - low) * (count - 1)
    below = places.floor().long().clamp(0, count - 1)
    above = (below + 1).clamp(max=count - 1)
    share = places - below
    laid = torch.zeros_like(probabilities)
    laid.scatter_add_(1, below, probabilities * (1 - share))
    laid.scatter_add_(1, above, probabilities * share)
    return laid
