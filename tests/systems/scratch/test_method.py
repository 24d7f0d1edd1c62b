"""Training from scratch: ViTs by DeiT's recipe, CNNs by SGD, rare classes by LDAM and sharpness-aware minimisation."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import patchloom as pl
from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.scratch.method import ScratchConfig, ScratchMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics, series

SMALL = {
    "encoder": "vit_micro_patch4_32",
    "image_size": 16,
    "batch_size": 16,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes of 40 pictures, each of a colour of its own."""
    path = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for number, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 40))):
        (path / f"c{number}").mkdir()
        for image in range(40):
            pixels = np.array(colour) + generator.normal(0, 40, (20, 20, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / f"c{number}" / f"{image:02d}.png")
    return str(path)


def made(data, **settings):
    config = config_from_mapping(ScratchConfig, {"data": data, "out": "unused", **SMALL, **settings})
    return ScratchMethod(config, open_source(data))


def test_the_defaults_are_deits():
    config = ScratchConfig(data="digits", out="x")
    assert (config.lr, config.lr_base_batch, config.weight_decay, config.warmup_epochs) == (5e-4, 512, 0.05, 5)
    assert (config.mixup, config.cutmix, config.label_smoothing, config.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (config.drop_path, config.auto_augment, config.repeated_augmentation) == (0.1, "rand-m9-mstd0.5-inc1", 3)
    assert (config.betas, config.pool, config.optimizer, config.epochs) == ((0.9, 0.999), "cls", "adamw", 300)


def test_the_recipe_of_teachers_is_ldam_with_sam():
    config = config_from_mapping(ScratchConfig, {"data": "digits", "out": "x", "preset": "ldam_sam"})
    assert (config.optimizer, config.momentum, config.lr, config.weight_decay) == ("sgd", 0.9, 0.1, 5e-4)
    assert (config.epochs, config.lr_drops, config.lr_drop, config.warmup_epochs) == (200, (0.8, 0.9), 0.01, 5)
    assert (config.loss, config.class_weights, config.reweight_from, config.sam_rho) == ("ldam", "effective", 0.8, 0.05)
    assert (config.ldam_margin, config.ldam_scale, config.crop_padding) == (0.5, 30.0, 4)
    plain = config_from_mapping(ScratchConfig, {"data": "digits", "out": "x", "preset": "cnn", "epochs": 10})
    assert (plain.weight_decay, plain.sam_rho, plain.loss, plain.epochs) == (2e-4, 0.0, "ce", 10)


def test_the_loss_is_ldam_of_the_cosines_and_is_weighted_late(folder):
    method = made(folder, preset="ldam_sam", encoder="vit_micro_patch4_32", imbalance=8)
    counts = method.targets.counts.double()
    assert counts.tolist() == [36, 18, 9, 4]
    method.eval()
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 3])
    features = method.encoder.forward_features(images)[:, 0].double()
    head = method.encoder.head.weight.double()
    cosine = (features @ head.T) / (features.norm(dim=1, keepdim=True) * head.norm(dim=1))
    raw = counts**-0.25
    z = 30 * (cosine - F.one_hot(labels, 4) * 0.5 * raw / raw.max())
    each = z.logsumexp(1) - z.gather(1, labels[:, None])[:, 0]
    effective = (1 - 0.9999) / (1 - 0.9999**counts)
    w = (effective / effective.mean())[labels]
    for late, expected in ((False, each.mean()), (True, (w * each).sum() / w.sum())):
        method.targets.weighing = late
        found = method.training_loss({"image": images.clone(), "label": labels})["loss"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not method.encoder.head.bias.requires_grad


def test_radii_and_weights_change_where_the_second_stage_begins(folder, monkeypatch):
    method = made(folder, preset="ldam_sam", encoder="vit_micro_patch4_32", sam_rho_late=0.7)
    method.total_steps = 10
    for step, expected in ((0, 0.05), (7, 0.05), (8, 0.7), (9, 0.7)):
        method.step = step
        assert method.sharpness() == expected


def test_what_is_shipped_decides_as_the_cosines_do(folder):
    method = made(folder, preset="ldam_sam", encoder="vit_micro_patch4_32").eval()
    with torch.no_grad():
        method.encoder.head.weight.mul_(torch.tensor([[5.0], [0.1], [1.0], [2.0]]))
        images = torch.randn(32, 3, 16, 16)
        features = method.encoder.forward_features(images)[:, 0]
        cosine = F.normalize(features, dim=1) @ F.normalize(method.encoder.head.weight, dim=1).T
        assert torch.equal(method.bundle_model()(images).argmax(1), cosine.argmax(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "ldam"}, "belongs to one class"),
        ({"preset": "ldam_sam", "experts": 4}, "without strategy=fsdp, experts"),
        ({"init_from": "somewhere"}, "draws its weights anew"),
        ({"encoder": "."}, "draws its weights anew"),
        ({"preset": "ldam_sam", "ldam_scale": 0.0}, "ldam_scale is 0.0"),
        ({"sam_rho": -1.0}, "at least 0"),
        ({"sam_rho": 0.1, "precision": "16-mixed"}, "scales them"),
        ({"repeated_augmentation": 0}, "at least 1"),
        ({"crop_padding": -1}, "at least 0"),
        ({"imbalance": 1000}, "leaves the rarest class none of 36 images"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(folder, settings, said):
    with pytest.raises(UsageError, match=said):
        made(folder, **settings)


@pytest.mark.slow
def test_a_cnn_learns_rare_classes_and_resumes_to_the_bit(folder, tmp_path):
    settings = {
        **SMALL,
        "data": folder,
        "preset": "ldam_sam",
        "encoder": "cifar_resnet20",
        "imbalance": 6,
        "max_steps": 24,
        "lr": 0.05,
        "warmup_epochs": 0,
        "reweight_from": 0.5,
        "checkpoint_every": 10,
    }
    run = pl.adapt("scratch", out=str(tmp_path / "once"), **settings)
    assert run.summary["accuracy"] > 0.4  # four classes
    assert {"accuracy_head", "accuracy_mid", "accuracy_tail"} <= set(run.summary)
    assert list(run.summary["class_counts"].values()) == [36, 19, 10, 6]
    rows = read_metrics(run.path / "metrics.csv")
    assert len(series(rows, "nearby_loss")[1]) == 24
    assert "training images" in run.report.read_text()
    model = pl.load(run.model)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    assert float(model.fc.bias.detach().abs().max()) == 0.0

    original, count = Method.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == 30:  # the second pass of the fifteenth step, after the second stage began
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            pl.adapt("scratch", out=str(tmp_path / "two"), **settings)
    again = pl.adapt("scratch", out=str(tmp_path / "two"), resume=True)
    once, twice = (load_file(found.model / "model.safetensors") for found in (run, again))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_vit_trains_by_deits_recipe_and_timm_opens_it(folder, tmp_path):
    run = pl.adapt("scratch", data=folder, out=str(tmp_path / "run"), max_steps=3, **SMALL)
    assert run.summary["steps"] == 3
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), pl.load(run.model)(images))
