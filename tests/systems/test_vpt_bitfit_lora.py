"""The baselines: prompts, biases and low-rank updates act as their formulas say, and merge where they can."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from encoders_for_tests import FAMILIES, pictures, tiny
from patchloom.encoders import create_encoder
from patchloom.encoders.insertion import activate, insert, merge, remove
from patchloom.errors import UsageError
from patchloom.systems.bitfit.model import BitFit
from patchloom.systems.linear.model import LinearHead
from patchloom.systems.lora.model import LoRA
from patchloom.systems.vpt.model import VisualPrompts
from systems.adaptformer.test_method import randomised

peft = pytest.importorskip("peft")


def test_deep_prompts_are_dropped_after_every_block_and_shallow_ones_go_through():
    images = pictures(double=True)
    for depth in ("deep", "shallow"):
        encoder = tiny("vit", double=True)
        prompts = randomised(VisualPrompts(encoder, 3, depth))
        x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
        for number, block in enumerate(encoder.blocks):
            if depth == "deep" or number == 0:
                x = torch.cat([prompts.prompts[number].expand(2, -1, -1), x], 1)
            x = block(x)
            if depth == "deep" or number == 2:
                x = x[:, 3:]
        wanted = encoder.norm(x)[:, 0]
        insert(encoder, prompts)
        torch.testing.assert_close(encoder(images), wanted)


def test_prompts_have_the_published_count_and_bounds():
    with torch.device("meta"):
        encoder = create_encoder("vit_base_patch16_224")
    assert VisualPrompts(encoder, 5).trainable_parameters() == 5 * 9216
    assert VisualPrompts(encoder, 5, "shallow").trainable_parameters() == 5 * 768
    drawn = VisualPrompts(encoder, 5).prompts.detach()
    bound = math.sqrt(6 / (6 * 768))
    assert 0.98 * bound < drawn.abs().max() <= bound
    with pytest.raises(UsageError, match="num_prompts is 0"):
        VisualPrompts(encoder, 0)
    with pytest.raises(UsageError, match="unknown depth 'dep'; did you mean deep"):
        VisualPrompts(encoder, 1, "dep")


@pytest.mark.parametrize("kind", FAMILIES)
def test_trained_biases_stand_in_and_merge(kind):
    encoder, images = tiny(kind, double=True).requires_grad_(False), pictures(double=True)
    reference, before = copy.deepcopy(encoder), encoder(images)
    biases = BitFit(encoder)
    insert(encoder, biases)
    assert torch.equal(encoder(images), before)  # it starts from the encoder's own
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, bias in zip(biases.names, biases.biases, strict=True):
            bias.add_(torch.randn(bias.shape, generator=generator, dtype=torch.float64))
            reference.get_parameter(name).copy_(bias)
    torch.testing.assert_close(encoder(images), reference(images))
    assert not any(name.endswith(("weight", "table")) for name in biases.names)
    activate(encoder, None)
    assert torch.equal(encoder(images), before)
    merge(encoder, "adapter")
    torch.testing.assert_close(encoder(images), reference(images))
    assert set(encoder.state_dict()) == set(reference.state_dict())


def test_an_encoder_without_biases_is_refused():
    encoder = tiny("vit")
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
            module.bias = None
    with pytest.raises(UsageError, match="no biases"):
        BitFit(encoder)


def test_updates_of_the_fused_layer_equal_those_of_peft_itself():
    encoder, images = tiny("vit", double=True), pictures(double=True)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "proj", "fc1", "fc2"])
    theirs = peft.get_peft_model(copy.deepcopy(encoder), config).double().eval()
    ours = LoRA(encoder, 3, 5.0, ("qkv", "proj", "fc1", "fc2")).double().eval()
    generator = torch.Generator().manual_seed(3)
    published = {name: value for name, value in theirs.named_parameters() if "lora_" in name and "patch" not in name}
    with torch.no_grad():
        for value in published.values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        by_name = {f"{owner}.{name}": layer for (owner, name), layer in zip(ours._sites, ours.layers, strict=True)}
        for name, value in published.items():
            site, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            by_name[site].get_parameter(f"lora_{rest}").copy_(value)
    insert(encoder, ours)
    own = [p for name, p in theirs.named_parameters() if "lora_" in name and ".patch_embed." not in name]
    assert ours.trainable_parameters() == sum(p.numel() for p in own)
    # peft finds the patch embedding's `proj` too; its update is zero at the start.
    torch.testing.assert_close(encoder(images), theirs(images))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("targets", [("q", "v"), ("qkv", "proj"), ("k", "fc1")])
@pytest.mark.parametrize("dora", [False, True])
def test_updates_are_their_formula_and_merge(kind, targets, dora):
    encoder, images = tiny(kind), pictures()
    before, state = encoder(images), {name: value.clone() for name, value in encoder.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    updates = LoRA(encoder, 2, 4.0, targets, dora=dora)
    insert(encoder, updates)
    torch.testing.assert_close(encoder(images), before, atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in updates.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    unmerged = encoder(images)
    assert (unmerged - before).abs().max() > 1e-3
    twin = copy.deepcopy(encoder)
    remove(twin)
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in twin.named_parameters()} == flags
    expected = None if dora else merged_by_hand(updates, state)
    merge(encoder)
    torch.testing.assert_close(encoder(images), unmerged, atol=5e-6, rtol=1e-5)
    assert list(encoder.state_dict()) == list(state)
    if expected is not None:
        for name, value in encoder.state_dict().items():
            torch.testing.assert_close(value, expected[name])


def merged_by_hand(updates, state):
    """Return the weights W + (alpha / r) B A, the parts of a fused layer each in its third."""
    merged = dict(state)
    for (owner, name), layer in zip(updates._sites, updates.layers, strict=True):
        weight = merged[f"{owner}.{name}.weight"].clone()
        if hasattr(layer, "whole"):
            third = len(weight) // 3
            for number, part in enumerate((layer.q, layer.k, layer.v)):
                if hasattr(part, "lora_A"):
                    delta = 2 * part.lora_B["default"].weight @ part.lora_A["default"].weight
                    weight[number * third : (number + 1) * third] += delta
        else:
            weight += 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merged[f"{owner}.{name}.weight"] = weight.detach()
    return merged


def test_merged_and_unmerged_agree_to_1e_6_and_heads_go_along():
    encoder, images = tiny("vit", double=True), pictures(double=True)
    updates = LoRA(encoder, 2, num_classes=3).double().eval()
    with torch.no_grad():
        for name, parameter in updates.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        updates.head[0].running_mean.add_(0.3)
        updates.head[0].running_var.mul_(2)
    insert(encoder, updates)
    logits = encoder(images)
    merge(encoder)
    torch.testing.assert_close(encoder(images), logits, atol=1e-6, rtol=0)
    assert isinstance(encoder.head, nn.Linear)


def test_targets_are_checked():
    encoder = tiny("vit")
    for options, said in (
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("qk",)}, "unknown target 'qk'"),
        ({"targets": ("qkv", "v")}, "one or the others"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(UsageError, match=said):
            LoRA(encoder, **options)


def test_a_pool_of_its_own_keeps_an_adapter_from_merging():
    encoder = tiny("vit")
    insert(encoder, LinearHead(encoder, 3, pool="avg"))
    with pytest.raises(UsageError, match="pool=avg"):
        merge(encoder)


def test_what_stood_aside_follows_the_encoder_to_another_format():
    encoder, images = tiny("vit"), pictures()
    before = encoder(images)
    insert(encoder, BitFit(encoder, num_classes=3, pool="avg"))
    encoder.double()
    remove(encoder)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float64}
    torch.testing.assert_close(encoder(images.double()), before.double(), atol=1e-5, rtol=1e-5)


def test_every_bias_that_trains_gets_a_gradient():
    for pool in ("auto", "avg"):
        encoder, images = tiny("vit_registers"), pictures(4)
        insert(encoder, BitFit(encoder, num_classes=3, pool=pool))
        encoder.train()(images).square().sum().backward()
        assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
