"""Learning from labels: which images a method takes, what it reports, and the errors it makes."""

from __future__ import annotations

import gzip
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.finetune.method import FinetuneConfig, FinetuneMethod
from patchloom.training.probe_data import choose_probe_data

SETTINGS = {
    "encoder": "ccvit_tiny_patch4_32",
    "image_size": 16,
    "batch_size": 16,
    "num_workers": 0,
    "accelerator": "cpu",
    "out": "unused",
}


def folder(path, classes, per_class=6):
    generator = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return str(path)


def method(data, **settings):
    return FinetuneMethod(FinetuneConfig(data=data, **{**SETTINGS, **settings}), open_source(data))


def test_a_part_is_held_out_where_no_test_images_are_given(tmp_path):
    made = method(folder(tmp_path / "train", "abc", 10), val_fraction=0.2)
    assert (len(made.source), len(made.test)) == (24, 6)
    assert made.summary()["held_out"]
    figures = made.validate(torch.device("cpu"))
    assert set(figures["per_class_accuracy"]) == set("abc")
    assert method(str(tmp_path / "train"), val_fraction=0.0).test is None


def test_the_label_budget_is_that_of_what_is_left(tmp_path):
    made = method(folder(tmp_path / "train", "abc", 10), val_fraction=0.2, label_fraction=0.5)
    assert (len(made.source), len(made.test)) == (12, 6)
    assert made.targets.counts.tolist() == [4, 4, 4]


def test_a_class_that_the_test_images_lack_keeps_its_number(tmp_path):
    made = method(folder(tmp_path / "train", "abc"), test=folder(tmp_path / "test", "ac"))
    with torch.no_grad():
        made.encoder.head.bias.copy_(torch.tensor([0.0, 0.0, 1e4]))
    figures = made.validate(torch.device("cpu"))
    assert figures["per_class_accuracy"] == {"a": 0.0, "c": 1.0}


def test_a_class_missing_in_training_is_named(tmp_path):
    train = folder(tmp_path / "train", "ab")
    with pytest.raises(UsageError, match="does not have: c"):
        method(train, test=folder(tmp_path / "test", "abc"))


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    train = folder(tmp_path / "train", "ab")
    for settings, said in (
        ({"shots": 2, "label_fraction": 0.5}, "one of them"),
        ({"label_fraction": 0.0}, "above 0"),
        ({"val_fraction": 1.0}, "below 1"),
        ({"shots": 0}, "at least 1"),
        ({"groups": "g.csv", "test": train}, "one of them"),
        ({"task": "multi"}, "one class per image"),
        ({"ordinal_distance": 1.0}, "ordinal targets"),
        ({"logit_adjustment": -1.0}, "at least 0"),
    ):
        with pytest.raises(UsageError, match=said):
            method(train, **settings)


def test_grades_are_measured_by_kappa(tmp_path):
    made = method(folder(tmp_path / "train", "012", 10), task="ordinal", ordinal_distance=0.5, val_fraction=0.2)
    assert made.targets.headline == "kappa"
    assert "kappa" in made.validate(torch.device("cpu"))
    section = made.report_sections(torch.zeros(1))[0]
    assert "Quadratic kappa" in section.text


def test_an_imbalance_makes_classes_unequal_and_says_how_their_groups_fare(tmp_path):
    train = folder(tmp_path / "train", "abcdefghij", 20)
    test = folder(tmp_path / "test", "abcdefghij", 2)
    made = method(train, test=test, imbalance=10, class_weights="effective", reweight_from=0.5)
    assert made.targets.counts.tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert len(made.test) == 20
    about = made.summary()
    assert about["class_counts"]["a"] == 20
    assert about["class_groups"] == {"head": list("abc"), "mid": list("defg"), "tail": list("hij")}
    figures = made.validate(torch.device("cpu"))
    assert {"accuracy_head", "accuracy_mid", "accuracy_tail"} <= set(figures)
    section = made.report_sections(torch.zeros(1))[0]
    assert section.table[0]["training images"] == 20
    assert "head" in section.text
    assert "tail" in section.text
    assert method(train, seed=5, test=test, imbalance=10).source.indices.tolist() == made.source.indices.tolist()
    made.total_steps = 10
    made.on_train_batch_start({}, 0)
    assert not made.targets.weighing
    made.step = 5
    made.on_train_batch_start({}, 0)
    assert made.targets.weighing


def test_long_tails_that_leave_a_class_empty_are_refused(tmp_path):
    train = folder(tmp_path / "train", "abc", 10)
    with pytest.raises(UsageError, match="imbalance 20 leaves the rarest class none of 9 images; 9 is the most"):
        method(train, imbalance=20)
    for settings, said in (({"imbalance": 0.5}, "at least 1"), ({"reweight_from": 1.0}, "below 1")):
        with pytest.raises(UsageError, match=said):
            method(train, **settings)


def test_images_without_label_are_left_out_counted_and_listed(tmp_path, capsys):
    data = folder(tmp_path / "train", ["none", "severe", "unsorted"])
    config = FinetuneConfig(data=data, missing="unsorted", **SETTINGS)
    made = FinetuneMethod(config, open_source(data, **config.source_options()))
    assert made.class_names == ["none", "severe"]
    assert (len(made.source) + len(made.test), int(made.source.labels.min())) == (12, 0)
    assert made.summary()["unlabelled_images"] == 6
    assert made.summary()["unlabelled"][0] == "unsorted/0.png"
    assert "6 of 18 images have no label and are left out: unsorted/0.png" in capsys.readouterr().err
    probe = choose_probe_data(open_source(data, missing="unsorted"), config, made.encoder)
    assert int(probe.reference.labels.min()) == int(probe.queries.labels.min()) == 0


def test_shards_are_learnt_from_as_folders_are(tmp_path):
    pytest.importorskip("webdataset")
    folder(tmp_path / "train", "abc", 10)
    images = sorted((tmp_path / "train").glob("*/*.png"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, image in enumerate(images):
            for ending, content in (("cls", image.parent.name.encode()), ("png", image.read_bytes())):
                member = tarfile.TarInfo(f"{number:02}.{ending}")
                written = b"" if (ending, number) == ("cls", 4) else content
                member.size = len(written)
                archive.addfile(member, io.BytesIO(written))
    config = FinetuneConfig(data=f"{tmp_path}/a.tar", **SETTINGS, val_fraction=0.2, shots=3)
    source, config = FinetuneMethod.open_data(config)
    made = FinetuneMethod(config, source)
    assert made.class_names == ["a", "b", "c"]
    assert made.targets.counts.tolist() == [3, 3, 3]
    assert len(made.test) == 6
    assert made.unlabelled == ["a.tar/04.png"]
    assert set(made.validate(torch.device("cpu"))["per_class_accuracy"]) == set("abc")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    packed = f"{tmp_path}/b.tar.gz"
    with pytest.raises(UsageError, match=r"1 images of .*b.tar.gz have no label.*unpack the shards"):
        FinetuneMethod(FinetuneConfig(data=packed, **SETTINGS), open_source(packed))
    with pytest.raises(UsageError, match="can only be read from front to back, so label_fraction, shots"):
        FinetuneMethod(FinetuneConfig(data=packed, **SETTINGS, shots=2), open_source(packed))
