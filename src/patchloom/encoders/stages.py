"""An encoder's forward pass in stages: embed, blocks, norm. For timm's `VisionTransformer`, `Beit` and `Eva` alike.

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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from patchloom.base.choices import Pool
from patchloom.encoders.blocks import bias_of, run_block
from patchloom.encoders.patches import patchify
from patchloom.encoders.properties import (
    Encoder,
    depth,
    grid_size,
    has_tokens,
    num_prefix_tokens,
    patch_size,
    require_tokens,
)
from patchloom.errors import UsageError, unknown_name


class Tokens(NamedTuple):
    """An encoder's output tokens."""

    prefix: Tensor
    """(B, P, D): class token first, then registers; P may be 0."""
    patches: Tensor
    """(B, N, D), row-major over the grid."""


@dataclass(frozen=True)
class Embedded:
    """Tokens before the first block, and what every block needs besides them."""

    x: Tensor
    """(B, P + N, D)."""
    block_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a block: a shared relative-position bias, rotary positions."""
    rope_by_block: Tensor | None = None
    """Rotary positions that differ from block to block, first dimension the block."""
    kept: Tensor | None = None
    """(B, P + n) int64: the tokens that are there, where blocks have relative-position tables of their own."""

    def kwargs_of(self, number: int) -> dict[str, Any]:
        """Return the keyword arguments of block `number` (0-based)."""
        if self.rope_by_block is None:
            return self.block_kwargs
        return {**self.block_kwargs, "rope": self.rope_by_block[number]}


def embed(
    encoder: Encoder,
    images: Tensor,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
) -> Embedded:
    """Return the tokens that enter the first block.

    Args:
        encoder: A `VisionTransformer`, `Beit` or `Eva` of timm.
        images: (B, C, H, W), normalised.
        masked: (B, N) bool; there the patch embedding is replaced by `mask_token`, before positions are added.
        mask_token: (1, 1, D); needed with `masked`.
        keep: (B, n) int64, patches that go on (the same number in each image) with the positions they have; the
            others are dropped, where that is possible before they are embedded, and position biases follow.

    Raises:
        UsageError: `masked` without `mask_token` or of another grid.
    """
    require_tokens(encoder)
    if keep is not None and masked is None and _embeds_patches_apart(encoder):
        return _embed_kept(encoder, images, keep)
    if getattr(encoder.patch_embed, "strict_img_size", False) and images.shape[-2:] != encoder.patch_embed.img_size:
        raise UsageError(
            f"images of {images.shape[-2]}x{images.shape[-1]} pixels; the encoder is set up for "
            f"{'x'.join(map(str, encoder.patch_embed.img_size))}, and its positions are resampled by set_image_size"
        )
    x = encoder.patch_embed(images)
    if masked is not None:
        x = insert_mask_token(x, masked, mask_token)
    x, kwargs, rope_by_block = _add_positions(encoder, x)
    if isinstance(norm_pre := getattr(encoder, "norm_pre", None), nn.Module):
        x = norm_pre(x)
    embedded = Embedded(x, kwargs, rope_by_block)
    return embedded if keep is None else _kept(encoder, embedded, keep)


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


def final_norm(encoder: Encoder, x: Tensor) -> Tensor:
    """Return tokens after the norm in front of heads: `norm`, or `fc_norm` where the encoder norms after pooling."""
    norm = encoder.norm
    if isinstance(norm, nn.Identity) and isinstance(getattr(encoder, "fc_norm", None), nn.Module):
        norm = encoder.fc_norm
    normed: Tensor = norm(x)
    return normed


def tokens(encoder: Encoder, images: Tensor) -> Tokens:
    """Return the output tokens for (B, C, H, W) normalised images, as `encoder.forward_features` has them."""
    last, _ = run_blocks(encoder, embed(encoder, images))
    return _split(encoder, encoder.norm(last))


def pooled(encoder: Encoder, images: Tensor, pool: Pool = "auto") -> Tensor:
    """Return one vector per image.

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
        vectors: Tensor = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
        return vectors
    if not has_tokens(encoder):
        if pool != "avg":
            raise UsageError(f"pool={pool} needs a class token and a {type(encoder).__name__} has none; use avg")
        return feature_map(encoder, images).mean((2, 3))
    prefix, patches = tokens(encoder, images)
    if pool != "avg" and prefix.shape[1] == 0:
        raise UsageError(f"pool={pool} needs a class token and this encoder has none; use avg")
    parts = {"cls": lambda: prefix[:, 0], "avg": lambda: patches.mean(1)}
    return torch.cat([parts[part]() for part in pool.split("+")], dim=1)


