"""What the engine carries without knowing it: two optimisers, two towers, tasks in turn, points, and attachments.

Each method here is what one would write for a system of that shape, and no more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from patchloom.data import EvalTransform, open_source
from patchloom.data.base import Source
from patchloom.data.clip_views import ClipView
from patchloom.data.kinds import KINDS
from patchloom.data.reading import remembered
from patchloom.data.sample import Sample, WithNamed
from patchloom.data.subset import SubsetSource
from patchloom.encoders import normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import load
from patchloom.training.attachment import Attachment
from patchloom.training.config import TrainConfig
from patchloom.training.failure import NonFiniteLossError
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics, series
from patchloom.training.options import AverageOptions
from patchloom.training.phases import Phase, Stage
from patchloom.training.run import fit

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "encoder": "vit_micro_patch4_32",
    "image_size": 16,
    "batch_size": 8,
    "max_steps": 6,
    "lr": 1e-2,
    "warmup_epochs": 0,
    "clip_grad": 1.0,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


@dataclass(frozen=True, kw_only=True)
class Settings(AverageOptions, TrainConfig):
    """Those of every run, and a moving average."""


def run(out: Path, method: type[Method], **changes: Any):
    options = {name: changes.pop(name) for name in ("source", "attach") if name in changes}
    return fit("pretrain test", method, Settings(out=str(out), **{**SETTINGS, **changes}), **options)


def weights(found) -> dict[str, torch.Tensor]:
    return load_file(found.model / "model.safetensors")


def cut_off(method: type[Method], at: int) -> pytest.MonkeyPatch:
    """Let a run end as by a kill in its batch number `at`."""
    patch, original, count = pytest.MonkeyPatch(), method.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == at:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    patch.setattr(method, "training_step", failing)
    return patch


def resumed_equals_once(tmp_path: Path, method: type[Method], at: int, **settings: Any) -> None:
    once = weights(run(tmp_path / "once", method, **settings))
    patch = cut_off(method, at)
    with pytest.raises(RuntimeError, match="cut off"):
        run(tmp_path / "two", method, **settings)
    patch.undo()
    twice = weights(run(tmp_path / "two", method, **settings, resume=True))
    assert all(torch.equal(once[name], twice[name]) for name in once)


class Whole(Method):
    """What the methods below share: images as they are."""

    def transform(self):
        return EvalTransform(self.input_size)


# Two optimisers.


class Adversarial(Whole):
    """An encoder paints images that a critic cannot tell from real ones."""

    learning: ClassVar[list[tuple[str, list[str]]]] = []

    def __init__(self, config, source):
        super().__init__(config, source)
        self.decoder = nn.Linear(self.encoder.embed_dim, 3 * 16 * 16)
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1))

    def phases(self):
        return [
            Phase("painter", ("encoder", "decoder"), self.painter_loss),
            Phase("critic", ("critic",), self.critic_loss, rates=lambda step: (1e-3, 0.0), every=2),
        ]

    def painted(self, batch):
        images = self.pixels(batch["image"])
        return images, self.decoder(self.encoder(normalize(images, self.encoder))).view_as(images)

    def painter_loss(self, batch):
        self.note("painter")
        images, painted = self.painted(batch)
        pixel = F.mse_loss(painted, images)
        return {"loss": pixel + 0.1 * F.softplus(-self.critic(painted)).mean(), "pixel": pixel}

    def critic_loss(self, batch):
        self.note("critic")
        images, painted = self.painted(batch)
        return {"loss": (F.softplus(-self.critic(images)) + F.softplus(self.critic(painted.detach()))).mean()}

    def training_loss(self, batch):
        return self.painter_loss(batch)

    def note(self, phase):
        parts = sorted({name.split(".")[0] for name, p in self.named_parameters() if p.requires_grad})
        self.learning.append((phase, parts))


def test_two_optimisers_take_turns_within_a_step(tmp_path):
    Adversarial.learning.clear()
    found = run(tmp_path / "gan", Adversarial)
    alternating = [("painter", ["decoder", "encoder"]), ("critic", ["critic"]), ("painter", ["decoder", "encoder"])]
    assert Adversarial.learning == alternating * 3  # the critic learns in every second step
    assert found.summary["steps"] == found.summary["total_steps"] == 6
    rows = read_metrics(tmp_path / "gan" / "metrics.csv")
    assert series(rows, "painter_pixel")[0] == [0, 1, 2, 3, 4, 5]
    assert series(rows, "critic_loss")[0] == [0, 2, 4]
    assert series(rows, "critic_lr")[1] == [1e-3] * 3
    assert series(rows, "painter_lr")[1][0] == pytest.approx(1e-2)
    assert series(rows, "painter_lr")[1][-1] < 1e-3


def test_a_run_of_two_optimisers_resumes_to_the_bit(tmp_path):
    resumed_equals_once(tmp_path, Adversarial, 8, accumulate=2, max_steps=5)


def test_accumulated_batches_of_two_optimisers_give_the_step_of_one_batch(tmp_path):
    whole = weights(run(tmp_path / "whole", Adversarial, batch_size=16, max_steps=2))
    parts = weights(run(tmp_path / "parts", Adversarial, batch_size=8, accumulate=2, max_steps=2))
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=0, atol=2e-4)


def test_a_phase_whose_loss_is_not_finite_is_refused_before_its_step(tmp_path):
    class Broken(Adversarial):
        def critic_loss(self, batch):
            return {"loss": super().critic_loss(batch)["loss"] * float("nan")}

    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 0"):
        run(tmp_path / "nan", Broken)


# Two towers, and samples with text.


class Captioned(Source):
    """Digits with their names as letters."""

    def __init__(self):
        self.images = open_source("digits")
        self.name = "captioned digits"

    def __len__(self):
        return len(self.images)

    def read(self, index):
        found = self.images.read(index)
        return Sample(found.image, found.label, found.key, {"text": torch.tensor([found.label, found.label * 2])})

    def key(self, index):
        return self.images.key(index)

    def fingerprint(self):
        return self.images.fingerprint()


class Contrast(Method):
    """Images and their captions, each in its tower, meet in one space."""

    def __init__(self, config, source):
        super().__init__(config, source)
        self.text = nn.EmbeddingBag(20, self.encoder.embed_dim)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def transform(self):
        return WithNamed(EvalTransform(self.input_size), "text")

    def training_loss(self, batch):
        images = F.normalize(self.encoder(normalize(self.pixels(batch["image"]), self.encoder)), dim=1)
        logits = self.scale.exp() * images @ F.normalize(self.text(batch["text"]), dim=1).T
        truth = torch.arange(len(logits))
        return {"loss": (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_two_towers_learn_from_images_and_text(tmp_path, workers):
    found = run(tmp_path / "clip", Contrast, source=Captioned(), max_steps=30, num_workers=workers)
    losses = series(read_metrics(tmp_path / "clip" / "metrics.csv"), "loss")[1]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert "Nearest neighbours" in found.report.read_text()  # captions or not, they are images


# Tasks in turn.


class Tasks(Whole):
    """Classes come in tasks, each with a head of its own; old heads stand still."""

    def stages(self):
        self.tasks = [np.flatnonzero(self.source.labels // 4 == task) for task in range(2)]
        return [Stage(f"task {n}", SubsetSource(self.source, task[:24]), 2) for n, task in enumerate(self.tasks)]

    def enter_stage(self, number):
        if not hasattr(self, "heads"):
            self.heads = nn.ModuleList()
        self.heads.requires_grad_(False)
        torch.manual_seed(number)
        self.heads.append(nn.Linear(self.encoder.embed_dim, 4))

    def training_loss(self, batch):
        features = self.encoder(normalize(self.pixels(batch["image"]), self.encoder))
        return {"loss": F.cross_entropy(self.heads[-1](features), batch["label"] - 4 * self.stage)}

    def summary(self):
        return {"heads": [float(head.weight.detach().abs().sum()) for head in self.heads]}


def test_tasks_follow_one_another_with_a_schedule_each(tmp_path):
    found = run(tmp_path / "tasks", Tasks, max_steps=None)
    assert found.summary["steps"] == 12  # 24 images, two epochs of three batches, two tasks
    assert len(found.summary["heads"]) == 2
    rates = series(read_metrics(tmp_path / "tasks" / "metrics.csv"), "lr")[1]
    assert rates[:6] == rates[6:]
    assert rates[0] == pytest.approx(1e-2)
    assert series(read_metrics(tmp_path / "tasks" / "metrics.csv"), "epoch")[1][-1] == 4


@pytest.mark.parametrize("at", [7, *(pytest.param(at, marks=pytest.mark.slow) for at in (5, 9))])
def test_a_run_of_tasks_resumes_to_the_bit_before_at_and_after_the_turn(tmp_path, at):
    resumed_equals_once(tmp_path, Tasks, at, max_steps=None)


TWO = """
import sys
sys.path[:0] = {paths!r}
from test_composition import SETTINGS, TWICE, TrainConfig, fit
method, changes = TWICE[sys.argv[1]]
two = {{**SETTINGS, **changes, "devices": 2, "batch_size": 4}}
if __name__ == "__main__":
    fit("pretrain test", method, TrainConfig(out=sys.argv[2], **two))
