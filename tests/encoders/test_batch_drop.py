"""Stochastic depth on part of the batch: the published sum, its expectation, all families."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath

from patchloom.encoders import create_encoder, embed, run_blocks
from patchloom.encoders.batch_drop import can_run_on_part, run_blocks_on_part, set_drop_path

SMALL = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "init_values": 0.5}
FAMILIES = ["vit_tiny_patch16_224", "ccvit_tiny_patch4_32", "eva02_tiny_patch14_224"]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_rate_it_is_the_plain_pass(name):
    encoder = create_encoder(name, **SMALL).eval()
    embedded = embed(encoder, torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(run_blocks_on_part(encoder, embedded, 0.0), run_blocks(encoder, embedded)[0])


def test_each_branch_is_added_to_the_samples_kept_with_the_weight_of_all():
    encoder = create_encoder("vit_tiny_patch16_224", **SMALL).double().eval()
    embedded = embed(encoder, torch.randn(5, 3, 32, 32, dtype=torch.float64))
    torch.manual_seed(7)
    found = run_blocks_on_part(encoder, embedded, 0.5)
    torch.manual_seed(7)
    expected = embedded.x.clone()
    for block in encoder.blocks:
        kept = torch.randperm(5)[:2]  # int(5 · 0.5) = 2
        expected[kept] += 5 / 2 * block.ls1(block.attn(block.norm1(expected[kept])))
        kept = torch.randperm(5)[:2]
        expected[kept] += 5 / 2 * block.ls2(block.mlp(block.norm2(expected[kept])))
    torch.testing.assert_close(found, expected)


def test_the_expectation_of_a_branch_is_the_branch():
    encoder = create_encoder("vit_tiny_patch16_224", **{**SMALL, "depth": 1}).double().eval()
    with torch.no_grad():
        encoder.blocks[0].ls2.gamma.zero_()  # one branch: then the expectation is exact
        embedded = embed(encoder, torch.randn(4, 3, 32, 32, dtype=torch.float64))
        torch.manual_seed(0)
        mean = torch.stack([run_blocks_on_part(encoder, embedded, 0.5) for _ in range(600)]).mean(0)
        change = run_blocks(encoder, embedded)[0] - embedded.x
    assert float((mean - embedded.x - change).norm() / change.norm()) < 0.1


def test_recomputing_activations_changes_nothing():
    encoder = create_encoder("vit_tiny_patch16_224", **SMALL)
    images, gradients = torch.randn(4, 3, 32, 32), []
    for recompute in (False, True):
        encoder.set_grad_checkpointing(recompute)
        encoder.zero_grad()
        torch.manual_seed(3)
        run_blocks_on_part(encoder, embed(encoder, images), 0.4).square().sum().backward()
        gradients.append(encoder.blocks[0].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_rate_is_the_same_in_all_blocks_and_can_be_taken_away():
    encoder = create_encoder("vit_tiny_patch16_224", drop_path=0.1, **SMALL)
    set_drop_path(encoder, 0.3)
    assert [block.drop_path1.drop_prob for block in encoder.blocks] == [0.3, 0.3]
    set_drop_path(encoder, 0.0)
    assert not any(isinstance(module, DropPath) for module in encoder.modules())


def test_blocks_of_another_kind_are_known_as_such():
    assert all(can_run_on_part(create_encoder(name, **SMALL)) for name in FAMILIES)
    shape = {name: value for name, value in SMALL.items() if name != "init_values"}
    assert not can_run_on_part(create_encoder("vit_base_patch16_rpn_224", **shape))  # norms after the branches
