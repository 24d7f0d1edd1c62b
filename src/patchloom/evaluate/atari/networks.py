"""What an agent is made of: something that sees, noisy layers, a head of value distributions.

Rainbow (arXiv 1710.02298): duelling streams over a categorical distribution of returns, with noise in the weights in
place of random actions.

>>> network = RainbowNetwork(make_vision("nature", frames=4), num_actions=6)
>>> network(torch.rand(2, 4, 84, 84)).shape
torch.Size([2, 6, 51])
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder, embed_dim, in_chans, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import made_from

CONVOLUTIONAL = ("nature", "data_efficient")


class Vision(nn.Module):
    """An encoder of frame stacks.

    Attributes:
        width: Width of what it gives.
        frames: Frames of a stack.
        made: What rebuilds it, see `make_vision`.
    """

    def __init__(self, encoder: nn.Module, width: int, frames: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.width, self.frames, self.settings = width, frames, settings

    def forward(self, stacks: Tensor) -> Tensor:
        """Return (B, width) for (B, frames, H, W) in [0, 1]."""
        if self.settings["kind"] == "timm":
            stacks = normalize(stacks, self.encoder)
        features: Tensor = self.encoder(stacks)
        return features


def make_vision(kind: str, frames: int = 4, size: int = 84) -> Vision:
    """Return a convolutional network: `nature` (DQN's) or `data_efficient` (the data-efficient Rainbow's).

    Raises:
        UsageError: Another word.
    """
    if kind == "nature":
        shapes: tuple[tuple[int, int, int], ...] = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    elif kind == "data_efficient":
        shapes = ((32, 5, 5), (64, 5, 5))
    else:
        raise UsageError(f"there is no convolutional network {kind!r}; use {' or '.join(CONVOLUTIONAL)}")
    layers: list[nn.Module] = []
    channels, side = frames, size
    for width, kernel, stride in shapes:
        layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU(inplace=True)]
        channels, side = width, (side - kernel) // stride + 1
    settings = {"kind": kind, "frames": frames, "size": size}
    return Vision(nn.Sequential(*layers, nn.Flatten()), channels * side * side, frames, settings)


def vision_of(encoder: Encoder) -> Vision:
    """Return a timm encoder as what an agent sees with."""
    about = made_from(encoder)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in about["model_args"].items()}
    config = dict(encoder.pretrained_cfg)
    settings = {
        "kind": "timm",
        "architecture": about["architecture"],
        "model_args": plain,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    return Vision(encoder, embed_dim(encoder), in_chans(encoder), settings)


def rebuild_vision(settings: dict[str, Any]) -> Vision:
    """Return a fresh network of the kind `Vision.settings` describes."""
    if settings["kind"] != "timm":
        return make_vision(settings["kind"], settings["frames"], settings["size"])
    arguments: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in settings["model_args"].items()
    }
    encoder = create_encoder(settings["architecture"], image_size=arguments.pop("img_size"), **arguments)
    encoder.pretrained_cfg = {
        **dict(encoder.pretrained_cfg),
        "mean": tuple(settings["mean"]),
        "std": tuple(settings["std"]),
    }
    return vision_of(encoder)


class RainbowNetwork(nn.Module):
    """Log-probabilities of returns for each action.

    Args:
        vision: What sees.
        num_actions: Actions of the game.
        hidden: Width of each stream's hidden layer; data-efficient Rainbow: 256.
        atoms: Values a return can take; paper: 51.
        largest: They are spread from - largest to largest; paper: 10.
        sigma: Noise of the weights at the start; data-efficient Rainbow: 0.1.
    """

    def __init__(
        self,
        vision: Vision,
        num_actions: int,
        hidden: int = 256,
        atoms: int = 51,
        largest: float = 10.0,
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.num_actions, self.atoms = num_actions, atoms
        self.value = nn.Sequential(
            NoisyLinear(vision.width, hidden, sigma), nn.ReLU(), NoisyLinear(hidden, atoms, sigma)
        )
        self.advantage = nn.Sequential(
            NoisyLinear(vision.width, hidden, sigma), nn.ReLU(), NoisyLinear(hidden, num_actions * atoms, sigma)
        )
        self.register_buffer("support", torch.linspace(-largest, largest, atoms), persistent=False)

    def forward(self, stacks: Tensor) -> Tensor:
        """Return (B, actions, atoms) log-probabilities for (B, frames, H, W) in [0, 1]."""
        features = self.vision(stacks)
        value = self.value(features).unsqueeze(1)
        advantage = self.advantage(features).view(-1, self.num_actions, self.atoms)
        return F.log_softmax(value + advantage - advantage.mean(1, keepdim=True), dim=-1)

    def values(self, stacks: Tensor) -> Tensor:
        """Return (B, actions) expected returns."""
        support: Any = self.support
        return (self(stacks).exp() * support).sum(-1)

    def draw_noise(self) -> None:
        """Draw the weights' noise anew."""
        for module in self.modules():
            if isinstance(module, NoisyLinear):
                module.draw_noise()


class NoisyLinear(nn.Module):
    """A linear layer whose weights carry factorised Gaussian noise while training (arXiv 1706.10295).

    Args:
        inputs: Width of what goes in.
        outputs: Width of what comes out.
        sigma: Noise at the start, times 1 / √inputs.
    """

    def __init__(self, inputs: int, outputs: int, sigma: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_noise = nn.Parameter(torch.full((outputs, inputs), sigma * bound))
        self.bias_noise = nn.Parameter(torch.full((outputs,), sigma / math.sqrt(outputs)))
        self.register_buffer("drawn_in", torch.zeros(inputs), persistent=False)
        self.register_buffer("drawn_out", torch.zeros(outputs), persistent=False)

    def draw_noise(self) -> None:
        """Draw anew."""
        for name in ("drawn_in", "drawn_out"):
            noise = torch.randn_like(getattr(self, name))
            setattr(self, name, noise.sign() * noise.abs().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs); without noise in eval mode."""
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        drawn_in: Any = self.drawn_in
        drawn_out: Any = self.drawn_out
        weight = self.weight + self.weight_noise * torch.outer(drawn_out, drawn_in)
        return F.linear(x, weight, self.bias + self.bias_noise * drawn_out)
