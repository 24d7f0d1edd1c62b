"""Backbone, schedule and training module."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as lp
import pytest
import torch

from patchloom.encoders import create_encoder, final_norm, intermediate_layers, set_image_size
from patchloom.errors import UsageError
from patchloom.segment import Backbone, FCNHead, LinearHead, Schedule, SegmentationModule, UPerHead, ViTNeck, poly
from patchloom.segment.backbone import choose_layers
from patchloom.segment.schedule import layer_decay_param_groups, one_cycle


def small(name: str = "vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return create_encoder(name, image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, **kwargs).eval()


def test_maps_are_patch_tokens_in_their_places():
    encoder = small()
    images = torch.randn(2, 3, 32, 32)
    maps = Backbone(encoder, (0, -1))(images)
    for found, tokens in zip(maps, intermediate_layers(encoder, images, (0, 2)), strict=True):
        torch.testing.assert_close(found[:, :, 1, 3], tokens.patches[:, 7])
    plain = Backbone(encoder, (-1,), apply_norm=False)(images)[0]
    torch.testing.assert_close(
        final_norm(encoder, plain.flatten(2).transpose(1, 2)), maps[1].flatten(2).transpose(1, 2)
    )


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_other_sizes_are_padded_and_positions_resampled_from_the_trained_ones(name):
    encoder = small(name)
    before = copy.deepcopy(encoder.state_dict())
    backbone = Backbone(encoder)
    images = torch.randn(1, 3, 35, 60)
    found = backbone(images)[0]
    assert found.shape == (1, 32, 5, 8)
    other = set_image_size(copy.deepcopy(encoder), (40, 64))
    padded = torch.zeros(1, 3, 40, 64)
    padded[:, :, 2:37, 2:62] = images
    expected = intermediate_layers(other, padded, (-1,))[0].patches
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)
    backbone(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(backbone(images)[0], found)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_frozen_encoder_stays_in_eval_mode_and_has_no_gradient():
    backbone = Backbone(small(drop_path=0.5))
    backbone.train()
    assert not backbone.encoder.blocks[0].training
    assert not backbone(torch.randn(1, 3, 32, 32))[0].requires_grad
    free = Backbone(small(), frozen=False).train()
    assert free(torch.randn(1, 3, 32, 32))[0].requires_grad
    with pytest.raises(UsageError, match="set its image size"):
        free(torch.randn(1, 3, 64, 64))


def test_blocks_are_chosen_from_the_end_or_evenly():
    assert choose_layers(12, 1) == (11,)
    assert choose_layers(24, 4, "spread") == (5, 11, 17, 23)
    assert choose_layers(5, 2, "spread") == (1, 4)
    with pytest.raises(UsageError, match="4 blocks are asked for and the encoder has 3"):
        choose_layers(3, 4)
    with pytest.raises(UsageError, match="there is no block 3"):
        Backbone(small(), (3,))


def test_rate_is_polynomial_times_the_warm_up():
    assert poly(700, 1000, 2.0, power=0.9, end=0.1) == pytest.approx(1.9 * 0.3**0.9 + 0.1)
    regular = 1e-3 * (1 - 30 / 1000)
    assert poly(30, 1000, 1e-3, warmup=100, warmup_ratio=1e-6) == pytest.approx(regular * (1 - 0.7 * (1 - 1e-6)))
    assert poly(0, 1000, 1e-3, warmup=100) == pytest.approx(1e-9)
    assert poly(1000, 1000, 1e-3) == 0


def test_one_cycle_is_half_a_cosine_times_the_warm_up():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch's own, without its rise, is one step ahead.
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.0, total_steps=100, pct_start=1e-9, anneal_strategy="cos", final_div_factor=1e9
    )
    for step in range(1, 100):
        assert one_cycle(step, 100, 2.0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step(), theirs.step()
    regular = 1.5 * (1 + math.cos(math.pi * 30 / 1000)) / 2
    assert one_cycle(30, 1000, 1.5, warmup=100) == pytest.approx(regular * (1 - 0.7 * (1 - 1e-6)))
    assert one_cycle(0, 1000, 1.5, warmup=100) == pytest.approx(1.5e-6)


def test_layers_learn_at_falling_rates():
    module = SegmentationModule(Backbone(small(), frozen=False), None, LinearHead(32, 3))
    module.backbone.encoder.requires_grad_(True)
    groups = layer_decay_param_groups(module, 0.5, 3)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["head.conv_seg.weight"] == 1
    assert scale["backbone.encoder.norm.weight"] == 1
    assert scale["backbone.encoder.blocks.2.norm1.bias"] == 0.5
    assert scale["backbone.encoder.blocks.0.attn.qkv.weight"] == 0.125
    assert scale["backbone.encoder.pos_embed"] == 0.0625
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    assert decays["head.conv_seg.weight"]
    assert not decays["head.conv_seg.bias"]
    assert not decays["backbone.encoder.pos_embed"]


class Batches:
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            mask = torch.zeros(4, 32, 32, dtype=torch.uint8)
            mask[:, :, 16:] = 1
            image = (mask[:, None] * 200).expand(-1, 3, -1, -1) + torch.randint(
                0, 50, (4, 3, 32, 32), generator=generator, dtype=torch.uint8
            )
            yield {"image": image, "mask": mask}


@pytest.mark.parametrize("loss", ["ce", "dice", "dice+ce"])
def test_training_lowers_the_loss_and_leaves_the_encoder_alone(loss):
    encoder = small()
    before = copy.deepcopy(encoder.state_dict())
    module = SegmentationModule(
        Backbone(encoder, (0, 1, 2, 2), apply_norm=False),
        ViTNeck("beit", 32),
        UPerHead([32] * 4, 2, channels=8),
        FCNHead(32, 2, channels=8),
        Schedule(steps=40, lr=2e-2, warmup=2),
        loss=loss,
    )
    trainer = lp.Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(40))
    assert len(module.losses) == 40
    assert module.losses[-1] < 0.7 * module.losses[0]
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key])


def trained_for(steps, trainer_clip=None, **options):
    """Return the norm of the gradient that the optimiser took, and the learning rate, at every step."""
    norms, rates = [], []

    class Watch(lp.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            norms.append(float(torch.cat(grads).norm()))
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = SegmentationModule(Backbone(small()), None, LinearHead(32, 2), schedule=Schedule(steps=steps, **options))
    lp.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
        gradient_clip_val=trainer_clip,
    ).fit(module, Batches(steps))
    return norms, rates


@pytest.mark.parametrize("where", ["clip_grad", "trainer_clip"])
def test_gradients_are_clipped_to_the_norm_asked_for(where):
    free, _ = trained_for(3, warmup=0)
    clipped, _ = trained_for(3, warmup=0, **{where: 0.01})
    assert min(free) > 0.02
    assert clipped == pytest.approx([0.01] * 3, rel=1e-3)
    # A norm that is small enough is left alone.
    assert trained_for(3, warmup=0, **{where: 100.0})[0] == free


@pytest.mark.parametrize(("decay", "expected"), [("poly", poly), ("one_cycle", one_cycle)])
def test_the_learning_rate_falls_as_asked(decay, expected):
    _, rates = trained_for(10, decay=decay, lr=2e-3, warmup=2)
    assert rates == pytest.approx([expected(step, 10, 2e-3, warmup=2) for step in range(10)])


def test_features_made_beforehand_give_the_same_loss():
    module = SegmentationModule(Backbone(small()), None, LinearHead(32, 2)).eval()
    batch = next(iter(Batches(1)))
    from patchloom.encoders import normalize

    maps = module.backbone(normalize(batch["image"].float() / 255, module.backbone.encoder))
    torch.testing.assert_close(module.training_step({"maps": maps, "mask": batch["mask"]}), module.training_step(batch))


def test_a_loss_that_is_not_finite_stops_the_training():
    module = SegmentationModule(Backbone(small()), None, LinearHead(32, 2))
    with torch.no_grad():
        module.head.conv_seg.bias.fill_(float("nan"))
    with pytest.raises(UsageError, match="lower lr"):
        module.training_step(next(iter(Batches(1))))