def feature_map(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the last features in their places: the patch tokens of a ViT, the last map of another image model.

    Args:
        encoder: The encoder, or another image model of timm.
        images: (B, C, H, W), normalised.

    Returns:
        (B, D, h, w).

    Raises:
        UsageError: A model that gives no features but its pooled ones.
    """
    if has_tokens(encoder):
        return tokens(encoder, images).patches.transpose(1, 2).unflatten(2, grid_size(encoder, _sides(images)))
    if not hasattr(encoder, "forward_intermediates"):
        raise UsageError(f"a {type(encoder).__name__} gives no feature maps; take another model of timm")
    (last,) = encoder.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NCHW")
    found: Tensor = last
    return found


def _sides(images: Tensor) -> tuple[int, int]:
    return int(images.shape[-2]), int(images.shape[-1])


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
    return [_split(encoder, final_norm(encoder, taps[n]) if norm else taps[n]) for n in numbers]


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
    fused = attention.fused_attn
    # Unfused, every attention of timm passes its softmax through this dropout.
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    attention.fused_attn = False
    try:
        run_blocks(encoder, replace(embedded, x=x), start=number, stop=number + 1)
    finally:
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


def _add_positions(encoder: Encoder, x: Tensor) -> tuple[Tensor, dict[str, Any], Tensor | None]:
    """Return tokens with prefix and positions, a block's keyword arguments, and rotary positions by block."""
    if isinstance(encoder, Beit):
        x = torch.cat((encoder.cls_token.expand(len(x), -1, -1), x), dim=1)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        bias = encoder.rel_pos_bias() if encoder.rel_pos_bias is not None else None
        return encoder.pos_drop(x), {"shared_rel_pos_bias": bias}, None
    if isinstance(encoder, Eva):
        x, rope = encoder._pos_embed(x)
        if getattr(encoder, "rope_mixed", False) and rope is not None:
            return x, {"rope": rope[-1]}, rope
        return x, {"rope": rope}, None
    return encoder._pos_embed(x), {}, None


def _kept(encoder: Encoder, embedded: Embedded, keep: Tensor) -> Embedded:
    """Drop the patches that are not kept, and their rows of position biases."""
    index = _with_prefix(encoder, keep)
    x = embedded.x.gather(1, index.unsqueeze(-1).expand(-1, -1, embedded.x.shape[-1]))
    return _positions_kept(encoder, replace(embedded, x=x), keep)


def _embeds_patches_apart(encoder: Encoder) -> bool:
    """Return whether the patch embedding is one linear layer on each patch, and nothing random follows it."""
    proj = encoder.patch_embed.proj
    drop = getattr(encoder, "pos_drop", None)
    still = not encoder.training or (getattr(drop, "p", 0.0) == 0 and getattr(encoder, "patch_drop", None) is None)
    return (
        still
        and isinstance(encoder.patch_embed, PatchEmbed)
        and type(proj) is nn.Conv2d
        and tuple(proj.kernel_size) == tuple(proj.stride) == (patch_size(encoder),) * 2
        and not any((*proj.padding, *proj._forward_hooks, *proj._forward_pre_hooks))
    )


def _embed_kept(encoder: Encoder, images: Tensor, keep: Tensor) -> Embedded:
    """Embed the patches that are kept, and no others."""
    proj, size = encoder.patch_embed.proj, patch_size(encoder)
    h, w = grid_size(encoder, (images.shape[-2], images.shape[-1]))
    patches = patchify(images, size).gather(1, keep.unsqueeze(-1).expand(-1, -1, proj.weight[0].numel()))
    x = encoder.patch_embed.norm(F.linear(patches, proj.weight.flatten(1), proj.bias))
    # What the encoder makes of nothing is prefix tokens and positions.
    grid = (h, w) if getattr(encoder, "dynamic_img_size", False) else (h * w,)
    table, kwargs, rope_by_block = _add_positions(encoder, proj.weight.new_zeros(1, *grid, proj.out_channels))
    prefix = num_prefix_tokens(encoder)
    x = torch.cat([table[:, :prefix].expand(len(x), -1, -1), x + table[0, prefix:][keep]], dim=1)
    if isinstance(norm_pre := getattr(encoder, "norm_pre", None), nn.Module):
        x = norm_pre(x)
    return _positions_kept(encoder, Embedded(x, kwargs, rope_by_block), keep)


def _with_prefix(encoder: Encoder, keep: Tensor) -> Tensor:
    """Return the numbers of the tokens that stay: prefix tokens, and the patches in `keep`."""
    prefix = num_prefix_tokens(encoder)
    front = torch.arange(prefix, device=keep.device).expand(len(keep), -1)
    return torch.cat([front, keep + prefix], dim=1)


def _positions_kept(encoder: Encoder, embedded: Embedded, keep: Tensor) -> Embedded:
    """Reduce position biases to the tokens that stay."""
    kwargs, kept = dict(embedded.block_kwargs), None
    if isinstance(encoder, Beit):
        index = _with_prefix(encoder, keep)
        first: Encoder = encoder.blocks[0]
        if first.attn.relative_position_bias_table is not None:
            kept = index
        if (bias := kwargs["shared_rel_pos_bias"]) is not None:
            kwargs["shared_rel_pos_bias"] = bias_of(bias, index)
    by_block = embedded.rope_by_block
    if by_block is not None:  # (blocks, heads, N, d) -> (blocks, B, heads, n, d)
        by_block = by_block[:, :, keep].transpose(1, 2)
        kwargs["rope"] = by_block[-1]
    elif kwargs.get("rope") is not None:  # (N, d) -> (B, 1, n, d)
        kwargs["rope"] = kwargs["rope"][keep].unsqueeze(1)
    return Embedded(embedded.x, kwargs, by_block, kept)
