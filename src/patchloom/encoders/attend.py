"""A block of a timm encoder run on some tokens while they also attend to others, with its attention in plain sight.

Prompts in front of the tokens of an image need not go through all of a block: where their own output is thrown away
they are keys and values only, and where nothing but their output is wanted the image's tokens are. `attend_block`
computes exactly what the block makes of both groups in one row, for the group that is wanted, out of the block's own
modules, at a fraction of the work. Attention goes through SDPA unless its probabilities are asked for or
the block's own switch (`fused_attn`) is off.

>>> import timm, torch
>>> block = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval().blocks[0]
>>> prompts, x = torch.randn(2, 5, 192), torch.randn(2, 197, 192)
>>> whole = block(torch.cat([prompts, x], dim=1))
>>> out, _ = attend_block(block, Group(x), Group(prompts, is_guest=True))
>>> torch.allclose(out, whole[:, 5:], atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders.properties import Encoder
from patchloom.errors import UsageError

BLOCKS = (Block, BeitBlock, EvaBlock, EvaBlockPostNorm)
ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention)
QUERY, KEY, VALUE = 0, 1, 2


class Group(NamedTuple):
    """Tokens that stand next to each other."""

    x: Tensor
    """(B, n, D), not normed; (1, n, D) for tokens that are the same in every image."""
    guests: int = 0
    """Tokens in front that the encoder does not know: they have no position."""
    is_guest: bool = False
    """All of them are guests."""

    @property
    def num_guests(self) -> int:
        """Number of tokens without position."""
        return self.x.shape[1] if self.is_guest else self.guests


Rewrite = Callable[[Tensor], Tensor]
"""Takes the probabilities (B, H, queries, keys), keys in the order guests, image, and returns those to use."""


def check_separable(encoder: Encoder) -> None:
    """Refuse an encoder whose blocks have no queries, keys and values to take apart.

    Raises:
        UsageError: Names the kind of block or attention.
    """
    for block in encoder.blocks:
        attention = getattr(block, "attn", None)
        if type(block) not in BLOCKS or type(attention) not in ATTENTIONS:
            kind = (
                type(block).__name__ if attention is None else f"{type(block).__name__} of {type(attention).__name__}"
            )
            raise UsageError(
                f"the blocks of this {type(encoder).__name__} are of the kind {kind}, whose attention cannot be taken "
                f"apart; take a plain ViT, BEiT or EVA model"
            )


def attend_block(
    block: nn.Module,
    group: Group,
    others: Group | None = None,
    *,
    rope: Tensor | None = None,
    shared_rel_pos_bias: Tensor | None = None,
    explicit: bool = False,
    rewrite: Rewrite | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what a block makes of `group` when its tokens attend to themselves and to `others`.

    Args:
        block: A block of an encoder that passes `check_separable`.
        group: The tokens whose output is wanted.
        others: Tokens that are keys and values only. One of the two groups is the encoder's own row of tokens.
        rope: Rotary positions of the encoder's patches, as the block takes them.
        shared_rel_pos_bias: (H, P + N, P + N), as the block takes it.
        explicit: Compute the probabilities openly and return them.
        rewrite: What to put in their place; goes with `explicit`.

    Returns:
        (B, n, D), and the probabilities (B, H, n, keys) as computed, before `rewrite` (None unless `explicit`). Keys
        come guests first, then the encoder's own tokens.
    """
    attention: Any = block.attn
    pre_norm = not isinstance(block, EvaBlockPostNorm)
    normed = block.norm1(group.x) if pre_norm else group.x  # type: ignore[operator]
    q, k, v = _heads(attention, normed, (QUERY, KEY, VALUE), _rope_of(rope, group))
    guests = group.num_guests
    if others is not None:
        context = block.norm1(others.x) if pre_norm else others.x  # type: ignore[operator]
        k2, v2 = _heads(attention, context, (KEY, VALUE), _rope_of(rope, others))
        first = others.is_guest
        k, v = (_joined(*((b, a) if first else (a, b)), batch=_batch(group, others)) for a, b in ((k, k2), (v, v2)))
        guests += others.num_guests
    bias = _bias(attention, shared_rel_pos_bias, group, others, guests)
    q = q.expand(len(k), -1, -1, -1)
    probabilities = None
    if explicit or not attention.fused_attn:
        scores = (q * attention.scale) @ k.transpose(-2, -1)
        probabilities = (scores if bias is None else scores + bias).softmax(dim=-1)
        used = probabilities if rewrite is None else rewrite(probabilities)
        mixed = attention.attn_drop(used) @ v
    else:
        drop = attention.attn_drop.p if attention.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    return _rest(block, group.x, _merged(attention, mixed, normed)), probabilities if explicit else None


