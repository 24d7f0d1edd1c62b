"""DeiT-LT as a run: stages, what the teacher is asked, figures of both heads, resuming, and the errors."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_backbone
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.deit_lt.method import DeiTLTConfig, DeiTLTMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics, series
from patchloom.training.supervised import as_classifier

NAMES = ["c0", "c1", "c2", "c3"]
SMALL = {
    "encoder": "deit_micro_distilled_patch4_32",
    "image_size": 16,
    "batch_size": 12,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for name, colour in zip(NAMES, ((200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 40)), strict=True):
        (path / name).mkdir()
        for image in range(40):
            pixels = np.array(colour) + generator.normal(0, 40, (20, 20, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / name / f"{image:02d}.png")
    return str(path)


def bundled(path, names):
    torch.manual_seed(1)
    model = as_classifier(create_backbone("cifar_resnet20", image_size=32), len(names))
    with torch.no_grad():
        model.fc.weight.normal_()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(names)}
    return str(save_bundle(model, path))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return bundled(tmp_path_factory.mktemp("teacher") / "t", NAMES)


def made(data, **settings):
    config = config_from_mapping(DeiTLTConfig, {"data": data, "out": "unused", **SMALL, **settings})
    return DeiTLTMethod(config, open_source(data))


def test_the_defaults_are_the_papers():
    config = DeiTLTConfig(data="digits", out="x", teacher="t")
    assert (config.epochs, config.alpha, config.distillation, config.mixup_late) == (1200, 0.5, "hard", False)
    assert round(config.reweight_from * 1200) == 1100
    assert (config.lr, config.lr_base_batch, config.min_lr, config.weight_decay) == (5e-4, 512, 1e-5, 0.05)
    assert (config.mixup, config.cutmix, config.label_smoothing, config.erasing) == (0.8, 1.0, 0.1, 0.25)
    for preset, epochs, first in (("imagenet_lt", 1400, 1200), ("inaturalist", 1000, 900)):
        config = config_from_mapping(DeiTLTConfig, {"data": "a", "out": "b", "teacher": "t", "preset": preset})
        assert (config.epochs, round(config.reweight_from * epochs), config.mixup_late) == (epochs, first, True)


def test_tokens_and_positions_do_not_decay(folder, teacher):
    method = made(folder, teacher=teacher)
    groups = method.configure_optimizers().param_groups
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    for name in ("cls_token", "dist_token", "pos_embed", "norm.weight", "head.bias"):
        assert not decays[f"encoder.{name}"]
    assert decays["encoder.head_dist.weight"]
    assert not any("teacher" in name for name in decays)
    head, taught = method.encoder.head, method.encoder.head_dist
    for classifier in (head, taught):
        assert 0.015 < float(classifier.weight.detach().std()) < 0.025
        assert float(classifier.bias.detach().abs().max()) == 0.0
    assert not torch.equal(head.weight, taught.weight)


@pytest.mark.parametrize("late", [False, True])
def test_the_teacher_is_asked_about_the_very_input_and_weights_count_late(folder, teacher, late, monkeypatch):
    method = made(folder, teacher=teacher, imbalance=6, teacher_image_size=24, drop_path=0.0).train()
    assert not method.teacher.training
    method.targets.weighing = late
    torch.manual_seed(3)
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 3, 0])
    seen = {}
    original = type(method.teacher).forward
    monkeypatch.setattr(
        type(method.teacher),
        "forward",
        lambda self, x: seen.setdefault("said", original(self, seen.setdefault("x", x))),
    )
    found = method.training_loss({"image": images.clone(), "label": labels})
    if late:  # as they are: nothing is mixed
        inputs, shares = images, F.one_hot(labels, 4).double()
    else:
        generator = torch.Generator().manual_seed(torch.initial_seed())
        inputs, shares = method.mix(images.clone(), labels, generator)
        shares = shares.double()
    expected = F.interpolate(inputs, (24, 24), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(seen["x"], expected)
    tokens = method.encoder.forward_features(inputs)
    z_cls, z_dist = method.encoder.head(tokens[:, 0]).double(), method.encoder.head_dist(tokens[:, 1]).double()
    base = -(shares * z_cls.log_softmax(1)).sum(1).mean()
    t = seen["said"].argmax(1)
    each = -z_dist.log_softmax(1).gather(1, t[:, None])[:, 0]
    counts = method.targets.counts.double()
    effective = 1e-4 / (1 - 0.9999**counts)
    w = (effective * 4 / effective.sum())[t] if late else torch.ones(6).double()
    distill = (w * each).sum() / w.sum()
    torch.testing.assert_close(found["base_loss"].double(), base / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["distill_loss"].double(), distill / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"].double(), (base + distill) / 2, rtol=1e-5, atol=1e-6)
    cosine = F.cosine_similarity(tokens[:, 0], tokens[:, 1], dim=1).mean()
    torch.testing.assert_close(found["feature_cosine"], cosine)


def test_a_teacher_whose_classes_come_in_another_order_is_understood(folder, tmp_path):
    method = made(folder, teacher=bundled(tmp_path / "t", ["c2", "c0", "c3", "c1"]))
    images = torch.randn(3, 3, 16, 16)
    own = method.teacher.model(method.view(images))
    assert torch.equal(method.teacher(method.view(images)), own[:, [1, 3, 0, 2]])


def test_the_teachers_own_normalisation_is_an_option(folder, teacher, capsys):
    method = made(folder, teacher=teacher, encoder="deit_micro_distilled_patch4_32")
    assert "normalised otherwise" not in capsys.readouterr().err
    method.encoder.pretrained_cfg = {**method.encoder.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(method.view(images), images)
    object.__setattr__(method, "config", dataclasses.replace(method.config, renormalize=True))
    known = method.teacher.model.pretrained_cfg
    mean, std = (torch.tensor(known[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(method.view(images), (images - mean) / std, rtol=1e-5, atol=1e-5)


def test_a_pretrained_vit_gives_its_class_token_to_both(folder, teacher, tmp_path):
    vit = create_backbone("vit_micro_patch4_32", image_size=16)
    with torch.no_grad():
        vit.pos_embed.normal_()
        vit.cls_token.normal_()
    save_bundle(vit, tmp_path / "vit")
    with pytest.warns(UserWarning, match="begins as a copy of the class token"):
        student = made(folder, teacher=teacher, init_from=str(tmp_path / "vit")).encoder
    assert torch.equal(student.dist_token, vit.cls_token)
    assert torch.equal(student.pos_embed[:, 1:], vit.pos_embed)
    assert torch.equal(student.pos_embed[:, 0], vit.pos_embed[:, 0])
    assert torch.equal(student.blocks[5].mlp.fc2.weight, vit.blocks[5].mlp.fc2.weight)


def test_figures_are_of_both_heads_and_of_their_mean(folder, teacher):
    method = made(folder, teacher=teacher, test=folder)
    cls, dist = torch.randn(8, 4), torch.randn(8, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    figures = method.measure(torch.cat([cls, dist, torch.full((8, 1), 0.3)], 1), labels)
    for prefix, logits in (("cls_", cls), ("dist_", dist), ("", (cls + dist) / 2)):
        right = (logits.argmax(1) == labels).float()
        assert figures[f"{prefix}accuracy"] == pytest.approx(float(right.mean()))
        tail = method.targets.groups["tail"]
        expected = np.mean([float(right[labels == c].mean()) for c in tail])
        assert figures[f"{prefix}accuracy_tail"] == pytest.approx(expected)
    assert figures["test_feature_cosine"] == pytest.approx(0.3)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_timm_opens_what_it_ships(folder, teacher, tmp_path):
    settings = {
        **SMALL,
        "data": folder,
        "teacher": teacher,
        "imbalance": 6,
        "max_steps": 8,
        "reweight_from": 0.5,
        "accumulate": 2,
        "batch_size": 6,
        "checkpoint_every": 3,
    }
    run = pl.distill("deit_lt", out=str(tmp_path / "once"), **settings)
    summary = json.loads((run.path / "summary.json").read_text())
    for prefix in ("", "cls_", "dist_"):
        assert {f"{prefix}accuracy", f"{prefix}accuracy_head", f"{prefix}accuracy_tail"} <= set(summary)
    assert (summary["second_stage_step"], summary["global_batch"]) == (4, 12)
    assert 0 <= summary["teacher_accuracy"] <= 1
    assert list(summary["class_counts"].values()) == [36, 19, 10, 6]
    assert "Class and distillation heads" in run.report.read_text()
    assert len(series(read_metrics(run.path / "metrics.csv"), "feature_cosine")[1]) == 8
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    images = torch.rand(3, 3, 16, 16)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model(images), (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2)
    assert torch.equal(pl.load(run.path)(images), model(images))
    state = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in state)

    original, count = Method.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == 12:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            pl.distill("deit_lt", out=str(tmp_path / "two"), **settings)
    again = pl.distill("deit_lt", out=str(tmp_path / "two"), resume=True)
    assert again.summary["accuracy"] == summary["accuracy"]
    once, twice = (load_file(found.model / "model.safetensors") for found in (run, again))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"encoder": "vit_micro_patch4_32"}, "has no distillation token"),
        ({"encoder": "resnet10t"}, "has no distillation token"),
        ({"distillation": "soft"}, "cannot be weighted by class"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"reweight_from": 1.0}, "it must be at least 0 and below 1"),
        ({"pool": "avg"}, "reads its own token"),
        ({"weighted_labels": True, "mixup_late": True}, "mixed labels"),
        ({"imbalance": 60}, "leaves the rarest class none of 36 images"),
        ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(folder, teacher, settings, said):
    with pytest.raises(UsageError, match=said):
        made(folder, **{"teacher": teacher, **settings})


def test_teachers_of_other_classes_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="does not know c3"):
        made(folder, teacher=bundled(tmp_path / "three", NAMES[:3]))
    with pytest.raises(UsageError, match="does not know c3"):
        made(folder, teacher=bundled(tmp_path / "dog", [*NAMES[:3], "dog"]))


def test_a_class_without_images_is_named(folder, teacher, tmp_path):
    source = open_source(folder)
    source.labels = np.where(source.labels == 3, 2, source.labels)
    config = DeiTLTConfig(data=folder, out="unused", teacher=teacher, **SMALL)
    with pytest.raises(UsageError, match="no image to learn from shows c3"):
        DeiTLTMethod(config, source)
