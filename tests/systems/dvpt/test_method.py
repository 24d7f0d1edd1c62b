"""DVPT: the shared bottleneck, the prompts that read, and the published counts."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from encoders.test_insertion import attention_by_hand, scaled
from encoders_for_tests import FAMILIES, pictures, tiny
from patchloom.encoders import embed, num_prefix_tokens
from patchloom.encoders.insertion import insert, merge, plain
from patchloom.errors import UsageError
from patchloom.models.adapters import add_adapters, save_adapter
from patchloom.systems.dvpt.method import GradingTransform
from patchloom.systems.dvpt.model import DVPT, SharedBottleneck, read_by_prompts
from systems.adaptformer.test_method import randomised


def bottleneck_by_hand(one, x):
    hidden = x @ one.down.weight.T + one.down.bias
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return one.gate * (hidden @ one.up.weight.T + one.up.bias)


def test_the_bottleneck_is_its_formula_and_starts_at_nothing():
    fresh = SharedBottleneck(8, 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(fresh.double()(x), torch.zeros_like(x))
    assert fresh.up.weight.abs().min() > 0
    fresh(x).sum().backward()
    assert float(fresh.gate.grad) != 0  # the gate leaves 0 first, and takes the rest along
    one = randomised(SharedBottleneck(8, 3, 6))
    torch.testing.assert_close(one(x), bottleneck_by_hand(one, x))


def test_prompts_read_the_other_tokens():
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    prompts, rest = x[:, :3], x[:, 3:]
    weights = torch.exp(prompts @ rest.transpose(1, 2) / math.sqrt(8))
    read = (weights / weights.sum(-1, keepdim=True)) @ rest
    torch.testing.assert_close(read_by_prompts(x, 3), torch.cat([read, rest], 1))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_features_are_the_formula(kind, dynamic):
    encoder, images = tiny(kind, double=True), pictures(double=True)
    adapter = randomised(DVPT(encoder, 3, 2, share_every=2, dynamic=dynamic, num_classes=4, projection=6))
    start = embed(encoder, images)
    tokens = adapter.prompts + adapter.positions
    if isinstance(getattr(encoder, "norm_pre", None), torch.nn.Module):
        tokens = encoder.norm_pre(tokens)
    x = torch.cat([tokens.expand(2, -1, -1), start.x], 1)
    for number, block in enumerate(encoder.blocks):
        kwargs = start.kwargs_of(number)
        bias = kwargs.get("shared_rel_pos_bias")
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            bias = type(block.attn)._get_rel_pos_bias(block.attn)
        x1 = x + scaled(block, 1, attention_by_hand(block.attn, block.norm1(x), 3, bias, kwargs.get("rope")))
        seen = x1
        if dynamic:
            weights = (x1[:, :3] @ x1[:, 3:].transpose(1, 2) / math.sqrt(32)).softmax(-1)
            seen = torch.cat([weights @ x1[:, 3:], x1[:, 3:]], 1)
        one = adapter.bottlenecks[number // 2]
        x = x1 + scaled(block, 2, block.mlp(block.norm2(x1))) + bottleneck_by_hand(one, seen)
    norm = encoder.fc_norm if isinstance(encoder.norm, torch.nn.Identity) else encoder.norm
    read = norm(x[:, : 3 + min(1, num_prefix_tokens(encoder))]).mean(1) @ adapter.projection.weight.T
    insert(encoder, adapter)
    torch.testing.assert_close(encoder(images), read @ adapter.head.weight.T)
    features = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, read)


def test_as_many_parameters_as_published():
    with torch.device("meta"):
        encoder = timm.create_model("vit_base_patch16_224", num_classes=0)
        shared, apart = DVPT(encoder), DVPT(encoder, share_every=1)
        with_head = DVPT(encoder, num_classes=5, projection=512)
    assert shared.trainable_parameters() == 202_836
    assert sum(p.numel() for p in shared.bottlenecks.parameters()) == 4 * 31_509
    assert apart.trainable_parameters() == 454_908
    assert with_head.trainable_parameters() == 202_836 + 512 * 5
    assert len(DVPT(tiny("vit"), share_every=2).bottlenecks) == 2  # 2 + 1 blocks


def test_a_file_holds_each_shared_bottleneck_once_and_brings_its_normalisation(tmp_path):
    encoder, images = tiny("vit"), pictures()
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    adapter = DVPT(encoder, 3, 2, num_classes=4)
    with torch.no_grad():
        adapter.bottlenecks[0].gate.fill_(0.5)
    insert(encoder, adapter)
    logits = encoder(images)
    file = save_adapter(encoder, tmp_path / "dvpt.safetensors")
    other = add_adapters(tiny("vit"), [file])
    assert torch.equal(other(images), logits)
    assert other.pretrained_cfg["std"] == (1.0,) * 3
    with plain(other):
        torch.testing.assert_close(other(images), tiny("vit")(images))
    with pytest.raises(UsageError, match="DVPT cannot be merged"):
        merge(other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"share_every": 0}, "share_every is 0"),
        ({"pool": "prompts"}, "unknown pool 'prompts'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UsageError, match=said):
        DVPT(tiny("vit"), **options)


def test_the_augmentation_depends_on_the_generator_alone():
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    views = [GradingTransform(24)(image, torch.Generator().manual_seed(seed))["image"] for seed in (1, 1, 2)]
    assert views[0].shape == (3, 24, 24)
    assert views[0].dtype == torch.uint8
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
