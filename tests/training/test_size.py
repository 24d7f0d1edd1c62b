"""Settings that fit the number of images, and a plain word where there is too little."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import patchloom as pl
from patchloom.data.base import Sample
from patchloom.data.subset import MemorySource
from patchloom.io import read_config
from patchloom.systems.finetune.config import FinetuneConfig
from patchloom.training.config import TrainConfig
from patchloom.training.labelled import LabelledMethod
from patchloom.training.size import advice, batch_for, fit_to_data, steps_per_epoch

BASICS = {"data": "x", "out": "y"}


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 1), (5, 5), (20, 8), (64, 8), (216, 16), (600, 64), (1023, 64), (1024, 128), (10**6, 128)]
)
def test_the_recipes_batch_is_kept_where_an_epoch_has_eight_steps(images, batch):
    assert batch_for(images, TrainConfig(**BASICS)) == batch


def test_processes_and_accumulation_share_the_images():
    assert batch_for(1024, TrainConfig(**BASICS, devices=2, accumulate=2)) == 32
    assert steps_per_epoch(1024, TrainConfig(**BASICS, devices=2, accumulate=2, batch_size=32)) == 8


def test_what_was_left_open_is_settled_and_said(capsys):
    settled = fit_to_data(FinetuneConfig(**BASICS, test="t"), 216, ["data", "out", "test"])
    assert (settled.batch_size, settled.epochs) == (16, 100)
    assert "settings for 216 images: batch_size 16 in place of 128 (13 steps an epoch)" in capsys.readouterr().err
    assert fit_to_data(TrainConfig(**BASICS), 3, []).epochs == 500


def test_what_was_chosen_and_what_is_enough_stay(capsys):
    config = TrainConfig(**BASICS)
    assert fit_to_data(config, 216, ["batch_size", "epochs"]) is config
    assert fit_to_data(config, 10**6, []) is config
    assert fit_to_data(config, None, []) is config
    assert fit_to_data(TrainConfig(**BASICS, max_steps=2), 216, ["max_steps"]).epochs == config.epochs
    assert "16" in capsys.readouterr().err


def test_the_images_left_after_the_held_out_part_and_the_label_budget_count():
    source = images(100, 8)
    counted = LabelledMethod.images_to_learn_from
    assert counted(FinetuneConfig(**BASICS), source) == 90
    assert counted(FinetuneConfig(**BASICS, test="t", label_fraction=0.1), source) == 10
    assert counted(FinetuneConfig(**BASICS, shots=3), source) == 6


def images(count: int, side: int) -> MemorySource:
    blank = torch.zeros(3, side, side, dtype=torch.uint8)
    return MemorySource("made", [Sample(blank, n % 2, str(n)) for n in range(count)], ["a", "b"])


def said(count: int, side: int, steps: int, **changes: int) -> list[str]:
    config = TrainConfig(**{**BASICS, **changes})
    encoder = SimpleNamespace(pretrained_cfg={"input_size": (3, 64, 64)})
    return advice(SimpleNamespace(config=config, source=images(count, side), total_steps=steps, encoder=encoder))


def test_a_run_that_is_too_short_is_told_what_to_try():
    assert said(216, 64, 2, epochs=2) == [
        "2 steps in all: too few to learn; try --epochs 100 --batch_size 16.",
    ]
    assert said(5000, 64, 1, max_steps=1) == ["1 step in all: too few to learn; try --max_steps 1000."]
    assert said(5000, 64, 5000) == []


def test_one_image_few_images_and_tiny_images_are_said():
    assert said(1, 64, 500) == ["One image is all there is: what is learnt holds for nothing else."]
    assert said(9, 64, 500)[0].startswith("9 images are all there is: too few")
    assert said(500, 3, 500)[0].startswith("The images are about 3 pixels wide or high and are blown up to 64")
    assert said(500, 32, 500) == []


def test_a_run_writes_down_what_was_settled_and_its_advice(tmp_path, capsys):
    settings = {"data": "digits", "encoder": "vit_micro_patch4_32", "max_steps": 2, "num_workers": 0}
    run = pl.adapt(
        "scratch", out=str(tmp_path / "run"), shots=2, accelerator="cpu", probe_every=0, health_every=0, **settings
    )
    written = read_config(run.path / "config.yaml")
    assert written["batch_size"] == 8
    assert written["epochs"] == 300
    assert run.summary["advice"][0] == "2 steps in all: too few to learn; try --max_steps 1000."
    assert "2 steps in all: too few to learn" in run.report.read_text(encoding="utf-8")
    assert "note: 2 steps in all" in capsys.readouterr().err
