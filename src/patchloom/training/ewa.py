"""Experts weights averaging: small mixtures of feed-forwards while training, plain feed-forwards afterwards.

Some feed-forwards of a ViT become several experts, each of which sees a random part of the tokens; after every
optimiser step the experts move towards each other; at the end each mixture is averaged into one feed-forward, so what
is shipped is the plain model, at no cost. Huang et al. 2023, arXiv 2308.06093. No code was published: where the paper
leaves something open there is an argument.

>>> import timm, torch
>>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> vit = expand_ffn(vit, num_experts=4)
>>> average_experts_(experts_of(vit), share_rate=0.1)
>>> images = torch.randn(1, 3, 224, 224)
>>> before = vit.eval()(images)
>>> torch.allclose(average_ffn(vit)(images), before, atol=1e-5)
True
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from patchloom.base.ranges import checked
from patchloom.encoders import Encoder
from patchloom.errors import UsageError, unknown_name

Normalisation = Literal["leave_one_out", "mean"]
Schedule = Literal["linear", "constant", "cosine"]
NORMALISATIONS, SCHEDULES = ("leave_one_out", "mean"), ("linear", "constant", "cosine")


class RandomPartitionExperts(nn.Module):
    """Stands in for a feed-forward: tokens go to experts by a new random partition in equal parts at every call.

    There is no router and no gate: an expert's output is taken as it is. In eval mode all tokens pass the average of
    the experts, which is what will be shipped.

    Args:
        ffn: The feed-forward; the first expert is this very module.
        num_experts: N, at least 2.
        init: `independent` gives each further expert weights of the same distribution, drawn anew (for training from
            scratch); `copy` gives it the same weights (for training on).
        scope: Partition the tokens of the whole batch, or those of each image.
        eval_mode: `average`, or `random` to partition as in training.

    Raises:
        UsageError: Fewer than two experts, a feed-forward that is a mixture already, or an unknown word.
    """

    @checked
    def __init__(
        self,
        ffn: nn.Module,
        num_experts: Annotated[int, Ge(2)] = 4,
        init: Literal["independent", "copy"] = "independent",
        scope: Literal["batch", "image"] = "batch",
        eval_mode: Literal["average", "random"] = "average",
    ) -> None:
        super().__init__()
        if isinstance(ffn, RandomPartitionExperts):
            raise UsageError("this feed-forward is a mixture of experts already")
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in ffn.modules()):
            warnings.warn("the running statistics of batch norms in a feed-forward are averaged too", stacklevel=2)
        self.experts = nn.ModuleList([ffn, *(copy.deepcopy(ffn) for _ in range(num_experts - 1))])
        if init == "independent":
            for expert in self.experts[1:]:
                _draw_anew(expert)
        self.scope = scope
        self.eval_mode = eval_mode
        self._averaged: tuple[tuple[int, ...], dict[str, Tensor]] | None = None

    def forward(self, x: Tensor, permutation: Tensor | None = None) -> Tensor:
        """Return the feed-forward of all tokens.

        Args:
            x: (…, D), prefix tokens included.
            permutation: Order in which tokens are dealt out: (n,) of all n tokens, or (B, T) with `scope="image"`;
                default: drawn, from the device's own generator.
        """
        if not self.training and self.eval_mode == "average":
            output: Tensor = torch.func.functional_call(self.experts[0], self.average_state(), (x,))
            return output
        tokens = x.reshape(-1, x.shape[-1])
        order = self._order(x) if permutation is None else permutation
        if self.scope == "image":
            groups = [part.flatten() for part in torch.tensor_split(_offset(order, x), len(self.experts), dim=1)]
        else:
            groups = list(torch.tensor_split(order, len(self.experts)))
        outputs = []
        for expert, group in zip(self.experts, groups, strict=True):
            # An expert without tokens keeps its place in the graph, so that every process reduces the same gradients.
            outputs.append(expert(tokens[group]) if len(group) else tokens.new_zeros(0, x.shape[-1]) + 0 * _sum(expert))
        dealt = torch.cat(outputs)
        full = torch.empty_like(dealt).index_copy(0, torch.cat(groups), dealt)
        return full.view(*x.shape[:-1], dealt.shape[-1])

    def _order(self, x: Tensor) -> Tensor:
        if self.scope == "image":
            return torch.rand(x.shape[:-1], device=x.device).flatten(0, -2).argsort(-1)
        return torch.randperm(x[..., 0].numel(), device=x.device)

    @torch.no_grad()
    def average_state(self) -> dict[str, Tensor]:
        """Return the tensors of the average feed-forward by name; kept until a weight changes."""
        tensors = [list(expert.state_dict(keep_vars=True).items()) for expert in self.experts]
        version = tuple(t._version for named in tensors for _, t in named) + tuple(
            t.data_ptr() for named in tensors for _, t in named
        )
        if self._averaged is None or self._averaged[0] != version:
            averaged = {}
            for column in zip(*tensors, strict=True):
                values = [tensor.detach() for _, tensor in column]
                whole = not values[0].is_floating_point()
                averaged[column[0][0]] = values[0] if whole else torch.stack(values).mean(0)
            self._averaged = (version, averaged)
        return self._averaged[1]

    def average(self) -> nn.Module:
        """Return a plain feed-forward whose weights are the mean of the experts'."""
        ffn = copy.deepcopy(self.experts[0])
        ffn.load_state_dict(self.average_state())
        return ffn

    def __getstate__(self) -> dict[str, object]:
        """Leave the kept average behind when copied."""
        return {**self.__dict__, "_averaged": None}


