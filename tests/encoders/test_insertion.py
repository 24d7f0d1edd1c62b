"""The insertion contract: what is added acts as its formula says, for every family, and comes off without a trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from torch import nn

from encoders_for_tests import FAMILIES, pictures, tiny
from patchloom.encoders import class_attention, embed, intermediate_layers, num_prefix_tokens, pooled, tokens
from patchloom.encoders.insertion import Insertion, activate, active, insert, insertions, merge, plain, remove, serve
from patchloom.errors import UsageError


class Everything(Insertion):
    """Own tokens before every block (or once), and a branch beside every MLP."""

    def __init__(self, encoder, count=2, carried=False, branches=True, branch_input="residual"):
        super().__init__()
        self.carried, self.branch_input = carried, branch_input
        self.token_counts = [count] * len(encoder.blocks)
        self.branches = range(len(encoder.blocks)) if branches else ()
        generator = torch.Generator().manual_seed(5)
        shape = (len(encoder.blocks), count, encoder.embed_dim)
        self.prompts = nn.Parameter(torch.randn(shape, generator=generator))
        self.matrices = nn.Parameter(torch.randn(shape[0], shape[2], shape[2], generator=generator) * 0.1)

    def new_tokens(self, number, x):
        return self.prompts[number].expand(len(x), -1, -1)

    def branch(self, number, x):
        return torch.tanh(x @ self.matrices[number])


def attention_by_hand(attention, x, extra, bias, rope):
    """Return the attention of a block, written out: extra tokens in front have no position."""
    b, n, d = x.shape
    heads = attention.num_heads
    prefix = getattr(attention, "num_prefix_tokens", 0)
    if attention.qkv is None:
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    else:
        whole = x @ attention.qkv.weight.T
        if attention.qkv.bias is not None:
            whole = whole + attention.qkv.bias
        elif getattr(attention, "q_bias", None) is not None:
            whole = whole + torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
        q, k, v = whole.chunk(3, dim=-1)
    q, k, v = (part.view(b, n, heads, d // heads).transpose(1, 2) for part in (q, k, v))
    if rope is not None:
        half = getattr(attention, "rotate_half", False)
        at = extra + prefix
        q = torch.cat([q[:, :, :at], apply_rot_embed_cat(q[:, :, at:], rope, half=half)], 2)
        k = torch.cat([k[:, :, :at], apply_rot_embed_cat(k[:, :, at:], rope, half=half)], 2)
    scores = q @ k.transpose(-2, -1) * (d // heads) ** -0.5
    if bias is not None:
        scores[:, :, extra:, extra:] += bias
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
    return attention.proj(attention.norm(mixed) if hasattr(attention, "norm") else mixed)


def scaled(block, which, x):
    if hasattr(block, f"ls{which}"):
        return getattr(block, f"ls{which}")(x)
    gamma = getattr(block, f"gamma_{which}", None)
    return x if gamma is None else gamma * x


def forward_by_hand(encoder, insertion, images):
    """Return the tokens before the final norm, and what the last block made of the extra tokens."""
    start = embed(encoder, images)
    x, count = start.x, insertion.token_counts[0]
    for number, block in enumerate(encoder.blocks):
        kwargs = start.kwargs_of(number)
        bias = kwargs.get("shared_rel_pos_bias")
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            bias = type(block.attn)._get_rel_pos_bias(block.attn)
        if number == 0 or not insertion.carried:
            x = torch.cat([insertion.prompts[number].expand(len(x), -1, -1), x], 1)
        x = x + scaled(block, 1, attention_by_hand(block.attn, block.norm1(x), count, bias, kwargs.get("rope")))
        seen = x if insertion.branch_input == "residual" else block.norm2(x)
        added = torch.tanh(seen @ insertion.matrices[number]) if len(insertion.branches) else 0.0
        x = x + scaled(block, 2, block.mlp(block.norm2(x))) + added
        outputs = x[:, :count]
        if not insertion.carried:
            x = x[:, count:]
    return (x[:, count:] if insertion.carried else x), outputs


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("carried", [False, True])
def test_tokens_and_branches_follow_the_formula(kind, carried):
    encoder, images = tiny(kind, double=True), pictures(double=True)
    insertion = Everything(encoder, carried=carried).double()
    wanted, outputs = forward_by_hand(encoder, insertion, images)
    insert(encoder, insertion)
    torch.testing.assert_close(encoder.forward_features(images), encoder.norm(wanted))
    torch.testing.assert_close(insertion.prompt_outputs, outputs)
    found = tokens(encoder, images)  # the same through our own stages
    torch.testing.assert_close(torch.cat(found, 1), encoder.norm(wanted))
    torch.testing.assert_close(pooled(encoder, images), encoder(images))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_branch_may_read_the_normed_stream(kind):
    encoder, images = tiny(kind, double=True), pictures(double=True)
    insertion = Everything(encoder, branch_input="normed").double()
    wanted, _ = forward_by_hand(encoder, insertion, images)
    insert(encoder, insertion)
    torch.testing.assert_close(encoder.forward_features(images), encoder.norm(wanted))


@pytest.mark.parametrize("kind", FAMILIES)
def test_removal_leaves_the_encoder_byte_for_byte_as_it_was(kind):
    encoder, images = tiny(kind), pictures()
    encoder.norm.requires_grad_(False)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    attributes, hooks = set(vars(encoder)), count_hooks(encoder)
    before = encoder(images)
    insert(encoder, Everything(encoder, carried=True))
    assert not torch.equal(encoder(images), before)
    assert all(name.startswith("adapters.") for name, p in encoder.named_parameters() if p.requires_grad)
    remove(encoder)
    assert list(encoder.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert [name for name, parameter in encoder.named_parameters() if parameter.requires_grad] == trained
    assert set(vars(encoder)) == attributes
    assert count_hooks(encoder) == hooks
    assert torch.equal(encoder(images), before)


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("carried", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, carried):
    encoder, images = tiny(kind, double=True), pictures(double=True)
    insertion = Everything(encoder, carried=carried).double()
    insert(encoder, insertion)
    encoder.train()

    def run():
        insertion.zero_grad()
        (encoder(images).square().sum() + insertion.prompt_outputs.square().sum()).backward()
        return encoder(images).detach(), [parameter.grad.clone() for parameter in insertion.parameters()]

    output, gradients = run()
    encoder.set_grad_checkpointing(True)
    again, recomputed = run()
    torch.testing.assert_close(again, output)
    torch.testing.assert_close(recomputed, gradients)
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if "adapters." not in name)


def test_switching_and_serving_a_mixed_batch():
    encoder, images = tiny("vit_registers"), pictures(5)
    first, second = Everything(encoder), Everything(encoder, carried=True)
    second.head = nn.Linear(32, 7)
    insert(encoder, first, "first")
    alone = encoder(images)
    insert(encoder, second, "second")
    logits = encoder(images)
    assert logits.shape == (5, 7)
    activate(encoder, "first")
    assert torch.equal(encoder(images), alone)
    with plain(encoder):
        without = encoder(images)
    outputs = serve(encoder, images, ["second", "first", None, "second", "first"])
    assert active(encoder) == "first"
    wanted = [logits[0], alone[1], without[2], logits[3], alone[4]]
    for found, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(found, expected)
    remove(encoder, "first")
    assert list(insertions(encoder)) == ["second"]
    assert active(encoder) is None


def test_layers_and_attention_show_the_image_and_not_the_extra_tokens():
    for kind in ("vit", "beit_shared", "eva_rotary", "vit_no_class"):
        encoder, images = tiny(kind), pictures()
        insert(encoder, Everything(encoder, carried=True))
        layers = intermediate_layers(encoder, images, (0, 2))
        assert [layer.patches.shape for layer in layers] == [(2, 16, 32)] * 2
        attention = class_attention(encoder, images)
        assert attention.shape == (2, 4, 16)
        assert layers[0].prefix.shape[1] == num_prefix_tokens(encoder)


def test_the_rows_of_the_attention_are_those_of_the_class_token():
    encoder, images = tiny("vit", double=True), pictures(double=True)
    insertion = Everything(encoder, branches=False).double()
    insert(encoder, insertion)
    first = encoder.blocks[0]
    x = torch.cat([insertion.prompts[0].expand(2, -1, -1), embed(encoder, images).x], 1)
    q, k, _ = first.attn.qkv(first.norm1(x)).view(2, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
    rows = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)[:, :, 2, 3:]
    torch.testing.assert_close(class_attention(encoder, images, layer=0), rows)


def test_a_copy_stands_on_its_own():
    encoder, images = tiny("eva_rotary"), pictures()
    insert(encoder, Everything(encoder))
    output = encoder(images)
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin(images), output)
    with torch.no_grad():
        insertions(twin)["adapter"].prompts.add_(1)
    assert not torch.equal(twin(images), output)
    assert torch.equal(encoder(images), output)
    remove(twin)
    assert torch.equal(encoder(images), output)


def test_mistakes_are_named():
    encoder = tiny("vit")
    one = Everything(encoder)
    insert(encoder, one, "one")
    with pytest.raises(UsageError, match="'one' on this encoder already"):
        insert(encoder, Everything(encoder), "one")
    with pytest.raises(UsageError, match="on an encoder already"):
        insert(encoder, one, "two")
    with pytest.raises(UsageError, match="name of an adapter"):
        insert(encoder, Everything(encoder), "a.b")
    with pytest.raises(UsageError, match="unknown adapter 'on'; did you mean one"):
        activate(encoder, "on")
    with pytest.raises(UsageError, match="cannot be merged"):
        merge(encoder, "one")
    with pytest.raises(UsageError, match="one name for each image"):
        serve(encoder, pictures(), ["one"])
    with pytest.raises(UsageError, match="ResNet is none of them"):
        insert(timm.create_model("resnet10t"), one)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("swinv2_cr_tiny_224", "SwinTransformerV2Cr"), ("vit_base_patch16_xp_224", "ParallelScalingBlock")],
)
def test_blocks_without_a_place_for_a_branch_are_refused(name, kind):
    arguments = {"depth": 1, "embed_dim": 32, "num_heads": 4} if name.startswith("vit") else {}
    with torch.device("meta"):
        encoder = timm.create_model(name, **arguments)

    class Branching(Insertion):
        needs_mlp_branch = True

    with pytest.raises(UsageError, match=kind):
        insert(encoder, Branching())
