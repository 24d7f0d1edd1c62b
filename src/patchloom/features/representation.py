"""What a representation of observations looks like: collapse, similarity, sparsity, attention.

The four kinds of diagnostics of the TOV-VICReg paper (arXiv 2209.10901); the figures that measure them are defined
here.

>>> figures = representation_report(torch.randn(60, 8), torch.arange(60) % 3)
>>> figures["dead_dimensions"], abs(round(figures["similarity_gap"], 1))
(0, 0.0)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import unit
from patchloom.data.transforms import EvalTransform
from patchloom.encoders import (
    Encoder,
    attends,
    class_attention,
    depth,
    embed,
    image_size,
    normalize,
    num_prefix_tokens,
    pooled,
    run_blocks,
)
from patchloom.errors import UsageError
from patchloom.features.geometry import attention_entropy


class Observed(NamedTuple):
    """What an encoder makes of some observations."""

    features: Tensor
    """(n, D) outputs."""
    groups: Tensor
    """(n,) int64 class or game of each; zeros where there is one."""
    names: list[str]
    """Names of the groups."""
    attentions: Tensor | None
    """(n, heads, N) attention of the class token over the patches in the last block; None where that has none."""
    blocks: list[Tensor]
    """(n, D) first token after each block."""
    following: Tensor
    """(m,) cosine similarity of an observation and the one after it in the source."""


@torch.no_grad()
def observe(
    encoder: Encoder, source: Source | StreamSource, count: int = 256, device: torch.device | str = "cpu"
) -> Observed:
    """Return what an encoder makes of observations spread evenly over a source, and of their successors.

    Args:
        encoder: Computes in eval mode and is left in the mode it was found in.
        source: Images or frames by index.
        count: How many observations.
        device: Where the encoder is.

    Raises:
        UsageError: A stream, which has no indices, or no readable image.
    """
    if not isinstance(source, Source):
        raise UsageError(f"{source.name} is a stream; the representation is measured on images by index")
    require_kind(source, ("image",), "the representation")
    transform, generator = EvalTransform(image_size(encoder)), torch.Generator()
    places = np.unique(np.linspace(0, len(source) - 2, min(count, len(source) - 1)).astype(int)).tolist()
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    features, after, attentions, groups = [], [], [], []
    blocks: list[list[Tensor]] = [[] for _ in range(depth(encoder))]
    for start in range(0, len(places), 32):
        try:
            pairs = [(source.read(place), source.read(place + 1)) for place in places[start : start + 32]]
        except UnreadableImageError:
            continue
        now, later = (
            torch.stack([unit(transform(pair[which].image, generator)["image"]) for pair in pairs]).to(device)
            for which in (0, 1)
        )
        now, later = normalize(now, encoder), normalize(later, encoder)
        features.append(pooled(encoder, now).float().cpu())
        after.append(pooled(encoder, later).float().cpu())
        if attends(encoder):
            attentions.append(class_attention(encoder, now).float().cpu())
        _, taps = run_blocks(encoder, embed(encoder, now), taps=range(1, depth(encoder) + 1))
        for number, recorded in enumerate(blocks):
            token = taps[number + 1]
            recorded.append((token[:, 0] if num_prefix_tokens(encoder) else token.mean(1)).float().cpu())
        groups += [max(0, pair[0].label) for pair in pairs]
    for module, training in modes:
        module.training = training
    if not features:
        raise UsageError(f"{source.name} holds no readable image")
    vectors = torch.cat(features)
    names = source.class_names or [source.name]
    following = F.cosine_similarity(vectors, torch.cat(after))
    looks = torch.cat(attentions) if attentions else None
    return Observed(vectors, torch.tensor(groups), list(names), looks, [torch.cat(b) for b in blocks], following)


def representation_report(
    features: Tensor,
    groups: Tensor | None = None,
    attentions: Tensor | None = None,
    blocks: list[Tensor] | None = None,
    following: Tensor | None = None,
) -> dict[str, Any]:
    """Return the four diagnostics.

    Args:
        features: (n, D) representations of n observations.
        groups: (n,) int64 group (game) of each; default: one group.
        attentions: (n, heads, N) attention of the class token over the patches, non-negative.
        blocks: The class token after each block, (n, D) each; sparsity is that of `features` without them.
        following: Similarities of consecutive observations, see `Observed`.

    Returns:
        Collapse: `singular_values` (of the centred features, descending), `effective_rank`, `dead_dimensions`.
        Similarity: `similarity` (groups x groups mean cosine, different observations), `within_similarity`,
        `between_similarity` and `similarity_gap` (with more than one group), `sequence_similarity`. Sparsity: `hoyer`
        and `near_zero`, one value per block. Attention: `attention_entropy` per head, a share of its largest value,
        and `attention_focus`, 1 - their mean.
    """
    features = features.double()
    values = torch.linalg.svdvals(features - features.mean(0))
    figures: dict[str, Any] = {
        "singular_values": values.tolist(),
        "effective_rank": singular_value_effective_rank(values),
        "dead_dimensions": int((features.std(0) < 1e-3).sum()),
    }
    figures |= _similarity(features, torch.zeros(len(features), dtype=torch.int64) if groups is None else groups)
    if following is not None:
        figures["sequence_similarity"] = float(following.mean())
    layers = [features] if blocks is None else [block.double() for block in blocks]
    figures["hoyer"] = [float(hoyer_sparsity(layer).mean()) for layer in layers]
    figures["near_zero"] = [
        float((layer.abs() < 1e-2 * layer.abs().amax(1, keepdim=True)).double().mean()) for layer in layers
    ]
    if attentions is not None:
        entropy = attention_entropy(attentions).mean(0)
        figures["attention_entropy"] = entropy.tolist()
        figures["attention_focus"] = float(1 - entropy.mean())
    return figures


def singular_value_effective_rank(singular_values: Tensor) -> float:
    """Return exp(entropy of the normalised singular values), Roy & Vetterli 2007; 0 where all are 0.

    `features.geometry.covariance_effective_rank` takes their squares, the shares of variance, and so counts fewer.
    """
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    shares = singular_values / total
    return float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))


def hoyer_sparsity(x: Tensor) -> Tensor:
    """Return (√D - l1 / l2) / (√D - 1) of each row, (n, D) to (n,): 0 where all entries are alike, 1 where one is."""
    root = x.shape[1] ** 0.5
    ratio = x.abs().sum(1) / x.norm(dim=1).clamp(min=1e-12)
    return (root - ratio) / (root - 1)


def _similarity(features: Tensor, groups: Tensor) -> dict[str, Any]:
    """Return mean cosines between different observations, within and between groups."""
    unit = F.normalize(features, dim=1)
    table = unit @ unit.T
    apart = ~torch.eye(len(unit), dtype=torch.bool)
    same = groups[:, None] == groups[None]
    numbers = groups.unique().tolist()
    means = [
        [float(_mean(table[(groups == a)][:, groups == b][apart[groups == a][:, groups == b]])) for b in numbers]
        for a in numbers
    ]
    within = float(_mean(table[same & apart]))
    figures: dict[str, Any] = {"similarity": means, "within_similarity": within}
    if len(numbers) > 1:
        between = float(_mean(table[~same]))
        figures |= {"between_similarity": between, "similarity_gap": within - between}
    return figures


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.new_tensor(float("nan"))
