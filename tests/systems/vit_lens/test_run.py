"""align vit_lens: towers stay as they are, the sense learns, and the run opens again."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom.errors import UsageError

pytest.importorskip("open_clip")
from patchloom.encoders import create_encoder
from patchloom.models.bundle import save_bundle
from patchloom.systems.clip.model import CLIP, TextTower
from patchloom.systems.clip.saved import save_clip
from patchloom.systems.vit_lens.method import VitLensMethod
from patchloom.training.attachment import Attachment
from patchloom.training.run import fit, resolve

SMALL = {
    "num_groups": 8,
    "group_size": 4,
    "num_points": 64,
    "encoder_dim": 16,
    "token_dim": 16,
    "lens_depth": 1,
    "lens_tokens": 9,
    "batch_size": 4,
    "num_workers": 0,
    "health_every": 0,
    "accelerator": "cpu",
    "warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Towers of random weights on disk, as align clip leaves them."""
    path = tmp_path_factory.mktemp("towers") / "model"
    torch.manual_seed(0)
    trunk = create_encoder("vit_micro_patch4_32", image_size=16)
    model = CLIP(trunk, TextTower(context_length=12, width=16, heads=2, layers=1, output_dim=8))
    save_bundle(trunk, path, lineage={}, overwrite=True)
    save_clip(model, path)
    return path


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("clouds"), np.random.default_rng(0)
    for name, stretch in (("ball", 1), ("rod", 9)):
        (folder / name).mkdir()
        for number in range(6):
            np.save(folder / name / f"{number}.npy", rng.normal(size=(80, 3)) * (1, 1, stretch))
    np.save(folder / "ball" / "broken.npy", np.full((80, 3), np.nan))
    return folder


@pytest.fixture(scope="module")
def run(towers, clouds, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    settings = {**SMALL, "val_fraction": 0.3, "max_steps": 2}
    return pl.align("vit_lens", data=f"points:{clouds}", encoder=towers, out=out, **settings)


def test_a_run_says_what_it_did(run):
    summary = run.summary
    assert summary["aligned_to_images"] is True
    assert summary["unreadable_images"] <= 1
    assert 0 <= summary["accuracy"] <= 1
    assert summary["sense_to_text_r10"] == 1.0
    assert 0 < summary["trained_share"] < 1
    report = run.report.read_text(encoding="utf-8")
    assert "Zero-shot classification" in report
    assert "Found for captions" in report


def test_the_model_opens_again_with_its_towers_as_they_were(run, towers):
    model = pl.load(run.model)
    assert type(model).__name__ == "ViTLens"
    trunk = pl.load(towers).state_dict()
    for name, value in model.visual.vit.state_dict().items():
        if name not in ("pos_embed",) and not name.startswith("patch_embed"):
            assert torch.equal(value, trunk[name])
    points = torch.randn(2, 64, 3)
    with torch.no_grad():
        assert model(points).shape == (2, 8)
        assert torch.equal(model(points), model(points))
    assert json.loads((run.model / "vit_lens.json").read_text())["num_groups"] == 8


def test_a_run_that_is_cut_goes_on_to_the_same_weights(run, towers, clouds, tmp_path):
    """Of two steps the first is done, then the second on its own."""
    settings = {**SMALL, "val_fraction": 0.3, "max_steps": 2, "checkpoint_every": 1, "report": False, "probe_every": 0}

    class Stop(Attachment):
        def after_step(self, method):
            method.trainer.should_stop = True

    config = resolve(
        "align vit_lens",
        VitLensMethod,
        {**settings, "data": f"points:{clouds}", "encoder": str(towers), "out": str(tmp_path / "b")},
    )
    fit("align vit_lens", VitLensMethod, config, attach=[Stop()])
    again = pl.align("vit_lens", out=tmp_path / "b", resume=True)
    found, expected = (load_file(each.model / "vit_lens.safetensors") for each in (again, run))
    assert again.summary["steps"] == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def test_classes_of_clouds_are_named_by_sentences(run, clouds):
    figures = pl.evaluate("zero_shot", encoder=run.model, test=f"points:{clouds}", num_workers=0, batch_size=5)
    assert figures["n"] == 12
    assert [each["file"] for each in figures["skipped"]] == ["ball/broken.npy"]
    assert 0 <= figures["accuracy"] <= 1


def test_towers_that_are_none_are_refused(clouds, tmp_path):
    with pytest.raises(UsageError, match="encoder is not given"):
        pl.align("vit_lens", data=f"points:{clouds}", out=tmp_path / "a", **SMALL)
    with pytest.raises(UsageError, match="no aligned towers"):
        pl.align("vit_lens", data=f"points:{clouds}", encoder="vit_tiny_patch16_224", out=tmp_path / "b", **SMALL)
    with pytest.raises(UsageError, match="num_points is 6, and num_groups and group_size need 8"):
        pl.align("vit_lens", data="shapes", encoder="x", out=tmp_path / "c", **{**SMALL, "num_points": 6})
