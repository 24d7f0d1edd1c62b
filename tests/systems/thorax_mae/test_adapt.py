"""The recipe for chest X-rays from images to mean AUROC: its numbers, and a run through both halves."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.data import open_source
from patchloom.data.medical import CHEXPERT
from patchloom.encoders import create_encoder
from patchloom.systems.finetune.method import FinetuneConfig, FinetuneMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.optim import layer_of, parameter_groups
from patchloom.training.supervised import as_classifier

TINY = {"encoder": "test_vit", "image_size": 32, "batch_size": 8, "num_workers": 0, "probe_every": 0} | {
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 deep grey images whose brightness tells the first label; the second is hardly ever certain."""
    root = tmp_path_factory.mktemp("chexpert")
    generator = np.random.default_rng(0)
    for table, count in (("train", 32), ("valid", 16)):
        rows = []
        for number in range(count):
            name = f"{table}/patient{number:05d}/study1/view1_frontal.png"
            (root / name).parent.mkdir(parents=True)
            bright = number % 2
            pixels = generator.normal(12_000 + 30_000 * bright, 2_000, (40, 36)).clip(0, 65_535)
            Image.fromarray(pixels.astype(np.uint16)).save(root / name)
            learnt = table == "train"  # in the other table three labels never vary
            found = [bright, 1 if number == 0 and learnt else -1, 1 if number % 5 == 0 and learnt else ""]
            found += [int(number % 4 == 0), int(number % 3 == 0 and learnt)]
            labels = dict(zip(CHEXPERT, found, strict=True))
            rows.append({"Path": f"CheXpert-v1.0-small/{name}", "Frontal/Lateral": "Frontal", **labels})
        with (root / f"{table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return root


def recipe(**settings: Any) -> FinetuneConfig:
    return config_from_mapping(FinetuneConfig, {"data": "x", "out": "x", "preset": "thorax", **settings})


def test_the_recipe_is_its_papers():
    config = recipe()
    assert (config.epochs, config.warmup_epochs, config.lr, config.lr_base_batch) == (75, 5, 2.5e-4, 256)
    assert (config.min_lr, config.betas, config.weight_decay) == (1e-5, (0.9, 0.999), 0.05)
    assert (config.layer_decay, config.drop_path) == (0.55, 0.2)
    assert config.auto_augment == "rand-m6-mstd0.5-inc1"
    assert (config.mixup, config.cutmix, config.erasing, config.label_smoothing) == (0, 0, 0, 0)
    assert (config.crop_scale, config.pool) == ((0.08, 1.0), "avg")
    assert recipe(drop_path=0.1).drop_path == 0.1


def test_layers_learn_at_the_papers_rates():
    model = as_classifier(create_encoder("vit_tiny_patch16_224"), 14, drop_path=0.2)
    groups = parameter_groups(model, layer_decay=0.55, layer=lambda name: layer_of(name, 12), depth=12)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token"):
        assert math.isclose(scale[name], 4.21e-4, rel_tol=2e-3)
    assert math.isclose(scale["blocks.0.norm1.weight"], 7.66e-4, rel_tol=2e-3)
    assert math.isclose(scale["blocks.11.mlp.fc2.bias"], 0.55)
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1.0
    assert model.pos_embed.requires_grad
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 12), atol=1e-6)


def test_a_fresh_head_knows_nothing(chexpert):
    name = f"chexpert:{chexpert}:train"
    method = FinetuneMethod(recipe(**{**TINY, "data": name, "drop_path": 0.0}), open_source(name))
    assert float(method.encoder.head.weight.detach().std()) < 3e-5
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = method.training_loss({"image": images, "label": torch.randint(0, 2, (4, 5)).float()})["loss"]
    assert math.isclose(float(loss.detach()), math.log(2), abs_tol=1e-3)


@pytest.mark.slow
def test_both_halves_run_from_deep_grey_images_to_mean_auroc(chexpert, tmp_path):
    train, test = f"chexpert:{chexpert}:train:ignore", f"chexpert:{chexpert}:test:ignore"
    pretrained = pl.pretrain(
        "mae", preset="thorax", data=train, out=str(tmp_path / "pretrained"), max_steps=4, mask_ratio=0.5,
        **{**TINY, "decoder_dim": 16, "decoder_heads": 2},
    )  # fmt: skip
    settings = {**TINY, "encoder": str(pretrained.model), "image_size": None}
    run = pl.adapt(
        "finetune", preset="thorax", data=train, test=test, out=str(tmp_path / "tuned"), epochs=15,
        lr=3e-2, auto_augment=None, color_jitter=0.0, crop_scale=(0.5, 1.0), drop_path=0.0, layer_decay=1.0, **settings,
    )  # fmt: skip
    assert run.summary["per_label_auroc"]["Cardiomegaly"] > 0.9  # brightness tells
    assert set(run.summary["per_label_auroc"]) == {"Cardiomegaly", "Atelectasis"}  # the others never vary
    mean = np.mean(list(run.summary["per_label_auroc"].values()))
    assert math.isclose(run.summary["auroc"], mean, rel_tol=1e-6)
    saved = pl.load(run.model)
    assert list(saved.pretrained_cfg["mean"]) == [0.5056] * 3  # from pre-training to fine-tuning to use
    assert list(saved.pretrained_cfg["label_names"]) == list(CHEXPERT)