"""
TWICE: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "two optimisers": (Adversarial, {"max_steps": 4, "lr": 1e-4}),
    "tasks": (Tasks, {"max_steps": None, "lr": 1e-4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWICE)
def test_two_processes_train_what_one_does_with_the_same_global_batch(tmp_path, name):
    here = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(TWO.format(paths=[str(here), str(here.parent)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, script, name, tmp_path / "two"], check=True, env=environment, timeout=300)
    method, changes = TWICE[name]
    run(tmp_path / "one", method, **changes)
    one, two = (series(read_metrics(tmp_path / out / "metrics.csv"), "loss") for out in ("one", "two"))
    assert one[0] == two[0]
    assert two[1] == pytest.approx(one[1], rel=1e-3)


# Batches that are no images.


class Clouds(Source):
    """Points on spheres and in cubes."""

    name, kind, class_names = "clouds", KINDS["points"], ["sphere", "cube"]

    def __init__(self):
        self.labels = np.arange(64) % 2

    def __len__(self):
        return 64

    def read(self, index):
        points = torch.randn(32, 3, generator=torch.Generator().manual_seed(index))
        label = int(self.labels[index])
        return Sample(F.normalize(points, dim=1) if label == 0 else points.clamp(-1, 1), label, self.key(index))

    def key(self, index):
        return f"cloud {index}"

    def fingerprint(self):
        return "clouds"


class PointClassifier(Method):
    """Points as the tokens of a ViT."""

    kinds = ("points",)

    def __init__(self, config, source):
        super().__init__(config, source)
        self.embed, self.head = nn.Linear(3, self.encoder.embed_dim), nn.Linear(self.encoder.embed_dim, 2)

    def transform(self):
        return as_points

    def training_loss(self, batch):
        tokens = self.encoder.norm(self.encoder.blocks(self.embed(batch["points"])))
        return {"loss": F.cross_entropy(self.head(tokens.mean(1)), batch["label"])}


def as_points(points, generator):
    return {"points": points}


def test_clouds_of_points_train_and_nothing_asks_them_for_pictures(tmp_path):
    found = run(tmp_path / "points", PointClassifier, source=Clouds(), data="clouds", max_steps=40, lr=1e-3)
    losses = series(read_metrics(tmp_path / "points" / "metrics.csv"), "loss")[1]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert "rankme" not in found.summary
    report = found.report.read_text()
    assert "A few of the clouds of points that were trained on." in report
    assert "cloud 0" in report


class Motion(Method):
    """Which way does it go?"""

    kinds = ("clip",)

    def __init__(self, config, source):
        super().__init__(config, source)
        self.head = nn.Linear(self.encoder.embed_dim, len(source.class_names))

    def transform(self):
        return ClipView("crop", 16)

    def training_loss(self, batch):
        features = self.encoder(normalize(self.pixels(batch["clip"]), self.encoder))
        return {"loss": F.cross_entropy(self.head(features), batch["label"])}


def moving(tmp_path, frames):
    """Return the settings of a run on squares that go right or left."""
    for name, step in (("right", 2), ("left", -2)):
        for video in range(12):
            folder = tmp_path / "videos" / name / str(video)
            folder.mkdir(parents=True)
            for frame in range(frames):
                picture = np.full((16, 16, 3), 30, np.uint8)
                left = 6 + step * frame % 6
                picture[2 + video // 2 : 8 + video // 2, left : left + 4] = 220
                Image.fromarray(picture).save(folder / f"{frame}.png")
    settings = {"data": f"clips:{tmp_path}/videos", "encoder": "videomae_tiny_patch16_224", "image_size": 16}
    return settings | {"clip_frames": 2, "clip_stride": 1, "max_steps": 2}


def test_clips_train_and_are_probed_and_drawn_like_images(tmp_path):
    found = run(tmp_path / "run", Motion, **moving(tmp_path, 2), probe_every=1)
    assert found.summary["data"]["kind"] == "clip"
    assert found.summary["knn_accuracy"] >= 0
    report = found.report.read_text()
    assert "What is seen is the middle of each clip." in report
    assert "Left, a held-out clip" in report
    assert remembered(load(found.model))["clip_stride"] == 1


@pytest.mark.slow
def test_a_run_on_windows_of_videos_resumes_to_the_bit(tmp_path):
    resumed_equals_once(tmp_path, Motion, 5, **moving(tmp_path, 9) | {"max_steps": 6})


def test_a_source_of_another_kind_is_refused_with_both_kinds_and_what_takes_it(tmp_path):
    with pytest.raises(
        UsageError, match="clouds holds clouds of points, and pretrain test takes images; align vit_lens"
    ):
        run(tmp_path / "images", Contrast, source=Clouds(), data="clouds")
    with pytest.raises(UsageError, match="digits holds images, and pretrain test takes clouds of points; pretrain cc"):
        run(tmp_path / "points", PointClassifier, max_steps=1)
    assert not list(tmp_path.iterdir())


# What attaches from outside.


class Frozen(Attachment):
    """Keeps the patch embedding as it is, and counts the steps."""

    def __init__(self):
        self.steps = []

    def attach(self, method):
        method.encoder.patch_embed.requires_grad_(False)

    def after_step(self, method):
        self.steps.append(method.step)


def test_an_attachment_of_ones_own_rides_on_any_run(tmp_path):
    attachment = Frozen()
    trained = weights(run(tmp_path / "a", Adversarial, attach=[attachment]))
    assert attachment.steps == [0, 1, 2, 3, 4, 5]
    torch.manual_seed(0)
    fresh = Adversarial(TrainConfig(out="unused", **SETTINGS), open_source("digits")).encoder.state_dict()
    assert torch.equal(trained["patch_embed.proj.weight"], fresh["patch_embed.proj.weight"])
    assert not torch.equal(trained["norm.weight"], fresh["norm.weight"])


def test_a_moving_average_is_shipped_of_a_method_of_two_optimisers(tmp_path):
    plain = weights(run(tmp_path / "plain", Adversarial))
    averaged = weights(run(tmp_path / "averaged", Adversarial, ema=0.99))
    torch.manual_seed(0)
    fresh = Adversarial(TrainConfig(out="unused", **SETTINGS), open_source("digits")).encoder.state_dict()
    moved = {name: (plain[name] - fresh[name]).norm() for name in plain}
    assert all((averaged[name] - fresh[name]).norm() < 0.2 * moved[name] for name in plain if moved[name] > 0)
