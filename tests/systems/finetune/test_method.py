"""Fine-tuning: the conversion of an encoder to a classifier, the recipe's groups, a run."""

from __future__ import annotations

import pytest
import timm
import torch

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.finetune.method import FinetuneConfig, FinetuneMethod
from patchloom.training.supervised import as_classifier

SMALL = {
    "data": "digits",
    "encoder": "ccvit_tiny_patch4_32",
    "batch_size": 16,
    "num_workers": 0,
    "probe_every": 0,
    "precision": "32-true",
    "accelerator": "cpu",
}


def randomised(encoder: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return encoder.eval()


def test_every_block_gets_a_copy_of_the_shared_table_and_the_norm_moves_behind_the_pool():
    encoder = randomised(create_encoder("ccvit_tiny_patch4_32", depth=3))
    shared = encoder.rel_pos_bias.relative_position_bias_table
    model = as_classifier(encoder, 7).eval()
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert all(torch.equal(table, shared) for table in tables)
    assert model.rel_pos_bias is None
    assert isinstance(model.norm, torch.nn.Identity)
    assert torch.equal(model.fc_norm.weight, torch.ones(192))
    images = torch.randn(2, 3, 32, 32)
    from patchloom.encoders import embed, run_blocks

    before, _ = run_blocks(encoder, embed(encoder, images))
    after, _ = run_blocks(model, embed(model, images))
    torch.testing.assert_close(before, after)
    pooled = model.fc_norm(after[:, 1:].mean(1))
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("name", ["ccvit_tiny_patch4_32", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_either_pooling_gives_a_classifier_that_keeps_the_weights(name, pool):
    encoder = randomised(create_encoder(name, depth=2))
    model = as_classifier(encoder, 5, pool)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, encoder.blocks[1].mlp.fc1.weight)
    side = encoder.patch_embed.img_size[0]
    assert model(torch.randn(1, 3, side, side)).shape == (1, 5)
    assert model.head.weight.abs().max() < 1e-3


def test_drop_path_reaches_the_classifier():
    config = FinetuneConfig(out="unused", **{**SMALL, "drop_path": 0.3})
    made = FinetuneMethod(config, open_source("digits"))
    assert made.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_learning_rates_fall_by_the_recipe():
    made = FinetuneMethod(FinetuneConfig(out="unused", **SMALL), open_source("digits"))
    optimizer = made.configure_optimizers()
    scale = {name: group["lr_scale"] for group in optimizer.param_groups for name in group["names"]}
    assert scale["encoder.head.weight"] == 1.0
    assert scale["encoder.fc_norm.weight"] == 1.0
    assert scale["encoder.blocks.11.attn.relative_position_bias_table"] == pytest.approx(0.65)
    assert scale["encoder.patch_embed.proj.weight"] == pytest.approx(0.65**13)


def test_images_without_classes_are_refused(tmp_path):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{number}.png")
    with pytest.raises(UsageError, match="needs labels"):
        pl.adapt("finetune", **{**SMALL, "data": str(tmp_path), "out": str(tmp_path / "run")})


@pytest.mark.slow
def test_a_run_learns_and_reports_every_class(tmp_path):
    run = pl.adapt(
        "finetune",
        **{
            **SMALL,
            "test": "digits:test",
            "out": str(tmp_path / "run"),
            "encoder": "ccvit_tiny_patch4_32",
            "image_size": 16,
            "max_steps": 60,
            "lr": 1e-3,
            "lr_base_batch": None,
            "layer_decay": 1.0,
            "auto_augment": None,
            "color_jitter": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
            "erasing": 0.0,
            "drop_path": 0.0,
            "crop_scale": (0.9, 1.0),
            "init_scale": 1.0,
        },
    )
    assert run.summary["accuracy"] > 0.3  # ten classes
    assert len(run.summary["per_class_accuracy"]) == 10
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    assert "Accuracy by class" in run.report.read_text()