def expand_ffn(
    encoder: Encoder,
    num_experts: int = 4,
    layers: str | Sequence[int] = "alternate",
    init: Literal["independent", "copy"] = "independent",
    scope: Literal["batch", "image"] = "batch",
) -> Encoder:
    """Turn feed-forwards of an encoder into mixtures of experts, in place.

    Args:
        encoder: An encoder of timm whose blocks have an `mlp`.
        num_experts: N.
        layers: Every second block from the second on, all, the last half, or block numbers from 0.
        init: See `RandomPartitionExperts`.
        scope: See `RandomPartitionExperts`.

    Raises:
        UsageError: A block the encoder does not have or that has no feed-forward of its own, or one replaced already;
            more experts than an image has patches.
    """
    if not hasattr(encoder, "blocks"):
        raise UsageError(
            f"experts take the place of feed-forwards in the blocks of a ViT, and a {type(encoder).__name__} has none; "
            f"leave experts out"
        )
    patches = getattr(getattr(encoder, "patch_embed", None), "num_patches", None)
    if patches is not None and num_experts > patches:
        raise UsageError(
            f"experts is {num_experts}, and an image has {patches} patches to share out among them; take 2 to 8"
        )
    for number in chosen_layers(layers, len(encoder.blocks)):
        block = encoder.blocks[number]
        if not isinstance(getattr(block, "mlp", None), nn.Module):
            raise UsageError(f"block {number} of this encoder has no feed-forward that could become experts")
        block.mlp = RandomPartitionExperts(block.mlp, num_experts, init, scope).train(block.training)
    return encoder


def chosen_layers(layers: str | Sequence[int], blocks: int) -> list[int]:
    """Return the numbers of the blocks meant.

    Raises:
        UsageError: An unknown word, or a number outside 0 … blocks - 1.
    """
    if isinstance(layers, str):
        named = {
            "alternate": range(1, blocks, 2),
            "all": range(blocks),
            "last_half": range(blocks // 2, blocks),
        }
        if layers not in named:
            raise unknown_name("expert_layers", layers, named)
        return list(named[layers])
    for number in layers:
        if not 0 <= number < blocks:
            raise UsageError(f"there is no block {number}; the encoder has blocks 0 to {blocks - 1}")
    return sorted(set(layers))


def experts_of(module: nn.Module) -> list[RandomPartitionExperts]:
    """Return the mixtures in a module."""
    return [part for part in module.modules() if isinstance(part, RandomPartitionExperts)]


def average_ffn(encoder: Encoder) -> Encoder:
    """Turn every mixture of an encoder back into a feed-forward, in place; names are those of the plain model."""
    averaged = 0
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RandomPartitionExperts):
                setattr(parent, name, child.average().train(child.training))
                averaged += 1
    if not averaged:
        warnings.warn("there are no experts to average; the model is returned as it is", stacklevel=2)
    return encoder


@torch.no_grad()
def average_experts_(
    modules: Iterable[RandomPartitionExperts],
    share_rate: float,
    normalisation: Normalisation = "leave_one_out",
) -> None:
    """Move the experts of each mixture towards each other; their mean stays where it is.

    W_i <- (1 - β) W_i + β / (N - 1) Σ_{j ≠ i} W_j, all at once; with `normalisation="mean"` the sum is β times the
    mean over all N.

    Args:
        modules: The mixtures.
        share_rate: β, 0 … (N - 1) / N (0 … 1 with `mean`), at which all become equal.
        normalisation: Which of the two forms.

    Raises:
        UsageError: β outside its range, which would overshoot.
    """
    if normalisation not in NORMALISATIONS:
        raise unknown_name("normalisation", normalisation, NORMALISATIONS)
    for module in modules:
        count = len(module.experts)
        most = (count - 1) / count if normalisation == "leave_one_out" else 1.0
        if not 0 <= share_rate <= most + 1e-12:
            raise UsageError(f"share_rate is {share_rate}; with {count} experts it must be in [0, {most:.4g}]")
        # Both forms are a step of this length towards the mean.
        length = min(1.0, share_rate * count / (count - 1) if normalisation == "leave_one_out" else share_rate)
        if length == 0:
            continue
        for parameters in zip(*(expert.parameters() for expert in module.experts), strict=True):
            mean = torch.stack(parameters).mean(0)
            torch._foreach_lerp_(list(parameters), [mean] * count, length)


def share_rate_schedule(kind: Schedule, max_rate: float, steps: int) -> Callable[[int], float]:
    """Return the share rate of each step 0 … steps - 1.

    Args:
        kind: `linear` rises from 0 to `max_rate`, `cosine` does so along half a wave, `constant` stays.
        max_rate: β_max.
        steps: T.
    """
    if kind not in SCHEDULES:
        raise unknown_name("share_schedule", kind, SCHEDULES)

    def rate(step: int) -> float:
        share = min(1.0, step / max(1, steps - 1))
        if kind == "linear":
            return max_rate * share
        return max_rate * ((1 - math.cos(math.pi * share)) / 2 if kind == "cosine" else 1.0)

    return rate


def _sum(module: nn.Module) -> Tensor:
    return torch.stack([parameter.sum() for parameter in module.parameters()]).sum()


def _offset(order: Tensor, x: Tensor) -> Tensor:
    """Return (B, T) positions within images as positions within the batch."""
    return order + torch.arange(len(order), device=x.device)[:, None] * order.shape[1]


@torch.no_grad()
def _draw_anew(ffn: nn.Module) -> None:
    """Shuffle every weight: independent draws of whatever distribution the initialisation has, its scale included."""
    for parameter in ffn.parameters():
        flat = parameter.flatten()
        parameter.copy_(flat[torch.randperm(len(flat), device=flat.device)].view_as(parameter))
