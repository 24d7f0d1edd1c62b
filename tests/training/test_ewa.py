"""Experts weights averaging against its formulas, and what training makes of it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from patchloom.errors import UsageError
from patchloom.training.ewa import (
    RandomPartitionExperts,
    average_experts_,
    average_ffn,
    expand_ffn,
    experts_of,
    share_rate_schedule,
)


def mixture(count=4, width=6, hidden=10, dtype=torch.float64, **settings):
    """Return a mixture with random weights everywhere."""
    torch.manual_seed(0)
    ffn = timm.layers.Mlp(width, hidden).to(dtype)
    module = RandomPartitionExperts(ffn, count, **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(("batch", "length", "count"), [(2, 5, 4), (1, 3, 4), (3, 4, 2)])
def test_tokens_pass_the_expert_they_are_dealt_to(batch, length, count):
    module = mixture(count).train()
    x = torch.randn(batch, length, 6, dtype=torch.float64)
    order = torch.randperm(batch * length)
    out = module(x, order).reshape(-1, 6)
    sizes = [batch * length // count + (1 if e < batch * length % count else 0) for e in range(count)]
    start = 0
    for expert, size in zip(module.experts, sizes, strict=True):
        for token in order[start : start + size].tolist():
            h = x.reshape(-1, 6)[token] @ expert.fc1.weight.T + expert.fc1.bias
            expected = torch.nn.functional.gelu(h) @ expert.fc2.weight.T + expert.fc2.bias
            torch.testing.assert_close(out[token], expected)
        start += size


def test_every_image_is_dealt_out_by_itself():
    module = mixture(2, scope="image").train()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    out = module(x, order)
    for image in range(3):
        for place, token in enumerate(order[image].tolist()):
            torch.testing.assert_close(out[image, token], module.experts[place // 2](x[image, token]))


def test_draws_differ_from_call_to_call_and_follow_the_seed():
    module = mixture().train()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, module(x))


def test_fewer_tokens_than_experts_leave_a_graph_with_all_parameters():
    module = mixture(4).train()
    x = torch.randn(1, 2, 6, dtype=torch.float64)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert not module.experts[3].fc1.weight.grad.any()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.75])
def test_averaging_is_the_formula_and_keeps_the_mean(rate):
    module = mixture(4)
    before = [copy.deepcopy(expert.state_dict()) for expert in module.experts]
    average_experts_([module], rate)
    for name in before[0]:
        mean = sum(state[name] for state in before) / 4
        for i, expert in enumerate(module.experts):
            others = sum(before[j][name] for j in range(4) if j != i)
            now = expert.state_dict()[name]
            torch.testing.assert_close(now, (1 - rate) * before[i][name] + rate / 3 * others)
            torch.testing.assert_close(now - mean, (1 - rate * 4 / 3) * (before[i][name] - mean))


def test_the_form_with_the_mean_is_the_same_family():
    one, other = mixture(4), mixture(4)
    average_experts_([one], 0.3)
    average_experts_([other], 0.4, normalisation="mean")
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "ccvit_tiny_patch8_64"])
def test_the_folded_model_equals_the_average_and_has_the_plain_names(name):
    from patchloom.encoders import create_encoder

    torch.manual_seed(0)
    encoder = create_encoder(name)
    plain = set(encoder.state_dict())
    expand_ffn(encoder, 3)
    assert len(experts_of(encoder)) == len(encoder.blocks) // 2
    assert "blocks.1.mlp.experts.2.fc2.bias" in encoder.state_dict() or name.startswith("eva")
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.05)
    images = torch.randn(1, 3, *encoder.patch_embed.img_size)
    with torch.no_grad():
        before = encoder.eval()(images)
        folded = average_ffn(encoder)
        assert (folded(images) - before).abs().max() <= 1e-5
    assert set(folded.state_dict()) == plain


def test_the_average_follows_the_weights():
    module = mixture(2).eval()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    first = module(x)
    with torch.no_grad():
        module.experts[1].fc2.bias.add_(1)
    torch.testing.assert_close(module(x), first + 0.5)


def test_new_experts_are_drawn_from_the_same_distribution_or_copied():
    ffn = timm.layers.Mlp(16, 64)
    fresh = RandomPartitionExperts(copy.deepcopy(ffn), 3)
    same = RandomPartitionExperts(copy.deepcopy(ffn), 3, init="copy")
    for expert in fresh.experts[1:]:
        assert not torch.equal(expert.fc1.weight, ffn.fc1.weight)
        assert torch.equal(expert.fc1.weight.flatten().sort().values, ffn.fc1.weight.flatten().sort().values)
    for expert in same.experts:
        assert torch.equal(expert.fc1.weight, ffn.fc1.weight)


def test_share_rates():
    linear, cosine = share_rate_schedule("linear", 0.3, 11), share_rate_schedule("cosine", 0.3, 11)
    assert [linear(0), linear(5), linear(10)] == pytest.approx([0, 0.15, 0.3])
    assert [cosine(0), cosine(5), cosine(10)] == pytest.approx([0, 0.15, 0.3])
    assert share_rate_schedule("constant", 0.3, 11)(0) == 0.3


def test_what_cannot_be_is_refused():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    with pytest.raises(UsageError, match="num_experts is 1; it must be at least 2"):
        expand_ffn(vit, 1)
    with pytest.raises(UsageError, match="experts is 197, and an image has 196 patches to share out"):
        expand_ffn(vit, 197)
    with pytest.raises(UsageError, match="there is no block 12"):
        expand_ffn(vit, 2, layers=[12])
    with pytest.raises(UsageError, match="unknown expert_layers 'alternat'; did you mean alternate"):
        expand_ffn(vit, 2, layers="alternat")
    with pytest.warns(UserWarning, match="no experts to average"):
        average_ffn(vit)
    expand_ffn(vit, 2, layers=[3])
    with pytest.raises(UsageError, match="mixture of experts already"):
        expand_ffn(vit, 2, layers=[3])
    with pytest.raises(UsageError, match=r"share_rate is 0.6; with 2 experts it must be in \[0, 0.5\]"):
        average_experts_(experts_of(vit), 0.6)


@pytest.mark.slow
def test_a_run_with_experts_ships_the_plain_model_and_resumes(tmp_path):
    import patchloom as pl

    settings = {
        "data": "digits",
        "encoder": "ccvit_tiny_patch4_32",
        "k": 16,
        "codebook_images": 40,
        "batch_size": 16,
        "num_workers": 0,
        "experts": 2,
        "probe_every": 0,
        "report": False,
        "checkpoint_every": 1,
    }
    whole = pl.pretrain("ccvit", **settings, max_steps=3, out=str(tmp_path / "whole"))
    model = pl.load(str(whole.model))
    assert not experts_of(model)
    state = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    mean = sum(state[f"encoder.blocks.1.mlp.experts.{e}.fc1.weight"] for e in range(2)) / 2
    torch.testing.assert_close(model.state_dict()["blocks.1.mlp.fc1.weight"], mean)
    again = pl.adapt("finetune", data="digits", encoder=str(whole.model), out=str(tmp_path / "tuned"), experts=2,
                     batch_size=16, num_workers=0, max_steps=1, probe_every=0)  # fmt: skip
    assert not experts_of(pl.load(str(again.model)))
