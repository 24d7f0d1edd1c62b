"""A block run with less work gives what a plain call gives, gradients included."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchloom.encoders import create_encoder, embed, run_block
from patchloom.encoders.blocks import LayerScaledLinear, LearnedBiasAttention

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


def graph_bytes(output):
    """Return the bytes a graph keeps beside parameters, each storage once."""
    kept, seen, todo = {}, set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, (tuple, list)) else [raw]:
                    held = saved.data[1] if isinstance(saved.data, tuple) else saved.data
                    if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter):
                        kept[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_activations_are_computed_again_and_gradients_stay_equal_to_the_bit(name):
    torch.manual_seed(0)
    encoder = create_encoder(name)
    block = encoder.blocks[0].train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, embed(encoder, torch.zeros(2, 3, *encoder.patch_embed.img_size)).x.shape[1], encoder.embed_dim)
    kwargs = embed(encoder, torch.zeros(2, 3, *encoder.patch_embed.img_size)).kwargs_of(0)
    gradients, sizes = [], []
    for keep_all in (True, False):
        entering = x.clone().requires_grad_()
        output = run_block(block, entering, kwargs, keep_all=keep_all)
        sizes.append(graph_bytes(output))
        wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(output.square().sum(), [entering, *wanted], allow_unused=True))
    scaled = hasattr(block, "gamma_1") and block.gamma_1 is not None  # learns by another formula, see below
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other) or scaled
    assert sizes[1] < 0.9 * sizes[0]


def scaled_block(name):
    """Return a block with layer scale, every parameter random, in float64, and what it is given."""
    torch.manual_seed(0)
    encoder = create_encoder(name, **({} if "eva" in name or "ccvit" in name else {"init_values": 0.1})).double()
    if name.startswith("eva"):
        encoder.blocks[0].gamma_1 = nn.Parameter(torch.empty(encoder.embed_dim, dtype=torch.float64))
        encoder.blocks[0].gamma_2 = nn.Parameter(torch.empty(encoder.embed_dim, dtype=torch.float64))
    block = encoder.blocks[0].train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    embedded = embed(encoder, torch.randn(2, 3, *encoder.patch_embed.img_size, dtype=torch.float64))
    return block, embedded.x.detach(), embedded.kwargs_of(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_scale_learns_the_same_without_the_output_it_scales(name):
    block, x, kwargs = scaled_block(name)
    wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
    weight = torch.randn_like(x)
    gradients, sizes = [], []
    for run in (lambda x: run_block(block, x, kwargs), lambda x: block(x, **kwargs)):
        entering = x.clone().requires_grad_()
        output = run(entering)
        nodes, todo = set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [parent for parent, _ in node.next_functions]
        sizes.append(sum("LayerScaledLinear" in type(node).__name__ for node in nodes))
        gradients.append(torch.autograd.grad((output * weight).sum(), [entering, *wanted]))
    assert sizes == [2, 0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


def test_what_a_layer_scale_scales_is_not_kept():
    sizes = []
    for kept in (False, True):
        linear, scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        with nullcontext() if kept else LayerScaledLinear():
            sizes.append(graph_bytes(scale * linear(torch.ones(2, 3, 8, requires_grad=True))))
    assert sizes[0] == 2 * 3 * 8 * 4 <= sizes[1] / 2  # the input alone


@pytest.mark.parametrize("why", ["hook", "retained", "frozen", "dtype", "other tensor"])
def test_a_product_that_is_not_a_plain_layer_scale_is_left_alone(why):
    torch.manual_seed(0)
    linear, scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
    x = torch.randn(3, 4, requires_grad=True)
    seen = []
    if why == "frozen":
        linear.weight.requires_grad_(False)
    if why == "dtype":
        scale = nn.Parameter(torch.randn(4, dtype=torch.float64))
    with LayerScaledLinear():
        y = linear(x)
        if why == "hook":
            y.register_hook(seen.append)
        if why == "retained":
            y.retain_grad()
        output = scale * (y + 0 if why == "other tensor" else y)
    assert "LayerScaledLinear" not in type(output.grad_fn).__name__
    output.sum().backward()
    torch.testing.assert_close(scale.grad, y.detach().sum(0).to(scale.dtype))
    if why == "hook":
        torch.testing.assert_close(seen[0], scale.detach().expand(3, 4))
    if why == "retained":
        torch.testing.assert_close(y.grad, scale.detach().expand(3, 4))


def test_a_layer_scale_can_be_differentiated_twice():
    torch.manual_seed(0)
    linear, scale = nn.Linear(4, 5).double(), nn.Parameter(torch.randn(5, dtype=torch.float64))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def scaled(x, weight, bias):
        with LayerScaledLinear():
            return scale * F.linear(x, weight, bias)

    assert torch.autograd.gradgradcheck(scaled, (x, linear.weight, linear.bias))
    assert torch.autograd.gradcheck(scaled, (x, linear.weight, linear.bias))


def test_a_block_whose_activations_are_computed_again_can_be_differentiated_twice():
    torch.manual_seed(0)
    block = create_encoder("vit_tiny_patch16_224").blocks[0].double()
    x = torch.randn(1, 5, 192, dtype=torch.float64, requires_grad=True)
    found = []
    for keep_all in (True, False):
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
            output = run_block(block, x, keep_all=keep_all)
        (slope,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])
