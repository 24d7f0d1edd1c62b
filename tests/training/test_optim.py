"""Optimiser groups: which tensors decay, which layer learns how fast."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from patchloom.encoders import has_tokens, layer_of_parameter
from patchloom.errors import UsageError
from patchloom.training.optim import STEM, adamw, decays, layer_of, make_optimizer, parameter_groups, set_rates


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


def test_layers_as_the_published_code_numbers_them():
    depth = 4
    assert layer_of("cls_token", depth) == layer_of("patch_embed.proj.weight", depth) == 0
    assert layer_of("blocks.0.attn.relative_position_bias_table", depth) == 1
    assert layer_of("blocks.3.mlp.fc1.weight", depth) == 4
    assert layer_of("rel_pos_bias.relative_position_bias_table", depth) == layer_of("head.weight", depth) == 5


REPRESENTATIVES = [
    *("vit_base_patch16_clip_quickgelu_224", "vit_base_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"),
    *("deit_base_distilled_patch16_224", "deit3_base_patch16_224", "aimv2_large_patch14_224", "vit_base_r50_s16_224"),
    *("vit_medium_patch16_gap_240", "vit_base_patch16_xp_224", "vit_wee_patch16_reg1_gap_256", "vit_base_mci_224"),
    *("vit_little_patch16_reg1_gap_256", "vit_small_patch16_36x1_224", "test_vit4", "ccvit_tiny_patch4_32"),
    *("beit_base_patch16_224", "beitv2_base_patch16_224", "beit3_base_patch16_224", "vit_7b_patch16_dinov3"),
    *(
        "eva_large_patch14_196",
        "eva02_base_patch14_224",
        "vit_base_patch16_rope_mixed_224",
        "vit_pe_core_base_patch16_224",
    ),
    *("vit_base_patch16_rope_reg1_gap_256", "vit_small_patch16_dinov3", "vit_pe_spatial_tiny_patch16_512"),
]


def vits() -> list[str]:
    modules = ("vision_transformer", "vision_transformer_hybrid", "deit", "beit", "eva", "ccvit")
    return [name for module in modules for name in timm.list_models(module=module)]


def check_layers(name: str) -> None:
    """Compare layers and weight decay with timm's; what departs is what BEiT's and CCViT's code does."""
    with torch.device("meta"):
        try:
            model: Any = timm.create_model(name, depth=2)
        except (TypeError, AssertionError, IndexError):  # it has blocks of several kinds
            model = timm.create_model(name)
    if not has_tokens(model):
        return
    depth = len(model.blocks)
    theirs = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    free = model.no_weight_decay()
    for key, parameter in model.named_parameters():
        first = key.split(".")[0]
        if first not in ("norm", "rel_pos_bias"):
            last = first not in STEM and first != "blocks"
            assert layer_of(key, depth) == (depth + 1 if last else theirs[key]), key
            assert not last or theirs[key] >= depth, key
        if not key.endswith("relative_position_bias_table"):
            plain = parameter.ndim < 2 or key in free or any(key.endswith(f".{end}") for end in free)
            assert decays(key, parameter) != plain, key


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_layers_are_timms(name: str) -> None:
    check_layers(name)


@pytest.mark.slow
def test_layers_of_every_vit_are_timms() -> None:
    for name in vits():
        check_layers(name)


def test_the_norm_before_the_blocks_is_part_of_the_stem_and_unknown_names_are_refused() -> None:
    assert layer_of("norm_pre.weight", 3) == 0
    with pytest.raises(UsageError, match=r"how far from the head 'adapters.a.weight' is"):
        layer_of("adapters.a.weight", 3)
    with pytest.raises(UsageError, match=r"ResNet has no parameter 'blocks.99.w'"):
        layer_of_parameter(timm.create_model("resnet10t", num_classes=0), "blocks.99.w")


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
