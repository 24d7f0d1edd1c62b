"""A block run on one group of tokens gives what timm's block makes of both groups in one row."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import timm
import torch
from torch.nn import functional as F

from patchloom.encoders import create_encoder, embed, num_prefix_tokens
from patchloom.encoders.attend import Group, attend_block, check_separable
from patchloom.errors import UsageError

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
ENCODERS = {
    "plain": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "qk_norm": True, "scale_attn_norm": True}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "shared table": ("ccvit_tiny_patch8_64", {"use_shared_rel_pos_bias": True}),
    "own tables": ("beit_base_patch16_224", {"use_rel_pos_bias": True, "init_values": None}),
    "rotary": ("eva02_tiny_patch14_224", {}),
    "rotary with registers": ("vit_small_patch16_dinov3", {}),
    "mixed rotary": ("vit_small_patch16_rope_mixed_224", {}),
    "post norm": ("eva02_tiny_patch14_224", {"use_post_norm": True}),
}


def encoder_of(kind: str) -> torch.nn.Module:
    name, changes = ENCODERS[kind]
    encoder = create_encoder(name, image_size=32, **{**SMALL, **changes}).eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return encoder


def whole_row(encoder, number, guests, embedded):
    """What timm's own block makes of guests and tokens in one row, and its attention."""
    block, kwargs = encoder.blocks[number], dict(embedded.kwargs_of(number))
    count = guests.shape[1]
    if (bias := kwargs.get("shared_rel_pos_bias")) is not None:
        kwargs["shared_rel_pos_bias"] = F.pad(bias, (count, 0, count, 0))
    if (rope := kwargs.get("rope")) is not None:  # no rotation: sine 0, cosine 1
        half = rope.shape[-1] // 2
        plain = torch.cat([torch.zeros(half), torch.ones(half)]).expand(*rope.shape[:-2], count, -1).to(rope)
        kwargs["rope"] = torch.cat([plain, rope], dim=-2)
    attention, seen = block.attn, []
    hook = attention.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    own = getattr(attention, "_get_rel_pos_bias", None)
    table = None if own is None or attention.relative_position_bias_table is None else F.pad(own(), (count, 0) * 2)
    attention.fused_attn = False
    with patch.object(type(attention), "_get_rel_pos_bias", lambda self: table, create=True):
        out = block(torch.cat([guests, embedded.x], dim=1), **kwargs)
    hook.remove()
    attention.fused_attn = True
    return out, seen[0]


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_each_group_gets_what_the_whole_row_gives(kind):
    encoder = encoder_of(kind)
    check_separable(encoder)
    embedded = embed(encoder, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    guests = torch.randn(2, 5, 32, dtype=torch.float64)
    for number in range(2):
        out, attention = whole_row(encoder, number, guests, embedded)
        block, kwargs = encoder.blocks[number], embedded.kwargs_of(number)
        ours, none = attend_block(block, Group(embedded.x), Group(guests, is_guest=True), **kwargs)
        assert none is None
        torch.testing.assert_close(ours, out[:, 5:])
        theirs, seen = attend_block(block, Group(guests, is_guest=True), Group(embedded.x), explicit=True, **kwargs)
        torch.testing.assert_close(theirs, out[:, :5])
        torch.testing.assert_close(seen, attention[:, :, :5])
        both, all_seen = attend_block(
            block, Group(torch.cat([guests, embedded.x], 1), guests=5), explicit=True, **kwargs
        )
        torch.testing.assert_close(both, out)
        torch.testing.assert_close(all_seen, attention)
        assert embedded.x.shape[1] == 16 + num_prefix_tokens(encoder)


def test_guests_given_once_serve_the_whole_batch():
    encoder = encoder_of("registers")
    embedded = embed(encoder, torch.randn(3, 3, 32, 32, dtype=torch.float64))
    guests = torch.randn(1, 4, 32, dtype=torch.float64)
    for group, others in (
        (Group(embedded.x), Group(guests, is_guest=True)),
        (Group(guests, is_guest=True), Group(embedded.x)),
    ):
        repeated = [g._replace(x=g.x.expand(3, -1, -1)) for g in (group, others)]
        once, _ = attend_block(encoder.blocks[0], group, others)
        torch.testing.assert_close(once, attend_block(encoder.blocks[0], *repeated)[0])


def test_a_module_put_around_the_projection_sees_the_call():
    encoder = encoder_of("plain")
    embedded = embed(encoder, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    guests = Group(torch.randn(2, 4, 32, dtype=torch.float64), is_guest=True)
    plain, _ = attend_block(encoder.blocks[0], Group(embedded.x), guests)
    hook = encoder.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: output * 1.0)
    hooked, _ = attend_block(encoder.blocks[0], Group(embedded.x), guests)
    torch.testing.assert_close(hooked, plain)
    hook.remove()
    encoder.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    halved, _ = attend_block(encoder.blocks[0], Group(embedded.x), guests)
    assert not torch.allclose(halved, plain)


def test_rewritten_probabilities_are_the_ones_used():
    encoder = encoder_of("plain")
    embedded = embed(encoder, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    guests = Group(torch.randn(2, 4, 32, dtype=torch.float64), is_guest=True)
    block = encoder.blocks[0]
    same, seen = attend_block(block, guests, Group(embedded.x), explicit=True, rewrite=lambda p: p)
    torch.testing.assert_close(same, attend_block(block, guests, Group(embedded.x))[0])
    other, unchanged = attend_block(
        block, guests, Group(embedded.x), explicit=True, rewrite=lambda p: torch.full_like(p, 1 / p.shape[-1])
    )
    torch.testing.assert_close(unchanged, seen)
    assert not torch.allclose(other, same)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_attention_that_cannot_be_taken_apart_is_refused_by_name(name):
    if name.startswith("swin"):
        with pytest.raises(UsageError, match="swin_tiny_patch4_window7_224 is a SwinTransformer"):
            create_encoder(name, image_size=64)
        return
    from timm.models.vision_transformer import ParallelScalingBlock

    encoder = timm.create_model(name, num_classes=0, depth=1, embed_dim=32, num_heads=2, block_fn=ParallelScalingBlock)
    with pytest.raises(UsageError, match="ParallelScalingBlock"):
        check_separable(encoder)
