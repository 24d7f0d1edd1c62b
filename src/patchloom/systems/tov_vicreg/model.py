"""VICReg with temporal order verification: two views of an observation agree, and its neighbours know their places.

Variance, invariance and covariance keep the representations of two augmented views alike without letting them
collapse; a linear head on the encoder's outputs says whether three observations in time (t, t - 1, t + 1) stand in
their agreed places or were shuffled. "Pretraining the Vision Transformer using self-supervised methods for vision based
Deep Reinforcement Learning", arXiv 2209.10901.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> model = TOVVICReg(create_encoder("vit_tiny_patch8_84", depth=1), projector="64-64")
>>> losses = model(*torch.rand(4, 8, 3, 84, 84))
>>> sorted(losses)
['covariance', 'invariance', 'loss', 'temporal', 'variance']
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from patchloom.encoders import Encoder, embed_dim
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.training.gather import gathered

PERMUTATIONS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(3)))
"""Orders of (t, t - 1, t + 1), in lexicographic order; number 0 leaves them in place."""

Observations = tuple[Tensor, Tensor, Tensor, Tensor]


class TOVVICReg(nn.Module):
    """An encoder with VICReg's projector and the temporal order head (arXiv 2209.10901).

    Run by several processes, all losses and the projector's batch norms are those of the batches together.

    Args:
        encoder: Module that gives (B, D) for (B, C, H, W): a timm encoder without head.
        projector: Widths of the projector's layers, joined by dashes; paper: 1024-1024-1024.
        sim: Weight of the invariance; paper: 10.
        std: Weight of the variance; paper: 10.
        cov: Weight of the covariance; paper: 10.
        temporal: Weight of the order loss; paper: 0.1.
        balanced: Leave half of the triplets in place instead of one in six.
        chronological: Let (t - 1, t, t + 1) be the agreed order instead of (t, t - 1, t + 1).

    Raises:
        UsageError: The projector's widths cannot be read.
    """

    def __init__(
        self,
        encoder: Encoder,
        projector: str = "1024-1024-1024",
        sim: float = 10.0,
        std: float = 10.0,
        cov: float = 10.0,
        temporal: float = 0.1,
        balanced: bool = False,
        chronological: bool = False,
    ) -> None:
        super().__init__()
        width = embed_dim(encoder)
        self.encoder = encoder
        self.projector = make_projector(width, projector)
        self.order_head = TemporalOrderHead(width)
        self.sim, self.std, self.cov, self.temporal = sim, std, cov, temporal
        self.balanced, self.chronological = balanced, chronological

    def forward(
        self, view1: Tensor, view2: Tensor, previous: Tensor, next: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `loss`, `invariance`, `variance`, `covariance` and `temporal`, each a scalar without its weight.

        Args:
            view1: (B, C, H, W) first augmented view of the observations at t, in [0, 1]; B at least 2.
            view2: The second.
            previous: The observations before t.
            next: The observations after t.
            labels: (B,) int64 in 0 … 5, the row of `PERMUTATIONS` each triplet is put in; default: drawn.

        Raises:
            UsageError: A single observation has no variance.
        """
        return self.losses(self.represent(view1, view2, previous, next), labels)[0]

    def represent(self, view1: Tensor, view2: Tensor, previous: Tensor, next: Tensor) -> Observations:
        """Return the encoder's outputs for the four, (B, D) each, rows of all processes together."""
        # One pass: nothing in a Vision Transformer depends on what else is in the batch.
        parts = self.encoder(torch.cat([view1, view2, previous, next])).chunk(4)
        first, second, before, after = (gathered(part) for part in parts)
        return first, second, before, after

    def losses(self, h: Observations, labels: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the losses, and the order head's logits and targets, (B, 1) each.

        Args:
            h: Outputs of `represent`.
            labels: As in `forward`, rows of all processes together.

        Raises:
            UsageError: A single observation has no variance.
        """
        view1, view2, previous, following = h
        if len(view1) < 2:
            raise UsageError("a batch of 1 observation has no variance; use a batch_size of at least 2")
        # Called one by one, in this order, each with its own batch statistics. Of the neighbours' projections the
        # batch norms' running statistics are all that is kept, as published.
        z1, z2 = self.projector(view1), self.projector(view2)
        if self.projector.training:
            with torch.no_grad():
                self.projector(previous), self.projector(following)
        parts = vicreg_terms(z1, z2)
        triplet = [previous, view1, following] if self.chronological else [view1, previous, following]
        if labels is None:
            labels = draw_orders(len(view1), balanced=self.balanced, device=view1.device)
        logits, targets = self.order_head(triplet, labels)
        parts["temporal"] = F.binary_cross_entropy_with_logits(at_least_float32(logits), at_least_float32(targets))
        loss = (
            self.sim * parts["invariance"]
            + self.temporal * parts["temporal"]
            + self.std * parts["variance"]
            + self.cov * parts["covariance"]
        )
        return {"loss": loss, **parts}, logits, targets


class TemporalOrderHead(nn.Module):
    """One linear layer that says whether representations in time are shuffled.

    Args:
        dim: Width D of a representation.
        n_items: Representations told apart; paper: 3.
    """

    def __init__(self, dim: int, n_items: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(n_items * dim, 1)
        orders = list(itertools.permutations(range(n_items)))
        self.register_buffer("orders", torch.tensor(orders), persistent=False)

    def forward(self, reprs: list[Tensor], labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, 1) logits and (B, 1) targets: 0 where the items are in place, 1 where they are shuffled.

        Args:
            reprs: The items, (B, D) each, in place.
            labels: (B,) int64, the permutation of each sample (row of `PERMUTATIONS` for three items); default: drawn.
        """
        orders: Any = self.orders
        items = torch.stack(list(reprs), dim=1)  # (B, n, D)
        if labels is None:
            labels = draw_orders(len(items), choices=len(orders), device=items.device)
        chosen = orders.to(items.device)[labels.to(items.device)]  # (B, n)
        shuffled = items.gather(1, chosen.unsqueeze(-1).expand_as(items))
        logits: Tensor = self.linear(shuffled.flatten(1))
        return logits, (labels.to(items.device) != 0).to(logits.dtype).unsqueeze(1)


def draw_orders(
    count: int,
    *,
    balanced: bool = False,
    choices: int = len(PERMUTATIONS),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a permutation for each of `count` triplets.

    Args:
        count: How many.
        balanced: Number 0 (in place) with probability a half instead of 1 / `choices`.
        choices: How many permutations there are.
        generator: Where the draws come from; default: torch's global one.
        device: Where the result lies; default: the CPU.

    Returns:
        (count,) int64 in 0 … choices - 1.
    """
    if not balanced:
        return torch.randint(choices, (count,), generator=generator, device=device)
    shuffled = torch.randint(1, choices, (count,), generator=generator, device=device)
    stays = torch.rand(count, generator=generator, device=device) < 0.5
    return torch.where(stays, torch.zeros_like(shuffled), shuffled)


def vicreg_terms(z_x: Tensor, z_y: Tensor, eps: float = 1e-4, gamma: float = 1.0) -> dict[str, Tensor]:
    """Return VICReg's three terms of two batches of embeddings (Bardes et al. 2021, arXiv 2105.04906), without weights.

    Args:
        z_x: (N, d), N at least 2.
        z_y: (N, d).
        eps: Added to the variance.
        gamma: Standard deviation each dimension is to reach.

    Returns:
        Scalars `invariance`, `variance` and `covariance`; half precision is computed in float32, whatever the autocast.
    """
    with torch.autocast(z_x.device.type, enabled=False):
        x, y = at_least_float32(z_x), at_least_float32(z_y)
        count, width = x.shape
        invariance = F.mse_loss(x, y)
        x, y = x - x.mean(0), y - y.mean(0)
        spreads = [(z.var(0) + eps).sqrt() for z in (x, y)]
        variance = sum((F.relu(gamma - spread).mean() / 2 for spread in spreads), x.new_zeros(()))
        products = [z.T @ z / (count - 1) for z in (x, y)]
        squares = [product.square().sum() - product.diagonal().square().sum() for product in products]
        covariance = (squares[0] + squares[1]) / width
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


def make_projector(width: int, spec: str) -> nn.Sequential:
    """Return the projector: linear layers with batch norm and ReLU between them, the last one without bias.

    Args:
        width: Width of what goes in.
        spec: Widths of the layers, joined by dashes.

    Raises:
        UsageError: The widths cannot be read.
    """
    try:
        widths = [width, *(int(part) for part in spec.split("-"))]
    except ValueError:
        widths = []
    if len(widths) < 2 or min(widths) < 1:
        raise UsageError(f"projector is {spec!r}; give widths joined by dashes, such as 1024-1024-1024")
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


def initialize_as_dino(encoder: Encoder) -> None:
    """Initialise an encoder as the published pre-training does.

    Linear weights, positions and class token: normal with σ = 0.02, cut at ±2 as DINO has it; biases 0; norms (1, 0);
    the convolution as PyTorch does.
    """
    encoder.apply(_init_linear)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    for name in ("cls_token", "reg_token", "pos_embed"):
        if isinstance(parameter := getattr(encoder, name, None), nn.Parameter):
            trunc_normal_(parameter, std=0.02)


def _init_linear(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
