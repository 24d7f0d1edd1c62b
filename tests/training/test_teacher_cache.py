"""A teacher's answers on disk: found again by content, made anew when weights or images change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import patchloom as pl
from patchloom.data import open_source
from patchloom.data.subset import MemorySource
from patchloom.data.transforms import EvalTransform
from patchloom.encoders import create_backbone, normalize
from patchloom.errors import UsageError
from patchloom.features.cache import list_entries
from patchloom.models.bundle import save_bundle
from patchloom.systems.logits.method import LogitsConfig, LogitsMethod
from patchloom.training import teacher_cache
from patchloom.training.answers_config import refuse_random_views
from patchloom.training.config import config_from_mapping
from patchloom.training.teacher_cache import teacher_answers
from patchloom.training.teachers import FrozenTeacher

QUICK = {"image_size": 16, "num_workers": 0, "batch_size": 4}


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "b" / "broken.png").write_bytes(b"no image")
    return tmp_path / "images"


def silent(teacher):
    def never(*args, **kwargs):
        raise AssertionError("the teacher was asked again")

    teacher.forward = never
    return teacher


def test_the_second_run_asks_nothing_and_gets_the_same(teacher, images, tmp_path):
    source = open_source(str(images))
    first = teacher_answers(teacher, source, cache=tmp_path / "c", **QUICK)
    keys = [source.key(index) for index in (4, 0, 4, 2)]
    view = EvalTransform(16)
    shown = torch.stack([view(source.read(index).image)["image"] for index in (4, 0, 4, 2)])
    with torch.no_grad():
        wanted = teacher(normalize(shown.float() / 255, teacher))
    torch.testing.assert_close(first.of(keys), wanted, rtol=1e-4, atol=1e-5)
    again = teacher_answers(silent(teacher), open_source(str(images)), cache=tmp_path / "c", **QUICK)
    assert torch.equal(again.of(keys), first.of(keys))
    assert list_entries(tmp_path / "c")[0]["images"] == 6


def test_without_a_cache_answers_are_the_same(teacher, images, tmp_path):
    source = open_source(str(images))
    kept = teacher_answers(teacher, source, cache=tmp_path / "c", **QUICK)
    assert torch.equal(teacher_answers(teacher, source, cache="none", **QUICK).rows, kept.rows)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        unkept = teacher_answers(teacher, source, cache=tmp_path / "d" / "file" / "x", **QUICK)
    assert torch.equal(unkept.rows, kept.rows)


def test_a_changed_weight_image_or_size_makes_them_anew(teacher, images, tmp_path, capsys):
    cache = tmp_path / "c"
    first = teacher_answers(teacher, open_source(str(images)), cache=cache, name="cnn", **QUICK)
    with torch.no_grad():
        next(teacher.parameters()).mul_(1.5)
    other = teacher_answers(teacher, open_source(str(images)), cache=cache, name="cnn", **QUICK)
    assert not torch.equal(first.rows, other.rows)
    assert "the weights of cnn changed since features were kept" in capsys.readouterr().err
    Image.fromarray(np.zeros((24, 24, 3), dtype=np.uint8)).save(images / "a" / "0.png")
    changed = teacher_answers(teacher, open_source(str(images)), cache=cache, name="cnn", **QUICK)
    key = open_source(str(images)).key(0)
    assert not torch.equal(changed.of([key]), other.of([key]))
    assert f"{images} changed since features were kept" in capsys.readouterr().err
    teacher_answers(teacher, open_source(str(images)), cache=cache, name="cnn", **{**QUICK, "image_size": 24})
    assert len(list_entries(cache)) == 2


def test_what_cannot_be_kept_is_refused(teacher, images, tmp_path):
    with pytest.raises(UsageError, match=r"with mixup=0\.8, teacher_view=augmented it would see another view every"):
        refuse_random_views({"mixup": 0.8, "cutmix": 0.0, "teacher_view": "augmented"})
    refuse_random_views({"mixup": 0.0, "auto_augment": None})
    source = open_source(str(images))
    answers = teacher_answers(teacher, source, cache="none", **QUICK)
    with pytest.raises(UsageError, match=r"no answer for b/broken\.png.*could not be read"):
        answers.of(["b/broken.png"])
    sample = source.read(0)
    with pytest.raises(UsageError, match="images of twice share names"):
        teacher_answers(teacher, MemorySource("twice", [sample, sample]), cache="none", **QUICK)
    for broken in images.glob("*/[0-9].png"):
        broken.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"no image of .* is readable"):
        teacher_answers(teacher, open_source(str(images)), cache=tmp_path / "c", **QUICK)


SMALL: dict[str, Any] = {
    "encoder": "test_vit",
    "image_size": 32,
    "teacher_image_size": 16,
    "batch_size": 3,
    "max_steps": 2,
    "val_fraction": 0.0,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}
FIXED = {"teacher_view": "fixed", "mixup": 0.0, "cutmix": 0.0}


@pytest.fixture
def bundle(tmp_path) -> str:
    torch.manual_seed(0)
    model = create_backbone("test_resnet", image_size=16)
    model.reset_classifier(2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["b", "a"]}  # another order than the data's
    save_bundle(model, tmp_path / "teacher")
    return str(tmp_path / "teacher")


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def test_runs_with_kept_answers_equal_runs_without_and_start_at_once(bundle, images, tmp_path, monkeypatch):
    (images / "b" / "broken.png").unlink()
    settings = {**SMALL, **FIXED, "data": str(images), "teacher": bundle, "kind": "soft"}
    memory = pl.distill("logits", **settings, out=str(tmp_path / "memory"))
    kept = {**settings, "cache_teacher": True, "cache": str(tmp_path / "c")}
    first = pl.distill("logits", **kept, out=str(tmp_path / "first"))
    monkeypatch.setattr(FrozenTeacher, "forward", lambda *args: pytest.fail("the teacher was asked"))
    monkeypatch.setattr(teacher_cache, "make_loader", lambda *args, **kwargs: pytest.fail("asked again"))
    second = pl.distill("logits", **kept, out=str(tmp_path / "second"))
    for other in (first, second):
        assert all(torch.equal(value, weights(memory)[name]) for name, value in weights(other).items())


def test_kept_answers_are_in_the_order_of_the_classes(bundle, images, tmp_path):
    config = config_from_mapping(
        LogitsConfig, {**SMALL, **FIXED, "data": str(images), "teacher": bundle, "out": "unused"}
    )
    made = LogitsMethod(config, open_source(str(images)))
    source = open_source(str(images))
    made.cached_answers = teacher_answers(made.teacher.model, source, cache="none", **QUICK)
    key = source.key(0)
    raw = made.cached_answers.of([key])
    assert torch.equal(made.answers({"key": [key]}, torch.zeros(1, 3, 32, 32)), raw.flip(1))


@pytest.mark.parametrize("method", ["logits", "g2sd_specific"])
@pytest.mark.parametrize(
    "settings",
    [{"cache_teacher": True}, {"teacher_view": "fixed"}, {**FIXED, "cutmix": 1.0, "cache_teacher": True}],
)
def test_random_views_are_not_kept(method, settings, bundle, images, tmp_path):
    with pytest.raises(UsageError, match="it would see another view every time; set teacher_view=fixed, mixup=0"):
        pl.distill(method, **SMALL, data=str(images), teacher=bundle, out=str(tmp_path / "run"), **settings)
    assert not (tmp_path / "run").exists()


def test_the_second_stage_takes_kept_answers_and_experts(bundle, images, tmp_path):
    (images / "b" / "broken.png").unlink()
    settings = {**SMALL, **FIXED, "data": str(images), "teacher": bundle, "cache_teacher": True, "experts": 2}
    settings |= {"cache": str(tmp_path / "c"), "share_rate": 0.2}
    run = pl.distill("g2sd_specific", **settings, out=str(tmp_path / "run"))
    assert not any("experts" in name for name in weights(run))
    assert list_entries(tmp_path / "c")[0]["images"] == 6
    plain = pl.distill("logits", **settings, out=str(tmp_path / "logits"))
    assert not any("experts" in name for name in weights(plain))
