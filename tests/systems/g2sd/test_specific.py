"""G2SD's second stage as a method: its loss, what is shipped, resumed runs, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_backbone, create_encoder, image_size, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.g2sd.specific import specific_loss
from patchloom.systems.g2sd.specific_method import G2SDSpecificConfig, G2SDSpecificMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.distillation import nkd_loss
from patchloom.training.metrics import read_metrics, series
from patchloom.training.teachers import denormalize

SMALL = {
    "data": "digits",
    "encoder": "test_vit",
    "image_size": 32,
    "batch_size": 8,
    "max_steps": 2,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}
CLASSES = [str(number) for number in range(10)]


def classifier(folder: Path, name: str = "test_resnet", classes: list[str] = CLASSES, **settings: Any) -> str:
    """Write a classifier with random weights and return its path."""
    torch.manual_seed(0)
    model = create_backbone(name, image_size=48, **settings)
    model.reset_classifier(len(classes))
    statistics = {"mean": (0.3,) * 3, "std": (0.2,) * 3, "label_names": classes}
    model.pretrained_cfg = {**model.pretrained_cfg, **statistics}
    save_bundle(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return classifier(tmp_path_factory.mktemp("teachers") / "teacher")


def method(teacher: str, **settings: Any) -> G2SDSpecificMethod:
    config = config_from_mapping(G2SDSpecificConfig, {"out": "unused", "teacher": teacher, **SMALL, **settings})
    return G2SDSpecificMethod(config, open_source(config.data))


def a_batch(made: G2SDSpecificMethod) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    return {"image": images, "label": torch.tensor([1, 0, 3, 9]), "key": ["a", "b", "c", "d"]}


def test_the_recipe_is_the_papers():
    config = G2SDSpecificConfig(data="x", out="y", teacher="z")
    assert (config.epochs, config.warmup_epochs, config.layer_decay, config.drop_path) == (200, 5, 0.75, 0.0)
    assert (config.lr, config.lr_base_batch, config.min_lr, config.weight_decay) == (1e-3, 256, 1e-6, 0.05)
    assert (config.mixup, config.cutmix, config.erasing, config.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (config.auto_augment, config.distillation) == ("rand-m9-mstd0.5-inc1", "hard")


@pytest.mark.parametrize("distillation", ["hard", "nkd"])
def test_the_loss_is_that_of_the_paper_on_the_same_mixed_images(teacher, distillation):
    made = method(teacher, distillation=distillation).train()
    torch.manual_seed(5)
    images, labels = made.mixed(a_batch(made))
    assert labels.shape == (4, 10)  # mixed and smoothed
    torch.manual_seed(5)
    loss = made.training_loss(a_batch(made))["loss"]
    own = pl.load(teacher)
    shown = normalize(denormalize(images, made.encoder), own)
    with torch.no_grad():
        answer = own(torch.nn.functional.interpolate(shown, (48, 48), mode="bilinear", antialias=True))
    if distillation == "nkd":
        wanted = nkd_loss(made.encoder(images), answer, labels)
    else:
        wanted = specific_loss(*made.encoder(images), labels, answer)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert made.teacher.training is False


def test_layers_and_decay_are_as_published(teacher):
    made = method(teacher)
    for name in ("encoder.dist_token", "encoder.head.weight", "encoder.head_dist.bias", "encoder.norm.weight"):
        assert made.layer(name) == 7, name  # the last: the learning rate as it is
    assert made.layer("encoder.cls_token") == 0
    parameters = dict(made.named_parameters())
    assert not made.decays("encoder.dist_token", parameters["encoder.dist_token"])
    assert made.decays("encoder.head_dist.weight", parameters["encoder.head_dist.weight"])
    spread = float(parameters["encoder.head.weight"].detach().std())
    assert spread == pytest.approx(2e-5, rel=0.2)


def test_a_run_ships_a_model_that_timm_opens_and_evaluate_measures(teacher, tmp_path):
    student = create_encoder("test_vit", image_size=32)
    save_bundle(student, tmp_path / "student")
    changes = {"encoder": str(tmp_path / "student"), "experts": 2, "share_rate": 0.2}
    run = pl.distill("g2sd_specific", teacher=teacher, out=str(tmp_path / "run"), **{**SMALL, **changes})
    model = pl.load(run.model)
    assert isinstance(model, VisionTransformerDistilled)
    assert not model.pos_embed[:, 1].any()
    assert not any("experts" in name or "teacher" in name for name in load_file(run.model / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    again = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    torch.testing.assert_close(again(images), model(images))
    assert model.pretrained_cfg["label_names"] == CLASSES
    figures = ("label_head_accuracy", "teacher_head_accuracy", "teacher_accuracy", "agreement", "accuracy")
    assert all(0 <= run.summary[name] <= 1 for name in figures)
    assert {"label_loss", "teacher_loss"} <= run.summary.keys()
    report = run.report.read_text(encoding="utf-8")
    assert "Class and distillation heads" in report
    assert "mean of both heads, which is shipped" in report
    score = pl.evaluate("knn", encoder=str(run.model), train="digits", test="digits:test", num_workers=0)
    assert score["n"] == 450
    assert image_size(model) == (32, 32)


@pytest.mark.parametrize("distillation", ["soft", "nkd"])
def test_other_distillations_run_and_ship(teacher, distillation, tmp_path):
    settings = {**SMALL, "max_steps": 1, "distillation": distillation, "temperature": 2.0}
    run = pl.distill("g2sd_specific", teacher=teacher, out=str(tmp_path / "run"), **settings)
    model = pl.load(run.model)
    assert isinstance(model, VisionTransformerDistilled) == (distillation == "soft")
    assert ("label_head_accuracy" in run.summary) == (distillation == "soft")
    assert 0 <= run.summary["agreement"] <= 1


@pytest.mark.slow
def test_broken_off_and_resumed_equals_never_broken_off(teacher, tmp_path, monkeypatch):
    settings = {**SMALL, "teacher": teacher, "max_steps": 4, "checkpoint_every": 1, "drop_path": 0.2, "ema": 0.9}
    whole = pl.distill("g2sd_specific", **settings, out=str(tmp_path / "whole"))
    original = G2SDSpecificMethod.training_loss

    def broken(self: G2SDSpecificMethod, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.step == 2:
            raise RuntimeError("power cut")
        return original(self, batch)

    monkeypatch.setattr(G2SDSpecificMethod, "training_loss", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        pl.distill("g2sd_specific", **settings, out=str(tmp_path / "cut"))
    monkeypatch.setattr(G2SDSpecificMethod, "training_loss", original)
    cut = pl.distill("g2sd_specific", out=str(tmp_path / "cut"), resume=True)
    weights = [load_file(run.model / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    curves = [series(read_metrics(run.path / "metrics.csv"), "loss") for run in (whole, cut)]
    assert curves[0] == curves[1]
    assert len(curves[0][0]) == 4


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    other = classifier(tmp_path / "other", classes=[*CLASSES[:9], "ten"])
    without = create_backbone("test_resnet")
    save_bundle(without, tmp_path / "without")
    for settings, message in (
        ({"teacher": other}, "tells other classes apart than the data's"),
        ({"teacher": str(tmp_path / "without")}, "has no classifier"),
        ({"teacher": "nowhere"}, "there is no teacher 'nowhere'"),
        ({"encoder": "ccvit_tiny_patch8_64"}, "goes into a plain ViT of timm with a class token and without registers"),
        ({"encoder": "test_vit2"}, "goes into a plain ViT of timm with a class token and without registers"),
        ({"encoder": "test_resnet"}, "without registers, and this is a "),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"nkd_alpha": -1.0}, r"nkd_alpha is -1\.0; it must be at least 0"),
        ({"pool": "avg"}, "the class token is read, set pool=cls"),
    ):
        given = {**SMALL, "teacher": teacher, "out": str(tmp_path / "run"), **settings}
        with pytest.raises(UsageError, match=message):
            pl.distill("g2sd_specific", **given)
        assert not (tmp_path / "run").exists()
