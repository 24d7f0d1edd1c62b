"""Encoders of clips and volumes that begin with the weights of an encoder of images.

A kernel is repeated along the new axis and divided by its length, so that an input that does not change along it gives
the tokens of the image (`mean`: filter inflation, Carreira and Zisserman 2017, arXiv 1705.07750); or it stands in the
middle of the new axis among zeros, so that at first the middle frame alone is seen (`centre`: Arnab et al. 2021,
arXiv 2103.15691, section 3.4, who also repeat learnt positions along the new axis).

>>> from patchloom.encoders import create_encoder
>>> images = create_encoder("vit_tiny_patch16_224", image_size=32)
>>> clips = create_encoder("videomae_tiny_patch16_224", image_size=(8, 32, 32))
>>> told = inflate(images, clips)
>>> told.left_out, told.fresh
(['cls_token', 'pos_embed', 'norm.weight', 'norm.bias'], ['fc_norm.weight', 'fc_norm.bias'])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from patchloom.encoders.encoder import Encoder
from patchloom.encoders.patches import Grid, shown
from patchloom.encoders.positions import patch_positions, resample_positions
from patchloom.encoders.properties import grid_size
from patchloom.errors import UsageError, unknown_name

Inflation = Literal["mean", "centre"]


class Inflated(NamedTuple):
    """Which tensors an inflated encoder did not share with the other."""

    left_out: list[str]
    """Of the encoder of images, with no place in the new one."""
    fresh: list[str]
    """Of the new one, which stay as they were."""


def inflate_kernel(kernel: Tensor, sides: int | Grid, how: Inflation = "mean") -> Tensor:
    """Return a patch kernel with axes more in front of its own.

    Args:
        kernel: (D, C, *patch), of images (D, C, p, p).
        sides: Length of the new axis, or of each.
        how: `mean`: every slice is the kernel over the number of slices. `centre`: slice ⌊length / 2⌋ is the kernel,
            the others are zeros.

    Returns:
        (D, C, *sides, *patch).

    Raises:
        UsageError: Another way, or a length below 1.
    """
    lengths = (sides,) if isinstance(sides, int) else sides
    if how not in get_args(Inflation):
        raise unknown_name("inflation", how, get_args(Inflation))
    if any(length < 1 for length in lengths):
        raise UsageError(f"an axis of {shown(lengths)} slices cannot be; it has at least 1")
    spread = kernel.reshape(*kernel.shape[:2], *(1 for _ in lengths), *kernel.shape[2:])
    shape = (*kernel.shape[:2], *lengths, *kernel.shape[2:])
    if how == "mean":
        return (spread / math.prod(lengths)).expand(shape).clone()
    inflated = kernel.new_zeros(shape)
    middle = inflated
    for length in lengths:
        middle = middle.select(2, length // 2)
    middle.copy_(kernel)
    return inflated


def inflate_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """Return learnt positions of images for a grid with axes more in front: the same along these.

    Args:
        positions: (1, P + N, D); the P in front belong to class and register tokens, and stay.
        old: Grid of the N patches, (down, across).
        new: Grid with axes in front; its last ones may differ from `old`: then positions are resampled.

    Returns:
        (1, P + N', D).
    """
    prefix, times = patch_positions(positions, old), math.prod(new[: len(new) - len(old)])
    positions = resample_positions(positions, old, new[len(new) - len(old) :], prefix)
    return torch.cat([positions[:, :prefix], positions[:, prefix:].repeat(1, times, 1)], dim=1)


@torch.no_grad()
def inflate(
    encoder: Encoder, target: Encoder, how: Inflation = "mean", state: Mapping[str, Tensor] | None = None
) -> Inflated:
    """Give an encoder of clips or volumes the weights of one of images, in place.

    Positions of the target that are computed stay as they are.

    Args:
        encoder: The encoder of images.
        target: One whose grid has axes more, in front; blocks of the same width and depth.
        how: What becomes of the patch kernel, see `inflate_kernel`.
        state: Its tensors, where they are others: of another number of channels.

    Returns:
        The names of the tensors that one has and not the other.

    Raises:
        UsageError: The target's grid has no axis more, or a tensor of both differs in shape.
    """
    old, new = grid_size(encoder), grid_size(target)
    if len(new) <= len(old):
        raise UsageError(
            f"the grid {shown(new)} of a {type(target).__name__} has no axis more than {shown(old)}, so there is "
            f"nothing to inflate"
        )
    given, wanted = _places_in_tokens(encoder, target, state), target.state_dict()
    if isinstance(fixed := getattr(target, "pos_embed", None), Tensor) and not fixed.requires_grad:
        wanted.pop("pos_embed")  # computed, and not trained
    taken: dict[str, Tensor] = {}
    for name in wanted.keys() & given.keys():
        value = given[name]
        if name == "patch_embed.proj.weight":
            value = inflate_kernel(value, tuple(wanted[name].shape[2 : 2 + len(new) - len(old)]), how)
        elif name == "pos_embed":
            value = inflate_positions(value, old, new)
        if value.shape != wanted[name].shape:
            raise UsageError(
                f"{name} of the encoder of images becomes {shown(tuple(value.shape))} and the other has "
                f"{shown(tuple(wanted[name].shape))}; make both of the same width, depth, patch size and channels"
            )
        taken[name] = value
    nn.Module.load_state_dict(target, taken, strict=False)
    statistics = {name: encoder.pretrained_cfg[name] for name in ("mean", "std")}
    target.pretrained_cfg = {**target.pretrained_cfg, **statistics}
    return Inflated([name for name in given if name not in wanted], [name for name in wanted if name not in given])


def _places_in_tokens(encoder: Encoder, target: Encoder, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors of the encoder of images; a position of the class token that the target lacks is in it."""
    state, own = dict(encoder.state_dict() if given is None else given), getattr(target, "pos_embed", None)
    positions, token = state.get("pos_embed"), state.get("cls_token")
    if positions is None or token is None or not isinstance(own, Tensor) or encoder.num_prefix_tokens != 1:
        return state
    if patch_positions(positions, grid_size(encoder)) == 1 and patch_positions(own, grid_size(target)) == 0:
        state |= {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
    return state
