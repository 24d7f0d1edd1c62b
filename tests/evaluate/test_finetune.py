"""Training further as an evaluation: the classifier of the run, measured like every probe."""

from __future__ import annotations

import signal

import pytest
import torch

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.models.bundle import save_bundle
from patchloom.systems.finetune.method import FinetuneMethod
from small_images import QUICK, TINY, write_images

SETTINGS = {"max_steps": 6, "batch_size": 12, "auto_augment": None, "probe_every": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {"train": str(write_images(root / "train", 8)), "test": str(write_images(root / "test", 6, seed=1))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    torch.manual_seed(0)
    encoder = create_encoder("ccvit_tiny_patch4_32", image_size=16, **TINY)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("bundles") / "b"))


@pytest.mark.parametrize(
    ("method", "settings"), [("finetune", SETTINGS), ("bitfit", {"max_steps": 3, "batch_size": 12, "probe_every": 0})]
)
def test_the_figures_are_those_of_the_run(method, settings, bundle, data, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said.npz"
    found = pl.evaluate(
        "finetune", method=method, settings=settings, run=str(run), predictions=str(said), encoder=bundle, **data,
        **QUICK,
    )  # fmt: skip
    assert found["n"] == 18
    assert found["train_images"] == 24
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    model = pl.load(str(run / "adapted"))
    source = open_source(data["test"])
    images = torch.stack([source.read(number).image for number in range(18)]) / 255
    with torch.no_grad():
        expected = model(normalize(images, model)).argmax(1)
    predictions = Predictions.load(said)
    assert (torch.from_numpy(predictions.predicted) == expected).all()
    assert found["accuracy"] == pytest.approx(float((expected.numpy() == source.labels).mean()))
    with pytest.raises(UsageError, match="holds a run of another encoder or other settings; choose another run"):
        pl.evaluate("finetune", run=str(run), encoder=bundle, **data, **QUICK)


def test_a_run_that_was_stopped_is_gone_on_with_by_the_same_command(bundle, data, tmp_path, monkeypatch, capsys):
    run = {
        "run": str(tmp_path / "run"),
        "settings": {**SETTINGS, "max_steps": 3, "report": False},
        "encoder": bundle,
        **data,
        **QUICK,
    }
    step = FinetuneMethod.training_loss

    def stopped_in_the_second(method, batch):
        if method.batches_done == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(method, batch)

    monkeypatch.setattr(FinetuneMethod, "training_loss", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        pl.evaluate("finetune", **run)
    assert "stopped at step 2; go on with the same command" in capsys.readouterr().err
    monkeypatch.setattr(FinetuneMethod, "training_loss", step)
    assert pl.evaluate("finetune", **run)["n"] == 18
    assert "going on after step 2" in capsys.readouterr().err
    with pytest.raises(UsageError, match="holds a run of another encoder or other settings"):
        pl.evaluate("finetune", **{**run, "train": data["test"], "test": data["train"]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="is not empty and holds no run of this evaluation"):
        pl.evaluate("finetune", **{**run, "run": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "finetun"}, "unknown adapt method 'finetun'; did you mean finetune"),
        ({"settings": {"data": "x"}}, "settings holds data, which the evaluation sets itself"),
        ({"encoder": "pixels"}, "raw pixels cannot be trained further"),
        ({"view": "whole"}, "training chooses its own views"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, bundle, data):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("finetune", **{"encoder": bundle, **data, **QUICK, **settings})


def test_training_images_are_not_measured_on(bundle, data):
    with pytest.raises(UsageError, match="are the same images"):
        pl.evaluate("finetune", encoder=bundle, train=data["train"], test=data["train"], **QUICK)
