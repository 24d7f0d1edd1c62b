"""What reads an adapted encoder: pooling with a norm of its own, and a linear classifier behind a batch norm."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from patchloom.base.choices import HeadPool as Pool
from patchloom.encoders import Encoder, embed_dim, num_prefix_tokens
from patchloom.encoders.insertion import Replacement
from patchloom.errors import UsageError


class NormalizedLinearHead(nn.Sequential):
    """Batch norm without parameters, then a linear classifier (He et al. 2021, arXiv 2111.06377, appendix A.1).

    Features of frozen encoders differ in scale from one to the next by orders of magnitude; the batch norm lets one
    learning rate serve them all.

    Args:
        dim: Width of the features.
        classes: Number of outputs.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes))
        trunc_normal_(self[1].weight, std=0.01)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (B, C) of features (B, D).

        Raises:
            UsageError: A batch of one image in training: its statistics would be its own.
        """
        if self.training and len(input) < 2:
            raise UsageError("the head's batch norm needs at least 2 images per batch in training; raise batch_size")
        statistics, linear = self[0], self[1]
        running: Any = statistics.running_mean
        # Running statistics stay in float32 whatever the arithmetic around them.
        with torch.autocast(input.device.type, enabled=False):
            normed = statistics(input.to(running.dtype))
        logits: Tensor = linear(normed)
        return logits

    def folded(self) -> nn.Linear:
        """Return one linear layer that gives the same logits as this head in eval mode."""
        statistics: Any = self[0]
        linear: Any = self[1]
        scale = (statistics.running_var + statistics.eps).rsqrt()
        plain = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        with torch.no_grad():
            plain.weight.copy_(linear.weight * scale)
            plain.bias.copy_(linear.bias - plain.weight @ statistics.running_mean)
        return plain


class PoolNorm(nn.Module):
    """The norm behind mean pooling, for an encoder that norms its tokens instead."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim(encoder), eps=getattr(encoder.norm, "eps", 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, D) normed."""
        normed: Tensor = self.norm(x)
        return normed


def needs_pool_norm(encoder: Encoder, pool: Pool) -> bool:
    """Return whether mean pooling calls for a norm that the encoder does not have."""
    return pool == "avg" and not isinstance(encoder.norm, nn.Identity)


def pool_replacements(encoder: Encoder, pool: Pool, norm: nn.Module | None) -> list[Replacement]:
    """Return what has to stand in an encoder for it to pool as wanted.

    Args:
        encoder: The encoder.
        pool: `auto`: as the encoder does; `cls`: the class token after the final norm; `avg`: the mean over patch
            tokens of the un-normed output, then a norm (`global_pool` of MAE's code).
        norm: The norm for `avg`, where the encoder has none behind its pooling.

    Raises:
        UsageError: `cls` for an encoder without class token.
    """
    if pool == "auto":
        return []
    if pool == "cls":
        if num_prefix_tokens(encoder) == 0:
            raise UsageError("pool=cls needs a class token and this encoder has none; use pool=avg")
        return [(encoder, "global_pool", "token")]
    replaced: list[Replacement] = [(encoder, "global_pool", "avg")]
    if norm is not None:
        replaced += [(encoder, "norm", nn.Identity()), (encoder, "fc_norm", norm)]
    return replaced
