"""ScaleKD as a method: its recipes, its runs with students of every kind, what it says of odd pairs, resumed runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import normalize
from patchloom.errors import UsageError
from patchloom.systems.scalekd.method import ScaleKDConfig, ScaleKDMethod
from patchloom.training.config import config_from_mapping
from small_images import write_images
from small_teachers import write_teacher

SMALL = {
    "encoder": "cifar_resnet20",
    "image_size": 16,
    "batch_size": 6,
    "max_steps": 2,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "accelerator": "cpu",
    "precision": "32-true",
    "lr": 1e-3,
}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "patch_size": 2, "window_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_images(tmp_path_factory.mktemp("data") / "train", 8))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t")


def made(data: str, teacher: str, **settings: Any) -> ScaleKDMethod:
    config = config_from_mapping(
        ScaleKDConfig, {"data": data, "out": "unused", "teacher": teacher, **SMALL, **settings}
    )
    return ScaleKDMethod(config, open_source(data))


def batch(method: ScaleKDMethod, count: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, *method.input_size, generator=generator)
    return {"image": normalize(images, method.encoder), "label": torch.arange(count) % 3, "key": list("abc")}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"loss_s3", "loss_s3_alt", "loss_s4", "loss_s4_alt", "loss_kd"}),
        ({"kd": False}, {"loss_s3", "loss_s3_alt", "loss_s4", "loss_s4_alt"}),
        ({"tpp": False}, {"loss_s4", "loss_s4_alt", "loss_kd"}),
        ({"dfm": False}, {"loss_s3", "loss_s4", "loss_kd"}),
        ({"cap": False, "dfm": False, "kd": False}, {"loss_s4"}),
    ],
)
def test_each_part_can_be_left_out(data, teacher, settings, parts):
    method = made(data, teacher, **settings)
    losses = method.training_loss(batch(method))
    assert set(losses) == {"loss", "ori_loss"} | parts
    torch.testing.assert_close(losses["loss"], sum(losses[name] for name in losses if name != "loss"))
    losses["loss"].backward()
    trained = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    assert all(method.get_parameter(name).grad is not None for name in trained), "processes would wait for these"
    assert not any(name.startswith(("teacher.", "model.teacher.")) for name in trained)


def test_the_labels_have_what_the_teacher_leaves(data, teacher):
    method = made(data, teacher, kd_weight=0.3, label_smoothing=0.1, tpp=False, dfm=False)
    method.encoder.eval()
    given = batch(method)
    losses = method.training_loss(given)
    logits = method.encoder(given["image"])
    shares = torch.nn.functional.one_hot(given["label"], 3) * 0.9 + 0.1 / 3
    torch.testing.assert_close(losses["ori_loss"], -0.7 * (shares * logits.log_softmax(1)).sum(1).mean())
    told = method.teacher(method.teacher.view(given["image"], method.encoder))
    torch.testing.assert_close(losses["loss_kd"], -0.3 * (told.softmax(1) * logits.log_softmax(1)).sum(1).mean())


def test_the_loss_by_class_is_summed_over_classes(data, teacher):
    method = made(data, teacher, loss="bce")
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    target = torch.nn.functional.one_hot(labels, 3)
    expected = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).sum(1).mean()
    torch.testing.assert_close(method.label_loss(logits, labels).double(), expected, atol=1e-6, rtol=1e-6)


def test_a_recomputed_tail_gives_the_same_gradients(data, teacher):
    gradients = []
    for recompute in (False, True):
        method = made(data, teacher, recompute_tail=recompute)
        method.training_loss(batch(method))["loss"].backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_teacher_without_the_classes_teaches_by_its_features(data, tmp_path, capsys):
    headless = made(data, write_teacher(tmp_path / "e", classes=()))
    assert not headless.kd
    assert "loss_kd" not in headless.training_loss(batch(headless))
    assert "has no classifier, so its answers are not learnt" in capsys.readouterr().err
    other = made(data, write_teacher(tmp_path / "o", classes=("cat", "dog")))
    assert not other.kd
    assert "tells other classes apart" in other.notices[0]


def test_the_teachers_answers_are_put_in_the_order_of_the_data(data, tmp_path):
    method = made(data, write_teacher(tmp_path / "t", classes=("red", "blue", "green")))
    images = batch(method)["image"]
    raw = method.teacher.model(method.teacher.view(images, method.encoder))
    torch.testing.assert_close(method.teacher_output(images).logits, raw[:, [1, 2, 0]])


STUDENTS = {
    "resnet10t": {"image_size": 32},
    "mobilenetv3_small_050": {"image_size": 64},
    "convnext_atto": {"image_size": 32},
    "vit": {"image_size": 16},
    "swin": {"image_size": 32},
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_students_of_every_kind_learn_and_are_shipped_alone(data, teacher, tmp_path, kind):
    encoder = kind
    if kind == "vit":
        encoder = write_teacher(tmp_path / "start", classes=(), seed=1)
    elif kind == "swin":
        encoder = write_teacher(
            tmp_path / "start", classes=(), name="swin_tiny_patch4_window7_224", image_size=32, **SWIN
        )
    settings = {**SMALL, **STUDENTS[kind], "encoder": encoder}
    run = pl.distill("scalekd", **settings, data=data, teacher=teacher, out=str(tmp_path / "run"))
    images = torch.rand(2, 3, settings["image_size"], settings["image_size"])
    shipped = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    assert torch.equal(shipped(images), pl.load(run.path)(images))
    assert shipped(images).shape == (2, 3)
    assert {"spatial_distance", "frequency_distance", "teacher_accuracy", "agreement"} <= set(run.summary)
    assert run.summary["kd"]
    page = run.report.read_text()
    assert "Student and teacher features" in page
    assert "Teacher and student" in page
    projector = run.path / "checkpoints" / "last.ckpt"
    state = torch.load(projector, weights_only=True)["state_dict"]
    assert any(name.startswith("model.stage3.0.") for name in state)
    assert not any(name.startswith(("teacher.", "model.teacher.", "model.student.")) for name in state)


def test_a_hierarchical_teacher_and_its_notices(data, tmp_path):
    swin = write_teacher(tmp_path / "s", name="swin_tiny_patch4_window7_224", image_size=32, **SWIN)
    method = made(data, swin)
    assert method.notices == [
        "images of 16 pixels are resized to 32 for the teacher",
        "the student has no maps at a 16th and a 32nd of the image; those at 1/2 and 1/4 are taken",
        "the student's last map of 4x4 meets the teacher's of 8x8 by cross-attention",
    ]
    assert method.training_loss(batch(method))["loss"].isfinite()


def test_broken_off_and_resumed_equals_never_broken_off(data, tmp_path, monkeypatch):
    teacher = write_teacher(tmp_path / "t")
    settings = {**SMALL, "data": data, "teacher": teacher, "max_steps": 4, "checkpoint_every": 1, "ema": 0.9}
    settings |= {"auto_augment": "rand-m7-n2-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.2}
    whole = pl.distill("scalekd", **settings, out=str(tmp_path / "whole"))
    original = ScaleKDMethod.training_loss

    def broken(self: ScaleKDMethod, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.step == 2:
            raise RuntimeError("power cut")
        return original(self, given)

    def start(name: str) -> None:
        monkeypatch.setattr(ScaleKDMethod, "training_loss", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            pl.distill("scalekd", **settings, out=str(tmp_path / name))
        monkeypatch.setattr(ScaleKDMethod, "training_loss", original)

    start("cut")
    cut = pl.distill("scalekd", out=str(tmp_path / "cut"), resume=True)
    weights = [load_file(run.model / "model.safetensors") for run in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [
        torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, cut)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    start("swapped")
    write_teacher(tmp_path / "t", seed=5)
    with pytest.raises(UsageError, match="is another model than the one this run began with"):
        pl.distill("scalekd", out=str(tmp_path / "swapped"), resume=True)


def test_the_recipes_are_the_papers():
    given = {"data": "d", "out": "o", "teacher": "t"}
    plain = config_from_mapping(ScaleKDConfig, given)
    assert (plain.optimizer, plain.lr, plain.momentum, plain.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert plain.lr_drops == (0.3, 0.6, 0.9)
    assert (plain.alpha, plain.kd_weight, plain.softmax_scale) == ((0.08, 0.06), 0.5, 5.0)
    network = config_from_mapping(ScaleKDConfig, {**given, "preset": "advanced_cnn"})
    assert (network.optimizer, network.lr, network.lr_base_batch, network.loss) == ("lamb", 5e-3, 2048, "bce")
    vit = config_from_mapping(ScaleKDConfig, {**given, "preset": "advanced_vit", "epochs": 3})
    assert (vit.optimizer, vit.ema, vit.label_smoothing, vit.epochs) == ("adamw", 0.9999, 0.1, 3)
    assert vit.lr_drops == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": (0.1, -1.0)}, "at least 0"),
        ({"kd_weight": 0.0}, "kd=false for none"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0"),
        ({"tpp_blocks": 3}, "tpp_blocks is 3; it must be 1 to 2"),
        ({"student_stages": (1, 9)}, "this student has levels 0 to 2"),
        ({"num_heads": (3, 3)}, "not divisible by num_heads 3"),
        ({"num_heads": (1,)}, "give 2 values"),
        ({"teacher": "{cnn}"}, "cannot be this teacher; use a ViT, BEiT, EVA or Swin"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(data, teacher, tmp_path, settings, said):
    if settings.get("teacher"):
        settings = {"teacher": write_teacher(tmp_path / "cnn", name="cifar_resnet20")}
    with pytest.raises(UsageError, match=said):
        made(data, settings.pop("teacher", teacher), **settings)


@pytest.mark.slow
def test_two_processes_train_together(data, teacher, tmp_path):
    out = tmp_path / "run"
    options = {**SMALL, "data": data, "teacher": teacher, "out": out, "devices": 2, "max_steps": 2, "batch_size": 3}
    command = [sys.executable, "-m", "patchloom.cli", "distill", "scalekd"]
    done = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in options.items())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert pl.load(out).num_classes == 3
