"""Optimiser groups: which tensors decay, which layer learns how fast."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import patchloom.encoders  # noqa: F401  (registers ccvit_*)
from patchloom.training.optim import adamw, decays, layer_of, make_optimizer, parameter_groups, set_rates


def group_of(groups: list, name: str) -> dict:
    return next(group for group in groups if name in group["names"])


def test_vectors_biases_positions_and_class_tokens_do_not_decay():
    kept = {
        "blocks.0.attn.qkv.weight": torch.zeros(6, 2),
        "mask_token": torch.zeros(1, 1, 2),
        "rel_pos_bias.relative_position_bias_table": torch.zeros(12, 3),
    }
    free = {
        "blocks.0.norm1.weight": torch.zeros(2),
        "blocks.0.gamma_1": torch.zeros(2),
        "head.bias": torch.zeros(2),
        "cls_token": torch.zeros(1, 1, 2),
        "pos_embed": torch.zeros(1, 5, 2),
    }
    assert all(decays(name, nn.Parameter(tensor)) for name, tensor in kept.items())
    assert not any(decays(name, nn.Parameter(tensor)) for name, tensor in free.items())


def test_layers_as_the_specification_numbers_them():
    depth = 4
    assert layer_of("cls_token", depth) == layer_of("patch_embed.proj.weight", depth) == 0
    assert layer_of("blocks.0.attn.relative_position_bias_table", depth) == 1
    assert layer_of("blocks.3.mlp.fc1.weight", depth) == 4
    assert layer_of("rel_pos_bias.relative_position_bias_table", depth) == layer_of("head.weight", depth) == 5


def test_learning_rates_fall_from_the_head_to_the_embedding():
    encoder = timm.create_model("ccvit_tiny_patch4_32", num_classes=3, depth=4)
    groups = parameter_groups(encoder, layer_decay=0.5, layer=lambda name: layer_of(name, 4), depth=4)
    optimizer = adamw(groups, betas=(0.9, 0.99), eps=1e-8)
    set_rates(optimizer, lr=1.0, weight_decay=0.1)
    assert group_of(optimizer.param_groups, "head.weight")["lr"] == 1.0
    assert group_of(optimizer.param_groups, "blocks.3.mlp.fc1.weight")["lr"] == 0.5
    assert group_of(optimizer.param_groups, "patch_embed.proj.weight")["lr"] == 0.5**5
    assert group_of(optimizer.param_groups, "blocks.3.mlp.fc1.weight")["weight_decay"] == 0.1
    assert group_of(optimizer.param_groups, "blocks.3.mlp.fc1.bias")["weight_decay"] == 0.0


def test_every_trainable_parameter_is_in_exactly_one_group():
    encoder = timm.create_model("ccvit_tiny_patch4_32", num_classes=3, depth=3)
    encoder.cls_token.requires_grad_(False)
    groups = parameter_groups(encoder, layer_decay=0.7, layer=lambda name: layer_of(name, 3), depth=3)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in encoder.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lamb"])
def test_rates_reach_every_kind_of_optimiser(kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    groups = parameter_groups(layer)
    optimizer = make_optimizer(kind, groups, betas=(0.9, 0.99), eps=1e-8, momentum=0.5)
    set_rates(optimizer, 0.1, 0.2)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    before = [parameter.clone() for parameter in layer.parameters()]
    layer(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
