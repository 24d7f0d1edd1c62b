"""A block run with less work gives what a plain call gives, gradients included."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch.nn import functional as F

from patchloom.encoders import create_encoder, embed, run_block
from patchloom.encoders.blocks import LearnedBiasAttention

NAMES = ["vit_tiny_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224", "ccvit_tiny_patch8_64"]


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_attention_with_a_learned_bias_equals_the_formula_and_all_its_gradients(batch):
    """softmax(q k' / sqrt(d) + bias) v, written out."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(batch, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 7, 4, dtype=torch.float64)
    expected = ((q @ k.transpose(-2, -1)) / 2.0 + bias).softmax(-1) @ v
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v, bias))
    with LearnedBiasAttention():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert "BiasedAttention" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), (q, k, v, bias)), wanted)


def test_attention_without_a_learned_bias_is_left_alone():
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    with LearnedBiasAttention():
        plain = F.scaled_dot_product_attention(q, q, q)
        fixed = F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(1, 2, 5, 5))
    for output in (plain, fixed):
        assert "BiasedAttention" not in type(output.grad_fn).__name__
    torch.testing.assert_close(plain, fixed)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_read_are_those_of_the_whole_block_gradients_included(name):
    torch.manual_seed(1)
    encoder = create_encoder(name, img_size=56) if name.startswith("eva") else create_encoder(name)
    encoder = encoder.train()
    side = encoder.patch_embed.img_size
    embedded = embed(encoder, torch.randn(2, 3, *side))
    x = embedded.x.detach().requires_grad_(True)
    block, kwargs = encoder.blocks[0], embedded.kwargs_of(0)
    for parameter in block.parameters():  # layer scales of 1e-5 would hide the branches
        torch.nn.init.normal_(parameter, std=0.1)
    rows = torch.rand(x.shape[:2]) < 0.4
    read = run_block(block, x, kwargs, rows)[rows]
    plain = block(x, **kwargs)[rows]
    torch.testing.assert_close(read, plain, rtol=1e-4, atol=1e-4)
    inputs = [x, *block.parameters()]
    ours = torch.autograd.grad(read.square().sum(), inputs, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(plain.square().sum(), inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            assert (a - b).abs().max() <= 2e-4 * b.abs().max().clamp(min=1e-3)


def test_a_kind_of_block_that_is_not_known_token_by_token_is_run_whole():
    block = timm.create_model("vit_tiny_patch16_224", block_fn=ResPostBlock).blocks[0]
    x = torch.randn(1, 9, 192)
    torch.testing.assert_close(run_block(block.eval(), x, rows=torch.zeros(1, 9, dtype=torch.bool)), block(x))


@pytest.mark.parametrize("name", ["ccvit_tiny_patch8_64", "beitv2_base_patch16_224"])  # a shared table, one per block
def test_the_blocks_of_an_encoder_with_relative_positions_use_it(name, monkeypatch):
    from patchloom.encoders import blocks, run_blocks

    calls = []
    original = blocks._BiasedAttention.apply
    monkeypatch.setattr(blocks._BiasedAttention, "apply", lambda *inputs: calls.append(1) or original(*inputs))
    encoder = create_encoder(name, depth=2).train()
    images = torch.randn(1, 3, *encoder.patch_embed.img_size)
    last, _ = run_blocks(encoder, embed(encoder, images))
    assert len(calls) == 2
    with torch.no_grad():
        run_blocks(encoder, embed(encoder, images))
    assert len(calls) == 2
    found = torch.autograd.grad(last.square().sum(), list(encoder.parameters()), allow_unused=True)
    torch.testing.assert_close(encoder.norm(last), encoder.forward_features(images), rtol=1e-4, atol=1e-4)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in found) > 10
