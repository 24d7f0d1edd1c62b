"""Optimiser groups: which tensors decay, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from timm.optim import Lamb
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from patchloom.encoders.families import Family

Kind = Literal["adamw", "sgd", "lamb"]


STEM = Family.stem
NO_DECAY = ("bias", "pos_embed", "cls_token", "dist_token", "reg_token", "freqs")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies, as in BEiT: to everything but vectors, biases, positions and class tokens.

    `mask_token` (3-D) and relative-position tables (2-D) do decay, as in the published code of BEiT and CCViT;
    frequencies of rotary positions that are learnt do not.
    """
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NO_DECAY


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter of timm's ViTs by its name in the encoder, see `Family.layer_of`.

    Raises:
        UsageError: No ViT of timm has a parameter of that name.
    """
    return Family().layer_of(name, depth)


def parameter_groups(
    module: nn.Module,
    *,
    layer_decay: float = 1.0,
    layer: Callable[[str], int] | None = None,
    depth: int = 0,
    decay: Callable[[str, nn.Parameter], bool] = decays,
    select: Callable[[str], bool] = lambda name: True,
) -> list[dict[str, Any]]:
    """Split a module's trainable parameters into AdamW groups.

    Args:
        module: Its parameters that require gradients are taken.
        layer_decay: Learning-rate factor per layer; a parameter of layer l gets layer_decay**(depth + 1 - l).
        layer: Layer of a parameter by name; needed when `layer_decay` is not 1.
        depth: Number of blocks.
        decay: Whether weight decay applies to a parameter.
        select: Whether a parameter is taken at all, by its name.

    Returns:
        Groups with `params`, `names`, `lr_scale` and `decays`, the layers in descending order.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or not select(name):
            continue
        number = layer(name) if layer is not None and layer_decay != 1.0 else depth + 1
        key = (number, decay(name, parameter))
        if key not in groups:
            scale = layer_decay ** (depth + 1 - number)
            groups[key] = {"params": [], "names": [], "lr_scale": scale, "decays": key[1]}
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, fused: bool = True) -> AdamW:
    """Return AdamW over the groups; learning rate and weight decay are set at every step by `set_rates`.

    Args:
        groups: See `parameter_groups`.
        betas: Decay of the first and second moment.
        eps: Added to the denominator.
        fused: One pass over memory instead of several. Not with a loss scaler: a fused optimiser undoes the scaling
            itself, after the gradient was clipped.
    """
    return AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused)


def make_optimizer(
    kind: Kind,
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    fused: bool = True,
) -> Optimizer:
    """Return an optimiser over the groups, see `adamw`; LAMB and SGD take the same groups.

    Args:
        kind: `adamw`, `sgd` or `lamb` (arXiv 1904.00962; timm's, without a clipping of its own).
        groups: See `parameter_groups`.
        betas: For AdamW and LAMB.
        eps: Likewise.
        momentum: For SGD.
        fused: For AdamW.
    """
    if kind == "sgd":
        return SGD(groups, lr=0.0, momentum=momentum)
    if kind == "lamb":
        return Lamb(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, max_grad_norm=None)
    return adamw(groups, betas=betas, eps=eps, fused=fused)


def set_rates(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of every group for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
