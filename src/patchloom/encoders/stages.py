"""An encoder's forward pass in stages: embed, blocks, norm. For encoders of every family and kind of input alike.

>>> import timm, torch
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> images = torch.randn(1, 3, 224, 224)
>>> embedded = embed(encoder, images)
>>> last, taps = run_blocks(encoder, embedded, taps=(9,))
>>> torch.allclose(encoder.norm(last), encoder.forward_features(images), atol=1e-5)
True
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from patchloom.base.choices import Pool
from patchloom.encoders.blocks import run_block
from patchloom.encoders.encoder import Encoder
from patchloom.encoders.families import Embedded, Family, family_of, has_tokens
from patchloom.encoders.patches import patchify
from patchloom.encoders.properties import depth, grid_size, num_prefix_tokens, sides_of
from patchloom.errors import UsageError, unknown_name


class Tokens(NamedTuple):
    """An encoder's output tokens."""

    prefix: Tensor
    """(B, P, D): class token first, then registers; P may be 0."""
    patches: Tensor
    """(B, N, D), the last axis of the grid fastest: of images row by row."""


def embed(
    encoder: Encoder,
    images: Tensor,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
) -> Embedded:
    """Return the tokens that enter the first block.

    Args:
        encoder: The encoder.
        images: (B, C, H, W), normalised; or what else the encoder takes, clips (B, C, T, H, W).
        masked: (B, N) bool; there the patch embedding is replaced by `mask_token`, before positions are added.
        mask_token: (1, 1, D); needed with `masked`.
        keep: (B, n) int64, patches that go on (the same number in each image) with the positions they have; the
            others are dropped, where that is possible before they are embedded, and position biases follow.

    Raises:
        UsageError: `masked` without `mask_token` or of another grid; inputs of another kind or size; patches left out
            where blocks need the whole grid.
    """
    family = family_of(encoder)
    if keep is not None:
        if not family.drops_tokens:
            raise UsageError(
                f"the blocks of a {type(encoder).__name__} read a token's neighbours from the whole grid, so no patch "
                f"can be left out; put mask tokens in their places"
            )
        if masked is None and family.embeds_patches_apart(encoder):
            return _embed_kept(encoder, family, images, keep)
    x = family.embed_patches(encoder, images)
    if masked is not None:
        x = insert_mask_token(x, masked, mask_token)
    embedded = normed_in_front(encoder, family.add_positions(encoder, x))
    return embedded if keep is None else _kept(encoder, family, embedded, keep)


