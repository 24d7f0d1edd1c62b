"""A linear classifier of the tokens of an encoder's last blocks, and what it reads of them.

DINOv2's linear probe (arXiv 2304.07193), for volumes as the DINOv2 radiology benchmark (arXiv 2312.02366) has it.
`linear_grid` trains such probes on features from the cache; this is one of them as a module, as published checkpoints
have it.

>>> layers = [(torch.randn(2, 9, 8), torch.randn(2, 8)) for _ in range(4)]
>>> probe = LinearProbe(embed_dim=8, num_classes=3, blocks=4, avgpool=True)
>>> probe(layers).shape, probe_input(layers, blocks=4, avgpool=True).shape
(torch.Size([2, 3]), torch.Size([2, 40]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from patchloom.encoders import Tokens
from patchloom.errors import UsageError

Layer: TypeAlias = Tokens | tuple[Tensor, Tensor]
"""What a block gives out, normed: `Tokens`, or as published a pair of patches (B, N, D) and class token (B, D)."""

INITIAL_DEVIATION = 0.01


class LinearProbe(nn.Module):
    """One linear layer on class tokens of the last blocks and, if asked for, the mean over the last block's patches.

    Args:
        embed_dim: Width D of the tokens.
        num_classes: Logits C; published probes of two classes have one.
        blocks: How many of the last blocks give their class token.
        avgpool: Add the mean over the last block's patches.
        volumes: Classify volumes: what is read of their slices is averaged before the linear layer.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, blocks: int = 1, avgpool: bool = False, volumes: bool = False
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.blocks = blocks
        self.avgpool = avgpool
        self.volumes = volumes
        self.linear = nn.Linear(probe_columns(embed_dim, blocks, avgpool).stop, num_classes)
        nn.init.normal_(self.linear.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Sequence[Any]) -> Tensor:
        """Return logits (B, C).

        Args:
            tokens: A `Layer` for each of the last blocks, oldest first; more than are read are no harm. Of volumes: a
                list with such a list for each volume, whose B are its slices; or, as published, with a list of slices
                for each volume and such a list for each slice. A volume alone need not be in a list.

        Raises:
            UsageError: Too few blocks, tokens of another width, or a volume without slices.
        """
        if not self.volumes:
            return self._logits(probe_input(tokens, self.blocks, self.avgpool))
        volumes = [tokens] if _is_layer(tokens[0]) else tokens
        return self._logits(torch.stack([self._mean_slice(volume) for volume in volumes]))

    def _mean_slice(self, volume: Sequence[Any]) -> Tensor:
        slices = [volume] if volume and _is_layer(volume[0]) else volume
        read = [probe_input(one, self.blocks, self.avgpool) for one in slices]
        if not sum(map(len, read)):
            raise UsageError("a volume without slices has no class; leave it out")
        return torch.cat(read).mean(0)

    def _logits(self, read: Tensor) -> Tensor:
        if read.shape[-1] != self.linear.in_features:
            raise UsageError(
                f"the tokens of {self.blocks} blocks give {read.shape[-1]} numbers and this probe reads "
                f"{self.linear.in_features}; it was trained on an encoder of width {self.embed_dim}"
            )
        logits: Tensor = self.linear(read.to(self.linear.weight.dtype))
        return logits


class LinearProbes(nn.ModuleDict):
    """Several probes of the same tokens, by name."""

    def forward(self, tokens: Sequence[Any]) -> dict[str, Tensor]:
        """Return the logits of each probe, by name; `tokens` as for `LinearProbe`."""
        return {name: probe(tokens) for name, probe in self.items()}


def probe_input(tokens: Sequence[Layer], blocks: int, avgpool: bool) -> Tensor:
    """Return what a probe reads (B, blocks · D), or with `avgpool` (B, (blocks + 1) · D).

    Args:
        tokens: A `Layer` for each of the last blocks, oldest first.
        blocks: How many of the last blocks give their class token.
        avgpool: Add the mean over the last block's patches.

    Raises:
        UsageError: Fewer blocks than are read, or an encoder without class token.
    """
    if len(tokens) < blocks:
        raise UsageError(f"this probe reads the last {blocks} blocks and gets {len(tokens)}")
    pairs = [_pair(layer) for layer in tokens[len(tokens) - blocks :]]
    mean = [pairs[-1][0].mean(1)] if avgpool else []
    return torch.cat([*(class_token for _, class_token in pairs), *mean], dim=1)


def probe_columns(width: int, blocks: int, avgpool: bool = False, most: int | None = None) -> slice:
    """Return the columns of what `probe_input` gives for `most` blocks and the mean that a probe of fewer reads.

    Args:
        width: D.
        blocks: How many of the last blocks the probe reads.
        avgpool: Whether it reads the mean over patches, which comes last.
        most: Blocks in the vectors; default: those of the probe.
    """
    most = blocks if most is None else most
    return slice((most - blocks) * width, (most + avgpool) * width)


def _is_layer(one: Any) -> bool:
    return isinstance(one[0], Tensor)


def _pair(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return patches and class token of a layer."""
    if not isinstance(layer, Tokens):
        return layer
    if not layer.prefix.shape[1]:
        raise UsageError("a linear probe reads class tokens and this encoder has none")
    return layer.patches, layer.prefix[:, 0]
