"""How alike the features of two images are: what an attack through a public encoder makes small.

The average token cosine similarity of the Downstream Transfer Attack (Zheng et al. 2024, "Downstream Transfer Attack:
Adversarial Attacks on Downstream Models with Pre-trained Vision Transformers", arXiv 2408.01705), and what it is
compared with: the cosine of all features as one vector (OpenTAI's taiadv), their distance (as in NRDM, Naseer et al.
2018, arXiv 1811.09020) and their length (as in PAP, Ban and Dong 2022, arXiv 2210.04087). All give one number per image
that is smaller the further an attack has come.

>>> a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
>>> average_token_cosine(a, a).item(), average_token_cosine(a, -a).item()
(1.0, -1.0)
>>> average_token_cosine(a, a.flip(1), tokens="cls", num_prefix=1).item()
0.0
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.errors import UsageError, unknown_name

TokenSet = Literal["all", "patches", "cls"]
"""Which tokens count: all, the patches (no class token, no registers), or the class token alone."""
Similarity = Literal["tokens", "flat", "l2", "norm"]
"""What is made small: mean cosine of tokens, cosine of all as one vector, minus the distance, minus the length."""

EPS = 1e-8
"""Norms below this count as this much in a cosine."""


def average_token_cosine(
    a: Tensor, b: Tensor, tokens: TokenSet = "all", num_prefix: int = 1, eps: float = EPS
) -> Tensor:
    """Return the mean over tokens of the cosine of each token of `a` with the same token of `b`, (B,) in [-1, 1].

    Half-precision features are compared in float32: where a token is short, the gradient of its cosine is large.

    Args:
        a: (B, T, D) tokens of a block, prefix tokens first.
        b: (B, T, D) tokens of the same block.
        tokens: Which tokens count.
        num_prefix: Class token and registers in front of the patches.
        eps: Least norm of a token.

    Raises:
        UsageError: Shapes that differ, an unknown set of tokens, or one that is empty.
    """
    _check_shapes(a, b)
    a, b = (_chosen(_precise(x), tokens, num_prefix) for x in (a, b))
    return F.cosine_similarity(a, b, dim=-1, eps=eps).mean(-1)


def flat_cosine(a: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    """Return the cosine of all features of an image as one vector, (B,) in [-1, 1].

    Args:
        a: (B, …) features.
        b: (B, …) features of the same shape.
        eps: Least norm of the vector.

    Raises:
        UsageError: Shapes that differ.
    """
    _check_shapes(a, b)
    return F.cosine_similarity(_precise(a).flatten(1), _precise(b).flatten(1), dim=-1, eps=eps)


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distance of all features of an image as one vector, (B,).

    Args:
        a: (B, …) features.
        b: (B, …) features of the same shape.

    Raises:
        UsageError: Shapes that differ.
    """
    _check_shapes(a, b)
    return torch.linalg.vector_norm((_precise(a) - _precise(b)).flatten(1), dim=1)


def feature_norm(a: Tensor) -> Tensor:
    """Return the Euclidean length of all features (B, …) of an image as one vector, (B,)."""
    return torch.linalg.vector_norm(_precise(a).flatten(1), dim=1)


def similarity(
    a: Tensor, b: Tensor, kind: Similarity = "tokens", tokens: TokenSet = "all", num_prefix: int = 1
) -> Tensor:
    """Return what an attack makes small, (B,).

    Args:
        a: (B, …) features of the attacked image.
        b: (B, …) features of the clean image.
        kind: `tokens` needs features (B, T, D); `norm` does not look at `b`.
        tokens: Which tokens count, for `tokens`.
        num_prefix: Class token and registers in front of the patches.

    Raises:
        UsageError: Unknown kind, or as for each.
    """
    if kind == "tokens":
        return average_token_cosine(a, b, tokens, num_prefix)
    if kind == "flat":
        return flat_cosine(a, b)
    if kind == "l2":
        return -feature_distance(a, b)
    if kind == "norm":
        return -feature_norm(a)
    raise unknown_name("similarity", kind, get_args(Similarity))


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _chosen(x: Tensor, tokens: TokenSet, num_prefix: int) -> Tensor:
    if tokens not in get_args(TokenSet):
        raise unknown_name("tokens", tokens, get_args(TokenSet))
    if tokens == "cls" and num_prefix < 1:
        raise UsageError("tokens is cls, and this encoder has no class token; use patches or all")
    chosen = {"all": x, "patches": x[:, num_prefix:], "cls": x[:, :1]}[tokens]
    if chosen.shape[1] == 0:
        raise UsageError(f"tokens is {tokens}, and of {x.shape[1]} tokens with {num_prefix} in front none is left")
    return chosen


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UsageError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