def _heads(
    attention: Any, normed: Tensor, which: tuple[int, ...], rope: tuple[Tensor, int] | None
) -> tuple[Tensor, ...]:
    """Return queries, keys or values, each (B, H, n, d), normed per head and rotated where they have a place."""
    heads = []
    for part, flat in zip(which, _projected(attention, normed, which), strict=True):
        value = flat.unflatten(-1, (-1, _head_dim(attention))).transpose(1, 2)
        if part != VALUE:
            if hasattr(attention, "q_norm"):
                value = (attention.q_norm if part == QUERY else attention.k_norm)(value)
            if rope is not None:
                table, plain = rope
                half = getattr(attention, "rotate_half", False)
                turned = apply_rot_embed_cat(value[:, :, plain:], table, half=half)
                value = torch.cat([value[:, :, :plain], turned], dim=2).to(value.dtype)
        if part != QUERY and (groups := getattr(attention, "num_kv_groups", 1)) > 1:
            value = value.repeat_interleave(groups, dim=1)
        heads.append(value)
    return tuple(heads)


def _projected(attention: Any, x: Tensor, which: tuple[int, ...]) -> list[Tensor]:
    """Return the wanted parts of the projection to queries, keys and values, (B, n, heads * d) each."""
    if attention.qkv is None:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [projections[part](x) for part in which]
    linear = attention.qkv
    biases = getattr(attention, "q_bias", None)
    bias = linear.bias if biases is None else torch.cat([biases, attention.k_bias, attention.v_bias])
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        # Something was put around the projection (an adapter): it has to see the call.
        whole = linear(x) if biases is None else linear(x) + bias
        parts = whole.chunk(3, dim=-1)
        return [parts[part] for part in which]
    width = linear.out_features // 3
    start, stop = which[0] * width, (which[-1] + 1) * width  # the parts asked for are neighbours
    rows = F.linear(x, linear.weight[start:stop], None if bias is None else bias[start:stop])
    return list(rows.chunk(len(which), dim=-1))


def _head_dim(attention: Any) -> int:
    # `Beit` keeps the width of a head in its scale alone.
    return int(getattr(attention, "head_dim", 0)) or round(attention.scale**-2)


def _rope_of(rope: Tensor | None, group: Group) -> tuple[Tensor, int] | None:
    """Return the rotary table and the number of tokens in front that are not rotated; None where none is."""
    if rope is None or group.is_guest:
        return None
    return rope, group.x.shape[1] - rope.shape[-2]


def _batch(group: Group, others: Group) -> int:
    return max(len(group.x), len(others.x))


def _joined(front: Tensor, back: Tensor, batch: int) -> Tensor:
    return torch.cat([front.expand(batch, -1, -1, -1), back.expand(batch, -1, -1, -1)], dim=2)


def _bias(attention: Any, shared: Tensor | None, group: Group, others: Group | None, guests: int) -> Tensor | None:
    """Return the relative-position bias (…, H, queries, keys): zero wherever a guest takes part."""
    if group.is_guest:
        return None
    table = shared
    if getattr(attention, "relative_position_bias_table", None) is not None:
        bias = attention._get_rel_pos_bias()
        table = bias if shared is None else bias + shared
    return None if table is None else F.pad(table, (guests, 0, group.guests, 0))


def _merged(attention: Any, mixed: Tensor, normed: Tensor) -> Tensor:
    """Return the output of attention from what its heads gathered, (B, H, n, d) -> (B, n, D)."""
    x = mixed.transpose(1, 2).flatten(2)
    if isinstance(norm := getattr(attention, "norm", None), nn.Module):
        x = norm(x)
    if (gate := getattr(attention, "gate", None)) is not None:
        x = x * gate(normed).sigmoid()
    out: Tensor = attention.proj_drop(attention.proj(x))
    return out


def _rest(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return the block's output from its input and what its attention gave."""
    if isinstance(block, EvaBlockPostNorm):
        x = x + block.drop_path1(block.norm1(attended))
        return x + block.drop_path2(block.norm2(block.mlp(x)))
    x = x + block.drop_path1(_scaled(block, 1, attended))
    return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))


def _scaled(block: Any, number: int, branch: Tensor) -> Tensor:
    """Return a branch times its layer scale, where the block has one."""
    if isinstance(block, Block):
        scaled: Tensor = getattr(block, f"ls{number}")(branch)
        return scaled
    gamma = getattr(block, f"gamma_{number}")
    return branch if gamma is None else gamma * branch