def run_blocks(
    encoder: Encoder,
    embedded: Embedded,
    start: int = 0,
    stop: int | None = None,
    taps: Sequence[int] = (),
    rows: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run blocks `start` to `stop` (0-based, end excluded; default: all).

    Args:
        encoder: The encoder `embedded` was made with.
        embedded: What enters block `start`.
        start: First block.
        stop: Block after the last.
        taps: Numbers of blocks, counted from 1, whose output is kept.
        rows: (B, P + N) bool, the tokens of the last block that are read; the others come unfinished.

    Returns:
        The output of the last block run, (B, P + N, D), and the tapped outputs by number; none is normed.

    Raises:
        UsageError: Blocks the encoder does not have, or a tap on a block that is not run.
    """
    stop = depth(encoder) if stop is None else stop
    if not 0 <= start <= stop <= depth(encoder):
        raise UsageError(f"start {start} and stop {stop} fit no blocks; 0 <= start <= stop <= {depth(encoder)} does")
    if missed := [tap for tap in taps if not start < tap <= stop]:
        raise UsageError(f"tap {missed[0]} is on a block that is not run; taps here are {start + 1} to {stop}")
    x, kept = embedded.x, {}
    recompute = bool(getattr(encoder, "grad_checkpointing", False)) and torch.is_grad_enabled()
    for number in range(start, stop):
        block, kwargs = encoder.blocks[number], embedded.kwargs_of(number)
        read = rows if number + 1 == stop else None
        if recompute:
            x = checkpoint(run_block, block, x, kwargs, read, embedded.kept, True, use_reentrant=False)
        else:
            x = run_block(block, x, kwargs, read, embedded.kept)
        if number + 1 in taps:
            # Tokens that an adapter put in front travel on with x, and are no concern of who looks at a layer.
            kept[number + 1] = x[:, getattr(block, "carried_tokens", 0) :]
    return x, kept


def final_norm(encoder: Encoder, x: Tensor, last: bool = True) -> Tensor:
    """Return tokens after the norm in front of heads: `norm`, or `fc_norm` where the encoder norms after pooling.

    Args:
        encoder: The encoder.
        x: (B, P + N, D).
        last: Whether they are the last block's. What else stands in the norm's place (a denoiser) is for these alone.
    """
    norm = encoder.norm if last else getattr(encoder.norm, "norm", encoder.norm)
    if isinstance(norm, nn.Identity) and isinstance(getattr(encoder, "fc_norm", None), nn.Module):
        norm = encoder.fc_norm
    normed: Tensor = norm(x)
    return normed


def tokens(encoder: Encoder, images: Tensor) -> Tokens:
    """Return the output tokens for (B, C, H, W) normalised images, as `encoder.forward_features` has them."""
    last, _ = run_blocks(encoder, embed(encoder, images))
    return _split(encoder, encoder.norm(last))


def pooled(encoder: nn.Module, images: Tensor, pool: Pool = "auto") -> Tensor:
    """Return one vector per input.

    Args:
        encoder: The encoder, or another image model of timm.
        images: (B, C, H, W), normalised.
        pool: `auto` is what the encoder was made with; `cls` the class token; `avg` the mean over patches, or over the
            last feature map of a model without; `cls+avg` both, one after the other.

    Returns:
        (B, D), or (B, 2 D) for `cls+avg`.

    Raises:
        UsageError: Unknown pooling, or `cls` for an encoder without class token.
    """
    if pool not in ("auto", "cls", "avg", "cls+avg"):
        raise unknown_name("pooling", pool, ("auto", "cls", "avg", "cls+avg"))
    if pool == "auto":
        model = cast(Encoder, encoder)
        return model.forward_head(model.forward_features(images), pre_logits=True)
    if not has_tokens(encoder):
        if pool != "avg":
            raise UsageError(f"pool={pool} needs a class token and a {type(encoder).__name__} has none; use avg")
        return feature_map(encoder, images).mean((2, 3))
    prefix, patches = tokens(encoder, images)
    if pool != "avg" and prefix.shape[1] == 0:
        raise UsageError(f"pool={pool} needs a class token and this encoder has none; use avg")
    parts = {"cls": lambda: prefix[:, 0], "avg": lambda: patches.mean(1)}
    return torch.cat([parts[part]() for part in pool.split("+")], dim=1)


def feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the last features in their places: the patch tokens of an encoder, the last map of another image model.

    Args:
        encoder: The encoder, or another image model of timm.
        images: (B, C, H, W), normalised; or what else the encoder takes, clips (B, C, T, H, W).

    Returns:
        (B, D, *grid), of images (B, D, h, w).

    Raises:
        UsageError: A model that gives no features but its pooled ones.
    """
    if has_tokens(encoder):
        return tokens(encoder, images).patches.transpose(1, 2).unflatten(2, grid_size(encoder, sides_of(images)))
    if not hasattr(encoder, "forward_intermediates"):
        raise UsageError(f"a {type(encoder).__name__} gives no feature maps; take another model of timm")
    model: Any = encoder
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NCHW")
    found: Tensor = last
    return found


def intermediate_layers(encoder: Encoder, images: Tensor, layers: Sequence[int], norm: bool = True) -> list[Tokens]:
    """Return the tokens after given blocks.

    Args:
        encoder: The encoder.
        images: (B, C, H, W), normalised.
        layers: Blocks, counted from 0; negative ones from the end.
        norm: Apply the final norm to each.

    Raises:
        UsageError: A block the encoder does not have.
    """
    numbers = [_block_number(encoder, layer) + 1 for layer in layers]
    _, taps = run_blocks(encoder, embed(encoder, images), stop=max(numbers, default=0), taps=numbers)
    last = depth(encoder)
    return [_split(encoder, final_norm(encoder, taps[n], n == last) if norm else taps[n]) for n in numbers]


def new_blocks(encoder: Encoder, count: int, drop_path: float | None = None) -> nn.ModuleList:
    """Return fresh blocks of the encoder's own kind and size, in PyTorch's default initialisation.

    They are called like the encoder's: `block(x, **embedded.block_kwargs)`. They are trainable and in training mode
    even where the encoder is frozen.

    Args:
        encoder: The encoder.
        count: Number of blocks.
        drop_path: Stochastic depth rate of each, in [0, 1); default: that of the encoder's last block.

    Raises:
        UsageError: `drop_path` outside its range.
    """
    if drop_path is not None and not 0 <= drop_path < 1:
        raise UsageError(f"drop_path is {drop_path}; it must be in [0, 1)")
    blocks = nn.ModuleList(copy.deepcopy(encoder.blocks[-1]) for _ in range(count)).requires_grad_(True).train()
    for block in blocks:
        for module in block.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if drop_path is not None and hasattr(block, name):
                setattr(block, name, DropPath(drop_path) if drop_path else nn.Identity())
    return blocks


def attends(encoder: Encoder, layer: int = -1) -> bool:
    """Return whether a block, counted from 0 or negative from the end, mixes its tokens by attention."""
    block = encoder.blocks[_block_number(encoder, layer)]
    return hasattr(getattr(block, "attn", block), "attn_drop")


def class_attention(encoder: Encoder, images: Tensor, layer: int = -1) -> Tensor:
    """Return where the class token looks: its attention over the patches.

    Args:
        encoder: The encoder; one without class token gives the mean over all queries.
        images: (B, C, H, W), normalised.
        layer: Block, counted from 0; negative from the end.

    Returns:
        (B, heads, N), non-negative; what prefix tokens receive is left out, so a row sums to at most 1.

    Raises:
        UsageError: A block the encoder does not have.
    """
    number = _block_number(encoder, layer)
    embedded = embed(encoder, images)
    x, _ = run_blocks(encoder, embedded, stop=number)
    block = encoder.blocks[number]
    attention = getattr(block, "attn", block)  # blocks with attention and MLP side by side attend by themselves
    seen: list[Tensor] = []
    if not attends(encoder, number):
        raise UsageError(
            f"block {number} of this {type(encoder).__name__} mixes its tokens without attention to look at"
        )
    fused = getattr(attention, "fused_attn", None)  # one that is never fused, as ConViT's, has no switch
    # Unfused, every attention of timm passes its softmax through this dropout.
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    if fused is not None:
        attention.fused_attn = False
    try:
        run_blocks(encoder, replace(embedded, x=x), start=number, stop=number + 1)
    finally:
        if fused is not None:
            attention.fused_attn = fused
        hook.remove()
    prefix, added = num_prefix_tokens(encoder), getattr(block, "extra_tokens", 0)
    # Tokens that were put in front are always keys; where only the encoder's own ask, they are no queries.
    first = added - (seen[0].shape[-1] - seen[0].shape[-2])
    rows = seen[0][:, :, first] if prefix else seen[0][:, :, first:].mean(2)
    return rows[:, :, added + prefix :]


def _block_number(encoder: Encoder, layer: int) -> int:
    """Return the 0-based number of a block that may be counted from the end."""
    count = depth(encoder)
    if not -count <= layer < count:
        raise UsageError(f"there is no block {layer}; the encoder has blocks 0 to {count - 1}")
    return layer % count


def _split(encoder: Encoder, x: Tensor) -> Tokens:
    prefix = num_prefix_tokens(encoder)
    return Tokens(x[:, :prefix], x[:, prefix:])


def insert_mask_token(x: Tensor, masked: Tensor, mask_token: Tensor | None) -> Tensor:
    if mask_token is None:
        raise UsageError("masked patches need a mask_token to stand in for them")
    if masked.flatten(1).shape != x[..., 0].flatten(1).shape:
        raise UsageError(f"the mask has shape {tuple(masked.shape)}; the patches have {tuple(x.shape[:-1])}")
    hidden = masked.reshape(x.shape[:-1]).unsqueeze(-1).to(x.dtype)
    return x * (1 - hidden) + mask_token.to(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)) * hidden


