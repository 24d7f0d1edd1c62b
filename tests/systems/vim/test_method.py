"""Training VIM on tokens of either sort, drawing images, and measuring what its blocks know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import patchloom as pl
from patchloom.cli import main
from patchloom.errors import UsageError
from patchloom.evaluate.generation import probe_blocks
from patchloom.systems.vim.commands import sample_images
from patchloom.systems.vim.method import VIMMethod
from patchloom.systems.vit_vqgan.model import SIZES, ViTVQGAN
from patchloom.systems.vit_vqgan.saved import LearnedTokenizer
from patchloom.tokenizers import CentroidTokenizer
from patchloom.training.metrics import read_metrics, series

SMALL: dict[str, Any] = {
    "data": "digits",
    "encoder": "vim_nano",
    "batch_size": 8,
    "max_steps": 5,
    "warmup_epochs": 0,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "val_images": 8,
    "samples": 3,
    "report": False,
    "precision": "32-true",
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def centroids(tmp_path_factory) -> str:
    tokenizer = CentroidTokenizer(torch.rand(10, 48, generator=torch.Generator().manual_seed(0)), 4)
    tokenizer.facts = {"image_size": 8}
    return str(tokenizer.save(tmp_path_factory.mktemp("book") / "codebook.safetensors"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = LearnedTokenizer(ViTVQGAN(8, 4, SIZES["vit_vqgan_nano"], num_codes=10, code_dim=4))
    return str(tokenizer.save(tmp_path_factory.mktemp("learned") / "model"))


def train(out: Path, tokenizer: str, **settings: Any):
    return pl.generate("vim", out=out, tokenizer=tokenizer, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory, centroids):
    return train(tmp_path_factory.mktemp("vim") / "run", centroids, report=True)


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory, learned):
    return train(tmp_path_factory.mktemp("vim") / "run", learned, conditional=True, report=True)


def test_either_tokenizer_is_modelled_and_kept_in_the_run(run, of_classes, learned, centroids):
    for made, tokenizer in ((run, centroids), (of_classes, learned)):
        fingerprint = pl.load_tokenizer(tokenizer).fingerprint()
        assert made.summary["tokenizer_fingerprint"] == fingerprint
        assert pl.load_tokenizer(made.path).fingerprint() == fingerprint
        assert pl.load_tokenizer(made.model).fingerprint() == fingerprint
        model = pl.load(made.path)
        images = model.sample(2, seed=1)
        assert images.shape == (2, 3, 8, 8)
        assert torch.equal(images, pl.load(made.model).sample(2, seed=1))
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert {"held_out_cross_entropy", "frequency_cross_entropy"} <= set(made.summary)
    assert of_classes.summary["classes"] == 10


def test_the_report_shows_images_drawn(run, of_classes):
    for made in (run, of_classes):
        page = made.report.read_text()
        for words in ("Images drawn", "through the tokenizer", "How well tokens are foretold"):
            assert words in page


def test_the_tokenizer_stands_still_and_is_not_in_checkpoints(of_classes, learned):
    checkpoint = torch.load(of_classes.path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(name.startswith("tokenizer.") for name in checkpoint["state_dict"])
    one = load_file(Path(learned) / "tokenizer.safetensors")
    two = load_file(of_classes.model / "tokenizer" / "tokenizer.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weight_decay_is_on_linear_layers_alone(run):
    named = pl.load(run.path).transformer.named_parameters()
    decayed = {name for name, p in named if VIMMethod.decays(None, name, p)}  # type: ignore[arg-type]
    assert "head.weight" in decayed
    assert "blocks.0.attn.query.weight" in decayed
    assert not any("embed" in name or "pos" in name or "norm" in name or "bias" in name for name in decayed)


def test_it_learns(tmp_path, centroids):
    train(tmp_path / "run", centroids, max_steps=40, lr=5e-3, dropout=0.0, samples=0, checkpoint_every=40)
    losses = series(read_metrics(tmp_path / "run" / "metrics.csv"), "loss")[1]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_run_resumes_to_the_bit_even_where_the_tokenizer_is_gone(tmp_path, learned):
    moved = tmp_path / "tokenizer"
    pl.load_tokenizer(learned).save(moved)
    settings = {"conditional": True, "ema": 0.9, "accumulate": 2, "samples": 0}
    once = load_file(train(tmp_path / "once", str(moved), **settings).model / "vim.safetensors")
    original, count = VIMMethod.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == 6:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VIMMethod, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            train(tmp_path / "two", str(moved), **settings)
    for file in moved.iterdir():
        file.unlink()
    twice = load_file(pl.generate("vim", out=tmp_path / "two", resume=True).model / "vim.safetensors")
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_last_step(tmp_path, centroids):
    words = [f"--{name}={value}" for name, value in {**SMALL, "max_steps": 300, "samples": 0}.items()]
    words += [f"--out={tmp_path / 'run'}", f"--tokenizer={centroids}"]
    process = subprocess.Popen([sys.executable, "-m", "patchloom", "generate", "vim", *words], env=os.environ)
    saved = tmp_path / "run" / "checkpoints" / "previous.ckpt"
    for _ in range(600):
        if saved.exists():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(saved, weights_only=True)["step"]
    assert step >= 1
    assert (
        main(["generate", "vim", "--resume", f"--out={tmp_path / 'run'}", "--log_every=300", "--checkpoint_every=300"])
        == 0
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 300


def test_samples_are_files_a_grid_and_a_distance_named_by_its_features(run, tmp_path):
    asked = {"count": 5, "reference": "digits:test", "top_k": 5, "top_p": 0.9, "temperature": 0.8, "device": "cpu"}
    found = sample_images(str(run.path), str(tmp_path / "s"), **asked, batch_size=2)
    assert Image.open(tmp_path / "s" / "000004.png").size == (8, 8)
    assert Path(found["grid"]).exists()
    assert found["frechet_features"] == "pixels"
    assert found["frechet_distance"] > 0
    assert "fewer than the 192 features" in found["note"]
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["top_k"] == 5
    with pytest.raises(UsageError, match="not an empty folder"):
        sample_images(str(run.path), str(tmp_path / "s"))


def test_the_class_of_each_sample_is_written_down_and_the_grid_has_them_all(of_classes, tmp_path):
    found = sample_images(str(of_classes.path), str(tmp_path / "s"), count=11, device="cpu")
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["classes"] == [*map(str, range(10)), "0"]
    one_row = sample_images(str(of_classes.path), str(tmp_path / "t"), count=8, device="cpu")
    assert Image.open(found["grid"]).height > 1.5 * Image.open(one_row["grid"]).height


def test_images_of_a_class_are_told_by_name_or_number(of_classes, run):
    model = pl.load(of_classes.path)
    assert torch.equal(model.sample(2, "3", seed=4), model.sample(2, 3, seed=4))
    assert model.conditions(12).flatten().tolist() == [*range(10), 0, 1]
    with pytest.raises(UsageError, match="there is no class 'dog' in this model"):
        model.sample(1, "dog")
    with pytest.raises(UsageError, match="images of no class"):
        pl.load(run.path).sample(1, "3")


def test_every_block_is_probed(run, of_classes, tmp_path):
    found = probe_blocks(str(run.path), "digits", "digits:test", str(tmp_path / "p.json"), limit=60, device="cpu")
    assert list(found["accuracy"]) == ["0", "1", "2"]
    assert found["accuracy"][str(found["best"])] == found["best_accuracy"]
    assert found["n"] == 60
    assert json.loads((tmp_path / "p.json").read_text())["best"] == found["best"]
    for arguments, message in (
        ((of_classes.path, "digits", "digits:test"), "a model of no class"),
        ((run.path, "digits", "photos:test"), "other classes"),
    ):
        with pytest.raises(UsageError, match=message):
            probe_blocks(*map(str, arguments), limit=4, device="cpu")
    with pytest.raises(UsageError, match="numbers from 0 to 2"):
        probe_blocks(str(run.path), "digits", "digits:test", layers="3", device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "vim_nanno"}, "did you mean vim_nano"),
        ({"tokenizer": "no/such/place"}, "no codebook at no/such/place"),
        ({"image_size": 10}, "image size 10 is not divisible by patch size 4"),
        ({"top_k": 11}, "top_k is 11; there are 10 tokens"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"strategy": "fsdp"}, "use ddp"),
        ({"init_from": "no/such/run"}, "no/such/run holds no model that makes images"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path, centroids):
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "run", **{"tokenizer": centroids, **settings})
    assert not (tmp_path / "run").exists()


def test_classes_need_labels(tmp_path, centroids):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="conditional=true needs one label an image"):
        train(tmp_path / "run", centroids, data=str(tmp_path), conditional=True)


def test_a_model_whose_tokenizer_was_exchanged_is_refused(run, tmp_path):
    import shutil

    shutil.copytree(run.model, tmp_path / "model")
    CentroidTokenizer(torch.rand(10, 48), 4).save(tmp_path / "model" / "codebook.safetensors", overwrite=True)
    with pytest.raises(UsageError, match="was trained on tokens of"):
        pl.load(tmp_path / "model")
    (tmp_path / "model" / "vim.json").write_text("{")
    with pytest.raises(UsageError, match=r"vim\.json is damaged"):
        pl.load(tmp_path / "model")


def test_fid_needs_weights_that_are_there_and_its_extra(run, tmp_path):
    asked = {"count": 2, "reference": "digits:test", "device": "cpu"}
    with pytest.raises(UsageError, match="no file of Inception weights"):
        sample_images(str(run.path), str(tmp_path / "a"), inception=str(tmp_path / "none.pth"), **asked)
    with pytest.raises(UsageError, match="name them as reference"):
        sample_images(str(run.path), str(tmp_path / "b"), inception="any.pth")


def test_what_takes_an_encoder_says_what_it_is_instead(run, learned):
    for path, words in ((run.path, "makes images"), (learned, "makes tokens")):
        with pytest.raises(UsageError, match=f"holds a model that {words}, and no encoder"):
            pl.evaluate("knn", encoder=str(path), train="digits", test="digits:test")
