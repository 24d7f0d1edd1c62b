"""Batch size and workers left to a trial: what is chosen, said and written down; what is said where memory ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

import patchloom as pl
from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.mae.method import MAEConfig, MAEMethod
from patchloom.terminal.options import read_options
from patchloom.training import trial as module
from patchloom.training.config import TrainConfig, config_from_mapping
from patchloom.training.trial import Tried, choose, is_out_of_memory, repeated, trial, workers
from small_images import write_images

SMALL: dict[str, Any] = {"encoder": "vit_micro_patch4_32", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
SMALL |= {"num_workers": 0, "probe_every": 0, "health_every": 0, "report": False, "accelerator": "cpu", "max_steps": 2}
SMALL |= {"precision": "32-true", "lr_base_batch": 256}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("images") / "train", 16))


def made(images: str, **settings: Any) -> MAEMethod:
    config = config_from_mapping(MAEConfig, {"data": images, "out": "unused", **SMALL, **settings})
    return MAEMethod(config, open_source(images))


def test_the_largest_that_is_as_fast_as_the_fastest_is_chosen():
    tried = [Tried(2, 1.0, 0), Tried(4, 1.0, 0), Tried(8, 1.02, 0), Tried(16, 2.1, 0), Tried(32, 6.0, 0)]
    assert choose(tried).batch_size == 16  # 7.6 images a second, and 7.8 at the best
    assert choose(tried[:2]).batch_size == 4


@pytest.mark.parametrize(
    ("reading", "training", "cores", "wanted"),
    [(0.01, 0.1, 8, 1), (0.1, 0.1, 8, 2), (1.0, 0.1, 8, 7), (1.0, 0.1, 1, 1)],
)
def test_workers_keep_up_and_leave_a_core(reading, training, cores, wanted):
    assert workers(reading, training, cores) == wanted


def test_a_run_under_auto_is_the_run_of_the_number_it_settles(images, tmp_path, capsys):
    run = pl.pretrain("mae", data=images, out=str(tmp_path / "auto"), batch_size="auto", **SMALL)
    said = capsys.readouterr().err
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["batch_size"] in (2, 4, 8)  # 48 images: an epoch of as many steps as there are to be
    assert f"batch_size=auto: {written['batch_size']}, of 2, 4, 8 tried" in said
    assert "learning rate scaled" in said
    by_hand = pl.pretrain("mae", data=images, out=str(tmp_path / "n"), batch_size=written["batch_size"], **SMALL)
    weights = [torch.load(one.path / "checkpoints" / "last.ckpt", weights_only=True) for one in (run, by_hand)]
    assert all(torch.equal(a, b) for a, b in zip(*(w["state_dict"].values() for w in weights), strict=True))
    again = pl.pretrain("mae", data=images, out=str(tmp_path / "auto"), batch_size="auto", resume=True, **SMALL)
    assert again.summary["steps"] == 2
    assert "batch_size" not in capsys.readouterr().err


def test_workers_are_settled_and_said(images, tmp_path, capsys):
    settings = {**SMALL, "num_workers": "auto", "batch_size": 8}
    run = pl.pretrain("mae", data=images, out=str(tmp_path / "r"), **settings)
    settled = yaml.safe_load((run.path / "config.yaml").read_text())
    assert settled["num_workers"] >= 1
    assert settled["batch_size"] == 8
    assert f"num_workers=auto: {settled['num_workers']} (reading an image takes" in capsys.readouterr().err


def test_the_trial_ends_where_memory_does(images, monkeypatch):
    method, sample = made(images), module._sample(made(images))[0]
    loss = method.training_loss

    def limited(batch):
        if len(batch["image"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss(batch)

    monkeypatch.setattr(method, "training_loss", limited)
    assert [one.batch_size for one in trial(method, sample, "32-true")] == [2, 4, 8]
    assert [one.batch_size for one in trial(method, sample, "32-true", most=4)] == [2, 4]
    with pytest.raises(UsageError, match="a batch of 16 does not fit into memory; take a smaller encoder"):
        trial(method, sample, "32-true", fixed=16)
    monkeypatch.setattr(module, "free_memory", lambda device: 0.0)
    assert len(trial(method, sample, "32-true")) == 1
    assert len(trial(method, sample, "32-true", seconds=0.0)) == 1


def test_a_batch_repeats_a_few_images():
    sample = {"image": torch.arange(3.0), "key": ["a", "b", "c"], "skipped": []}
    batch = repeated(sample, 5, torch.device("cpu"))
    assert (batch["image"].tolist(), batch["key"]) == ([0.0, 1.0, 2.0, 0.0, 1.0], ["a", "b", "c", "a", "b"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, said):
    assert is_out_of_memory(error) == said


def test_a_run_that_runs_out_of_memory_says_what_to_change(images, tmp_path, monkeypatch):
    def fails(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(MAEMethod, "training_loss", fails)
    with pytest.raises(UsageError, match="memory ran out with batch_size=8: --batch_size 4 --accumulate 2 makes"):
        pl.pretrain("mae", data=images, out=str(tmp_path / "r"), batch_size=8, **SMALL)
    assert not (tmp_path / "r").exists()


def test_the_word_is_taken_from_command_and_file(tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size: auto\n")
    needed = ["--data", "d", "--out", "o"]
    for given in (["--batch_size", "auto"], ["--config", str(tmp_path / "c.yaml")]):
        values = read_options("pretrain x", "", TrainConfig, [*needed, *given], all_of_them=False)
        config = config_from_mapping(TrainConfig, values)
        assert isinstance(config.batch_size, module.Auto)
        assert config.batch_size == TrainConfig.batch_size
    with pytest.raises(UsageError, match="batch_size"):
        read_options("pretrain x", "", TrainConfig, [*needed, "--batch_size", "most"])


def test_processes_that_start_together_are_refused(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UsageError, match="batch_size=auto is settled by one process, and several start together"):
        pl.pretrain("mae", data=images, out=str(tmp_path / "r"), batch_size="auto", **SMALL)