def normed_in_front(encoder: Encoder, embedded: Embedded) -> Embedded:
    """Return what enters the first block after the norm some encoders have in front of it."""
    norm = getattr(encoder, "norm_pre", None)
    return replace(embedded, x=norm(embedded.x)) if isinstance(norm, nn.Module) else embedded


def _kept(encoder: Encoder, family: Family, embedded: Embedded, keep: Tensor) -> Embedded:
    """Drop the patches that are not kept, and their rows of position biases."""
    prefix = num_prefix_tokens(encoder)
    front = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
    index = torch.cat([front, keep + prefix], dim=1)
    x = embedded.x.gather(1, index.unsqueeze(-1).expand(-1, -1, embedded.x.shape[-1]))
    return family.keep(encoder, replace(embedded, x=x), keep)


def _embed_kept(encoder: Encoder, family: Family, images: Tensor, keep: Tensor) -> Embedded:
    """Embed the patches that are kept, and no others."""
    family.check(encoder, images)
    proj = encoder.patch_embed.proj
    grid = grid_size(encoder, sides_of(images))
    patches = patchify(images, family.patch_shape(encoder))
    patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, proj.weight[0].numel()))
    x = encoder.patch_embed.norm(F.linear(patches, proj.weight.flatten(1), proj.bias))
    # What the encoder makes of nothing is prefix tokens and positions.
    shape = grid if getattr(encoder, "dynamic_img_size", False) else (math.prod(grid),)
    empty = family.add_positions(encoder, proj.weight.new_zeros(1, *shape, proj.out_channels))
    prefix = num_prefix_tokens(encoder)
    x = torch.cat([empty.x[:, :prefix].expand(len(x), -1, -1), x + empty.x[0, prefix:][keep]], dim=1)
    return family.keep(encoder, normed_in_front(encoder, replace(empty, x=x)), keep)
