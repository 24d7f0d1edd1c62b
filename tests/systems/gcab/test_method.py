"""Tasks in a run: learnt in turn, resumed, measured, shipped, and gone on from a day later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import patchloom as pl
from patchloom.data import EvalTransform, open_source
from patchloom.encoders import normalize, pooled
from patchloom.errors import UsageError
from patchloom.models.merge import merge_to_bundle
from patchloom.systems.gcab.config import GCABConfig
from patchloom.systems.gcab.method import GCABMethod
from patchloom.systems.gcab.saved import load_tasks
from patchloom.training.config import config_from_mapping
from patchloom.training.run import fit

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "test": "digits:test",
    "encoder": "gcab_convit_micro_patch4_32",
    "image_size": 16,
    "class_order": "3,1,0,2,4,5",
    "tasks": 3,
    "shots": 8,
    "epochs": 2,
    "batch_size": 8,
    "lr": 1e-2,
    "lr_base_batch": None,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "checkpoint_every": 1,
    "auto_augment": None,
    "flip": 0.0,
    "accelerator": "cpu",
    "report": False,
}


def run(out: Path, **changes: Any):
    brought = ("encoder", "image_size", "tasks") if "continue_from" in changes else ()  # by the run gone on from
    known = {name: value for name, value in SETTINGS.items() if name not in brought}
    config = config_from_mapping(GCABConfig, {**known, **changes, "out": str(out)})
    return fit("adapt gcab", GCABMethod, config)


def tensors(found) -> dict[str, torch.Tensor]:
    return load_file(found.model / "model.safetensors") | load_file(found.model / "gcab.safetensors")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run(tmp_path_factory.mktemp("gcab") / "three", report=True, epochs=3)


def answers(model, classes: list[str], images: str = "digits:test") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, without the machinery of the run."""
    source = open_source(images)
    numbers = [classes.index(name) if name in classes else -1 for name in source.class_names]
    view, generator = EvalTransform((16, 16)), torch.Generator()
    shown, labels = [], []
    for index in range(len(source)):
        sample = source.read(index)
        if numbers[sample.label] >= 0:
            shown.append(view(sample.image, generator)["image"])
            labels.append(numbers[sample.label])
    with torch.no_grad():
        return model(normalize(torch.stack(shown).float() / 255, model)), torch.tensor(labels)


