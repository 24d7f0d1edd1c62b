"""Plain distillation as a method: its loss, its runs, students of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import read_lineage
from patchloom.systems.logits.method import LogitsConfig, LogitsMethod
from patchloom.training.ewa import experts_of
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
    "lr_base_batch": None,
    "auto_augment": None,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_images(tmp_path_factory.mktemp("data") / "train", 8))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t")


def made(data: str, teacher: str, **settings: Any) -> LogitsMethod:
    config = LogitsConfig(data=data, out="unused", teacher=teacher, **{**SMALL, **settings})
    return LogitsMethod(config, open_source(data))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_that_of_labels_and_teacher(data, teacher, kind):
    method = made(
        data, teacher, kind=kind, alpha=0.3, temperature=2.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0
    ).double()
    method.encoder.eval()
    pixels, labels = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    losses = method.training_loss({"image": normalize(pixels, method.encoder), "label": labels})
    said = method.encoder(normalize(pixels, method.encoder)).log_softmax(1)
    told = method.teacher.model(normalize(pixels, method.teacher.model))
    picked = -said[torch.arange(4), labels].mean()
    if kind == "hard":
        taught = -said[torch.arange(4), told.argmax(1)].mean()
    else:
        logits = method.encoder(normalize(pixels, method.encoder))
        taught = -4 * ((told / 2).softmax(1) * (logits / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses["loss"].double(), 0.7 * picked + 0.3 * taught, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses["teacher_loss"].double(), 0.3 * taught, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("encoder", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_run_ships_the_student_alone(data, teacher, tmp_path, encoder, capsys):
    settings = {**SMALL, "encoder": encoder, "image_size": 32}
    run = pl.distill("logits", **settings, data=data, teacher=teacher, out=str(tmp_path / "run"))
    assert {"teacher_accuracy", "agreement", "accuracy"} <= set(run.summary)
    assert run.summary["notices"] == ["images of 32 pixels are resized to 16 for the teacher"]
    assert capsys.readouterr().err.count("are resized to 16 for the teacher") == 1
    page = run.report.read_text()
    assert "Teacher and student" in page
    assert "are resized to 16 for the teacher" in page
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), pl.load(run.path)(images))
    assert read_lineage(run.path)["teacher"]["path"] == teacher
    state = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("teacher.") for name in state)


def test_a_network_evaluates_and_embeds_like_an_encoder(data, teacher, tmp_path):
    run = pl.distill("logits", **SMALL, data=data, teacher=teacher, out=str(tmp_path / "run"))
    test = str(write_images(tmp_path / "test", 4, seed=1))
    for protocol in ("knn", "linear"):
        found = pl.evaluate(
            protocol, encoder=str(run.path), train=data, test=test, num_workers=0, device="cpu", cache="none"
        )
        assert 0 <= found["score"] <= 1
    out = pl.embed(str(run.path), data=data, out=str(tmp_path / "v.npz"), num_workers=0, device="cpu")
    assert Path(out).exists()
    again = pl.distill(
        "logits", **{**SMALL, "encoder": str(run.path)}, data=data, teacher=str(run.path), out=str(tmp_path / "again")
    )
    assert again.summary["teacher_accuracy"] == pytest.approx(run.summary["accuracy"])


@pytest.mark.parametrize("method", ["logits", "scalekd"])
def test_an_adapter_can_be_the_teacher(data, tmp_path, method):
    encoder = write_teacher(tmp_path / "e", classes=())
    engine = {name: SMALL[name] for name in ("batch_size", "max_steps", "num_workers", "probe_every", "accelerator")}
    adapted = pl.adapt("linear", **engine, data=data, encoder=encoder, out=str(tmp_path / "adapted"))
    run = pl.distill(method, **SMALL, data=data, teacher=str(adapted.path), out=str(tmp_path / "run"))
    assert run.summary["teacher_accuracy"] == pytest.approx(adapted.summary["accuracy"])
    assert "teacher_loss" in run.summary or "loss_kd" in run.summary
    assert read_lineage(run.path)["teacher"]["path"] == str(adapted.path)


def test_experts_teach_nothing_new_to_the_loss_and_are_folded_in_the_bundle(data, teacher, tmp_path):
    settings = {**SMALL, "encoder": teacher, "experts": 2, "share_rate": 0.5}
    run = pl.distill("logits", **settings, data=data, teacher=teacher, out=str(tmp_path / "run"))
    model = pl.load(run.path)
    assert not experts_of(model)
    assert set(load_file(run.model / "model.safetensors")) == set(pl.load(teacher).state_dict())
    with pytest.raises(UsageError, match="a CIFARResNet has none; leave experts out"):
        pl.distill("logits", **{**SMALL, "experts": 2}, data=data, teacher=teacher, out=str(tmp_path / "cnn"))


def test_broken_off_and_resumed_equals_never_broken_off(data, teacher, tmp_path, monkeypatch):
    settings = {**SMALL, "data": data, "teacher": teacher, "max_steps": 4, "checkpoint_every": 1, "ema": 0.9}
    whole = pl.distill("logits", **settings, out=str(tmp_path / "whole"))
    original = LogitsMethod.training_loss

    def broken(self: LogitsMethod, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.step == 2:
            raise RuntimeError("power cut")
        return original(self, batch)

    monkeypatch.setattr(LogitsMethod, "training_loss", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        pl.distill("logits", **settings, out=str(tmp_path / "cut"))
    monkeypatch.setattr(LogitsMethod, "training_loss", original)
    cut = pl.distill("logits", out=str(tmp_path / "cut"), resume=True)
    weights = [load_file(run.model / "model.safetensors") for run in (whole, cut)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kind": "warm"}, "kind"),
        ({"teacher_image_size": 0}, "teacher_image_size is 0"),
        ({"strategy": "fsdp"}, "use strategy=ddp"),
        ({"teacher": "nowhere"}, "there is no teacher 'nowhere'"),
        ({"encoder": "resnet99"}, "unknown encoder 'resnet99'"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(data, teacher, settings, said):
    with pytest.raises(UsageError, match=said):
        made(data, settings.pop("teacher", teacher), **settings)


def test_a_teacher_of_other_classes_is_refused(data, tmp_path):
    other = write_teacher(tmp_path / "t", classes=("cyan", "green", "red"))
    with pytest.raises(UsageError, match="it does not know blue; train a classifier on this data first"):
        made(data, other)