def test_figures_are_those_of_the_model_that_is_left_behind(three):
    model = pl.load(three.path)
    assert model.class_names == ["3", "1", "0", "2", "4", "5"]
    assert model.task_names == three.summary["tasks"] == [["3", "1"], ["0", "2"], ["4", "5"]]
    assert model.num_classes == 6
    logits, labels = answers(model, model.class_names)
    assert logits.shape == (len(labels), 6)
    right = logits.argmax(1) == labels
    assert three.summary["last_accuracy"] == pytest.approx(float(right.double().mean()))
    row = [float(right[labels // 2 == task].double().mean()) for task in range(3)]
    assert three.summary["accuracy_matrix"][-1] == pytest.approx(row)
    within = torch.stack([logits[n, 2 * (label // 2) :][:2].argmax() for n, label in enumerate(labels.tolist())])
    aware = (within == labels % 2).double()
    assert three.summary["task_aware_last_accuracy"] == pytest.approx(float(aware.mean()))
    assert three.summary["accuracy_matrix"][0][1:] == [None, None]
    matrix = np.array(three.summary["accuracy_matrix"], dtype=float)
    lost = [matrix[0:2, 0].max() - matrix[2, 0], matrix[1, 1] - matrix[2, 1]]
    assert three.summary["forgetting"] == pytest.approx(float(np.mean(lost)))
    assert three.summary["average_incremental_accuracy"] == pytest.approx(
        np.mean(three.summary["accuracy_by_task"]), abs=1e-9
    )
    assert sorted(three.summary["free"], reverse=True) == three.summary["free"]


def test_a_task_may_be_of_one_class_in_a_folder_of_its_own(three, tmp_path, capsys):
    source = open_source("digits")
    for folder, numbers in (("learnt", slice(0, 16)), ("shown", slice(16, 20))):
        (tmp_path / folder / "6").mkdir(parents=True)
        for index in np.flatnonzero(source.labels == 6)[numbers]:
            pixels = source.read(int(index)).image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / "6" / f"{index}.png")
    changes = {"data": str(tmp_path / "learnt"), "test": str(tmp_path / "shown"), "class_order": None, "epochs": 1}
    found = run(tmp_path / "four", continue_from=str(three.path), shots=None, **changes)
    assert found.summary["tasks"] == [["3", "1"], ["0", "2"], ["4", "5"], ["6"]]
    assert pl.load(found.path).num_classes == 7
    assert "1 task of 1 class\n" in capsys.readouterr().err


def test_gates_that_leave_nothing_free_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("patchloom.systems.gcab.gates.TaskGates.free", lambda self, tasks: 0.004)
    run(tmp_path / "full", class_order="3,1", tasks=1, epochs=1, test=None)
    assert "warning: 1 tasks have reserved 99.6% of the gated block" in capsys.readouterr().err


def test_the_report_has_accuracies_and_gates(three):
    page = three.report.read_text()
    for title in ("Tasks", "Accuracy by task", "Accuracy by task, the task known", "Gates", "Accuracy by class"):
        assert f"<h2>{title}" in page or title in page


def test_the_encoder_of_the_bundle_is_an_encoder_like_any_other(three):
    from patchloom.models.bundle import open_encoder

    encoder = open_encoder(three.path)
    assert len(encoder.blocks) == 3  # the gated block stands in place of the fourth
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 96)


def test_what_learnt_tasks_is_attacked_as_the_classifier_it_is(three):
    from patchloom.attack.subjects import class_names, has_classes, open_victim
    from patchloom.systems.dta.features import PixelClassifier

    victim, model = open_victim(three.path, torch.device("cpu")), pl.load(three.path)
    assert has_classes(victim)
    assert class_names(victim) == model.class_names
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(PixelClassifier(victim)(images), model(normalize(images, model)))


@pytest.mark.parametrize("at", [10, *(pytest.param(at, marks=pytest.mark.slow) for at in (6, 9))])
def test_a_run_cut_off_in_a_task_resumes_to_the_bit(tmp_path, monkeypatch, at):
    once = run(tmp_path / "once")
    original, count = GCABMethod.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == at:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(GCABMethod, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            run(tmp_path / "two")
    two = run(tmp_path / "two", resume=True)
    first, second = tensors(once), tensors(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    same = ("accuracy_matrix", "task_aware_accuracy_matrix", "free", "intervals_by_task")
    assert {name: once.summary[name] for name in same} == {name: two.summary[name] for name in same}


def test_tasks_are_added_a_day_later_and_what_is_reserved_stays_to_the_bit(three, tmp_path, capsys):
    later = run(tmp_path / "later", continue_from=str(three.path), class_order="6,7")
    assert later.summary["tasks"] == [["3", "1"], ["0", "2"], ["4", "5"], ["6", "7"]]
    assert later.summary["accuracy_matrix"][:3] == [[*row, None] for row in three.summary["accuracy_matrix"]]
    assert all(share is not None for share in later.summary["accuracy_matrix"][3])
    before, after = load_tasks(three.path), load_tasks(later.path)
    masks = before.block.reserved(before.gates.cumulative(3))
    new = dict(after.block.named_parameters())
    for name, old in before.block.named_parameters():
        if name in masks:
            assert torch.equal(old[masks[name] > 0], new[name][masks[name] > 0])
    assert any(not torch.equal(old, new[name]) for name, old in before.block.named_parameters() if name in masks)
    assert all(torch.equal(a, b) for a, b in zip(before.class_tokens, after.class_tokens[:3], strict=True))
    assert len(after.projectors) == 3
    about = json.loads((later.model / "patchloom.json").read_text())["lineage"]
    assert about["continued_from"] == str(three.path)
    assert about["from"]["lineage"]["made_by"] == "adapt gcab"
    assert "left out: 0, 1, 2, 3, 4" in capsys.readouterr().err


def test_a_run_that_goes_on_from_another_resumes_by_the_command_that_began_it(three, tmp_path, monkeypatch):
    monkeypatch.chdir(three.path.parent)
    settings = {name: value for name, value in SETTINGS.items() if name not in ("encoder", "image_size", "tasks")}
    settings |= {"continue_from": "three", "class_order": "9", "out": tmp_path / "later", "epochs": 2}
    original, count = GCABMethod.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(GCABMethod, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            pl.adapt("gcab", **settings)
    found = pl.adapt("gcab", **settings, resume=True)
    assert found.summary["tasks_learnt"] == 4
    assert pl.load(found.path).class_names[-1] == "9"


def test_tasks_added_without_test_images_of_old_classes_say_nothing_of_forgetting(three, tmp_path):
    old = {"continue_from": str(three.path), "class_order": "8", "test": None}
    later = run(tmp_path / "later", **old, epochs=1, shots=16)
    assert later.summary["accuracy_matrix"][3][:3] == [None, None, None]
    assert later.summary["accuracy_matrix"][3][3] is not None
    assert later.summary["accuracy_by_task"][3] is None  # that of one task is not that of all
    assert not {"forgetting", "last_accuracy", "average_incremental_accuracy"} & later.summary.keys()


def test_a_batch_nobody_chose_fits_the_smallest_task(tmp_path):
    (tmp_path / "tasks.yaml").write_text("- ['0', '1', '2', '3', '4', '5']\n- ['6']\n")
    changes = {"tasks": None, "class_order": None, "shots": None, "task_file": str(tmp_path / "tasks.yaml")}
    config = config_from_mapping(GCABConfig, {**SETTINGS, **changes, "out": "unused"})
    source = open_source("digits")
    images = GCABMethod.images_to_learn_from(config, source)
    assert images == int((source.labels == source.class_names.index("6")).sum())


def test_what_auto_leaves_open_is_settled_by_steps_of_the_last_task(tmp_path, capsys):
    found = run(tmp_path / "auto", num_workers="auto", class_order="3,1,0", tasks=2, epochs=1)
    assert "num_workers=auto:" in capsys.readouterr().err
    assert found.summary["tasks_learnt"] == 2


@pytest.mark.parametrize("learner", ["finetune", "linear", "nearest_mean"])
def test_baselines_learn_the_same_tasks(tmp_path, learner):
    found = run(tmp_path / learner, learner=learner, class_order="3,1,0", tasks=2, epochs=1)
    model = pl.load(found.path)
    logits, labels = answers(model, model.class_names)
    assert found.summary["last_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert np.shape(found.summary["accuracy_matrix"]) == (2, 2)
    assert found.summary["free"] == []
    if learner == "finetune":
        assert not len(model.projectors)
        assert all(bool((gate == 1).all()) for gate in model.gates_of(0))


def test_means_of_classes_are_those_of_normalised_features(tmp_path):
    found = run(tmp_path / "means", learner="nearest_mean", class_order="3,1", tasks=1)
    model = pl.load(found.path)
    assert model.heads[0].counts.tolist() == [8, 8]
    encoder = pl.load(found.path).encoder
    config = config_from_mapping(GCABConfig, {**SETTINGS, "class_order": "3,1", "tasks": 1, "out": "unused"})
    method = GCABMethod(config, open_source("digits"))
    view, sums = EvalTransform((16, 16)), torch.zeros(2, 96)
    for index in range(len(method.source)):
        sample = method.source.read(index)
        pixels = view(sample.image, torch.Generator())["image"][None].float() / 255
        with torch.no_grad():
            sums[sample.label] += F.normalize(pooled(encoder, normalize(pixels, encoder)), dim=1)[0]
    torch.testing.assert_close(model.heads[0].sums, sums, rtol=1e-4, atol=1e-4)


def test_a_frozen_encoder_stands_still_and_has_no_projectors(tmp_path):
    found = run(tmp_path / "frozen", freeze_encoder=True, class_order="3,1,0", tasks=2, epochs=1)
    config = config_from_mapping(GCABConfig, {**SETTINGS, "class_order": "3,1,0", "tasks": 2, "out": "unused"})
    fresh = GCABMethod(config, open_source("digits")).encoder.state_dict()
    kept = load_file(found.model / "model.safetensors")
    assert all(torch.equal(value, fresh[name]) for name, value in kept.items())
    assert not len(pl.load(found.path).projectors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_order": "3,1", "tasks": 3}, "tasks is 3 and there are 2 classes"),
        ({"max_tasks": 2}, "there are 3 tasks and max_tasks is 2"),
        ({"batch_size": 32}, "task 1 has 16 images to learn from, fewer than a step of 32"),
        ({"precision": "16-mixed"}, "precision=16-mixed cannot hold the gradients of the gates"),
        ({"task_file": "tasks.yaml"}, "leave tasks and class_order out"),
        ({"class_weights": "balanced"}, "leave class_weights and label_smoothing out"),
        ({"task": "ordinal"}, "task is ordinal"),
        ({"strategy": "fsdp"}, "use ddp"),
        ({"learner": "nearest_mean", "devices": 2}, "class means are taken by one process"),
        ({"continue_from": "photos"}, "there is no bundle at photos"),
        ({"continue_from": "photos", "encoder": "vit_tiny_patch16_224"}, "leave encoder out"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        run(tmp_path / "run", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_order": "6,1"}, "the class 1 was learnt in an earlier task"),
        ({"class_order": None}, "was learnt in an earlier task"),
        ({"class_order": "6,7", "image_size": 32}, "image_size is 32 and .* learnt from images of 16"),
        ({"class_order": "6,7", "learner": "linear"}, "has learner=gcab, not linear; leave it out"),
        ({"class_order": "6,7", "clamp": 3.0}, "has clamp=6.0, not 3.0"),
    ],
)
def test_what_does_not_go_on_from_a_run_is_refused(three, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        run(tmp_path / "run", continue_from=str(three.path), **changes)


def test_a_bundle_without_tasks_or_with_those_of_another_encoder_is_refused(three, tmp_path):
    import shutil

    shutil.copytree(three.model, tmp_path / "plain")
    (tmp_path / "plain" / "gcab.json").unlink()
    with pytest.raises(UsageError, match="holds no tasks to go on from"):
        run(tmp_path / "run", continue_from=str(tmp_path / "plain"), class_order="6")
    shutil.copytree(three.model, tmp_path / "mixed")
    about = json.loads((three.model / "gcab.json").read_text())
    (tmp_path / "mixed" / "gcab.json").write_text(json.dumps({**about, "encoder": "0"}))
    with pytest.raises(UsageError, match="belongs to another encoder"):
        pl.load(tmp_path / "mixed")
    (tmp_path / "mixed" / "gcab.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        pl.load(tmp_path / "mixed")


@pytest.mark.slow
@pytest.mark.extra("onnx")
def test_an_exported_file_gives_logits_of_all_classes_for_any_number_of_images(three, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    place = pl.export(three.path, out=tmp_path / "tasks.onnx", format="onnx")
    session = runtime.InferenceSession(str(place))
    images = torch.rand(3, 3, 16, 16)
    given = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    model = pl.load(three.path)
    assert torch.allclose(given, model(images), atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == model.class_names
    with pytest.raises(UsageError, match=r"image_size is 32, and .* takes the size it was trained at"):
        pl.export(three.path, out=tmp_path / "other.onnx", format="onnx", image_size=32)


def test_what_is_made_of_the_encoder_alone_says_so(three, tmp_path, capsys):
    pl.export(three.path, out=tmp_path / "encoder", format="timm")
    assert "its encoder alone goes to" in capsys.readouterr().err
    images = torch.rand(2, 3, 16, 16)
    known = pl.load(tmp_path / "encoder")
    assert torch.equal(known.forward_features(images), load_tasks(three.path).trunk.encoder.forward_features(images))
    pl.embed(three.path, data="digits:test", out=tmp_path / "features.npz", num_workers=0)
    features = np.load(tmp_path / "features.npz")["vectors"]
    assert features.shape[1] == known.num_features
    with pytest.raises(UsageError, match="no adapter but a whole model"):
        merge_to_bundle(str(three.path), str(tmp_path / "merged"))


def test_attacks_and_measures_take_a_run_of_tasks(three, tmp_path):
    settings = {"steps": 1, "search_steps": 1, "limit": 12, "curve_images": 0, "num_workers": 0, "pictured": 0}
    known = "digits:test"
    with pytest.raises(UsageError, match="the images show the class 6, and the victim"):
        pl.attack("dta", encoder=three.path, victim=three.path, data=known, out=tmp_path / "a", limit=200)
    whole = run(tmp_path / "all", class_order=None, tasks=2, epochs=1)
    found = pl.attack(
        "dta", encoder=whole.path, victim=whole.path, data=known, out=tmp_path / "b", attacks=["noise"], **settings
    )
    assert found.summary["table"][0]["n"] == 12
