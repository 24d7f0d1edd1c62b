"""Chest X-ray sets in their published layouts, written here: lists, splits, uncertain labels, 16-bit PNG and DICOM."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import EvalTransform, SubsetSource, make_loader, open_source, sample_indices
from patchloom.data.medical import CHESTXRAY14, CHEXPERT, ChestXray14Source, shared_patients
from patchloom.data.subset import MemorySource
from patchloom.errors import UsageError


def deep_png(path: Path, value: int = 20_000) -> None:
    """A single-channel 16-bit ramp from 0 to `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(0, value, 20 * 24).reshape(20, 24).astype(np.uint16)).save(path)


def table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def nih(tmp_path: Path) -> Path:
    for number in range(6):
        deep_png(tmp_path / f"images_00{number % 2 + 1}" / "images" / f"0000000{number}_000.png")
    lines = ["00000000_000.png " + " ".join("1" if i in (1, 13) else "0" for i in range(14))]
    lines += [f"0000000{n}_000.png " + " ".join("0" * 14) for n in (1, 2)]
    (tmp_path / "train_official.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test_official.txt").write_text("00000002_000.png " + " ".join("1" * 14) + "\n")
    return tmp_path


def test_chestxray14_reads_lists_with_fourteen_labels(nih):
    source = open_source(f"chestxray14:{nih}", in_chans=1)
    assert source.multilabel
    assert source.class_names == list(CHESTXRAY14)
    assert source.labels.shape == (3, 14)
    assert source.labels.dtype == np.float32
    assert [CHESTXRAY14[i] for i in np.flatnonzero(source.labels[0])] == ["Cardiomegaly", "Hernia"]
    assert source.labels[1:].sum() == 0  # no finding
    sample = source.read(0)
    assert sample.key == "images_001/images/00000000_000.png"
    assert sample.image.shape == (1, 20, 24)
    assert float(sample.image.max()) == pytest.approx(20_000 / 65_535, abs=1e-3)  # one range for the whole source
    np.testing.assert_array_equal(sample.label, source.labels[0])
    assert open_source(f"chestxray14:{nih}:test").labels.sum() == 14


def test_chestxray14_reads_the_sets_own_lists(nih):
    for path in nih.glob("*_official.txt"):
        path.unlink()
    (nih / "train_val_list.txt").write_text("00000003_000.png\n00000004_000.png\n")
    (nih / "test_list.txt").write_text("00000005_000.png\n")
    found = {"00000003_000.png": "Effusion|Pleural_Thickening", "00000004_000.png": "No Finding"}
    found["00000005_000.png"] = "Mass"
    table(nih / "Data_Entry_2017.csv", [{"Image Index": k, "Finding Labels": v, "Age": 1} for k, v in found.items()])
    train, test = (open_source(f"chestxray14:{nih}:{split}") for split in ("train", "test"))
    assert np.flatnonzero(train.labels[0]).tolist() == [2, 12]
    assert train.labels[1].sum() == 0
    assert np.flatnonzero(test.labels[0]).tolist() == [4]
    with pytest.raises(UsageError, match="it is part of train"):
        open_source(f"chestxray14:{nih}:val")
    table(nih / "Data_Entry_2017.csv", [{"Image Index": "00000005_000.png", "Finding Labels": "Mass|Edemas"}])
    with pytest.raises(UsageError, match="did you mean Edema"):
        open_source(f"chestxray14:{nih}:test")
    table(nih / "Data_Entry_2017.csv", [{"Image Index": "00000005_000.png", "Finding Labels": "Mass"}])
    with pytest.raises(UsageError, match="says nothing of 2 images listed: 00000003_000"):
        open_source(f"chestxray14:{nih}:train")


def test_patients_in_two_splits_are_found(nih):
    train, test = (ChestXray14Source(nih, split) for split in ("train", "test"))
    assert shared_patients(train, test) == ["00000002"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00000000_000.png 0 1", "line 2: 1 file and 14 labels, not 3 columns"),
        ("00000000_000.png 2" + " 0" * 13, "line 2: a label is '2'; it must be 0 or 1"),
        ("00000009_000.png" + " 0" * 14, "1 of 2 images listed are not below .*: 00000009_000.png"),
    ],
)
def test_broken_lists_are_named(nih, line, message):
    (nih / "train_official.txt").write_text("00000001_000.png" + " 0" * 14 + "\n" + line + "\n")
    with pytest.raises(UsageError, match=message):
        open_source(f"chestxray14:{nih}")


def test_the_first_ten_missing_images_are_named(nih):
    lines = [f"1000000{n:02d}_000.png" + " 0" * 14 for n in range(12)]
    (nih / "train_official.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"12 of 12 .* 100000009_000.png and 2 more"):
        open_source(f"chestxray14:{nih}")


def test_names_that_are_not_unique_need_a_path(nih):
    deep_png(nih / "copy" / "00000001_000.png")
    with pytest.raises(UsageError, match=r"several folders below .* hold a 00000001_000.png; list it by its path"):
        open_source(f"chestxray14:{nih}")


@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    def row(path: str, view: str, *findings: object) -> dict[str, object]:
        return {"Path": f"CheXpert-v1.0-small/{path}", "Frontal/Lateral": view, "No Finding": ""} | dict(
            zip(CHEXPERT, findings, strict=True)
        )

    for name in ("patient1/study1/view1_frontal.png", "patient1/study1/view2_lateral.png"):
        deep_png(tmp_path / "train" / name)
    deep_png(tmp_path / "train" / "patient2/study1/view1_frontal.png")
    deep_png(tmp_path / "valid" / "patient9/study1/view1_frontal.png")
    rows = [
        row("train/patient1/study1/view1_frontal.png", "Frontal", -1.0, -1.0, -1.0, -1.0, -1.0),
        row("train/patient1/study1/view2_lateral.png", "Lateral", 1, 1, 1, 1, 1),
        row("train/patient2/study1/view1_frontal.png", "Frontal", 1.0, 0.0, "", -1.0, ""),
    ]
    table(tmp_path / "train.csv", rows)
    table(tmp_path / "valid.csv", [row("valid/patient9/study1/view1_frontal.png", "Frontal", 0.0, 1.0, 0.0, 0.0, 1.0)])
    return tmp_path


@pytest.mark.parametrize(
    ("policy", "first", "second"),
    [
        (None, [0, 1, 0, 1, 0], [1, 0, 0, 1, 0]),
        ("paper", [0, 1, 0, 1, 0], [1, 0, 0, 1, 0]),
        ("ones", [1, 1, 1, 1, 1], [1, 0, 0, 1, 0]),
        ("zeros", [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        ("ignore", [np.nan] * 5, [1, 0, 0, np.nan, 0]),
    ],
)
def test_chexpert_takes_frontal_images_and_says_what_uncertain_means(chexpert, policy, first, second):
    source = open_source(f"chexpert:{chexpert}:train" + (f":{policy}" if policy else ""))
    assert [source.key(i) for i in range(len(source))] == [
        "train/patient1/study1/view1_frontal.png",
        "train/patient2/study1/view1_frontal.png",
    ]
    np.testing.assert_array_equal(source.labels, np.array([first, second], dtype=np.float32))
    assert source.read(0).image.shape == (3, 20, 24)


def test_chexperts_published_figures_are_measured_on_its_validation_table(chexpert):
    test = open_source(f"chexpert:{chexpert}:test")
    assert len(test) == 1
    assert test.labels.tolist() == [[0, 1, 0, 0, 1]]


def test_another_patients_image_of_the_same_name_does_not_stand_in(chexpert):
    (chexpert / "train/patient2/study1/view1_frontal.png").unlink()
    (chexpert / "valid/patient9/study1/view1_frontal.png").unlink()
    with pytest.raises(UsageError, match="1 of 2 images listed are not below"):
        open_source(f"chexpert:{chexpert}:train")


def test_bad_words_columns_and_labels_of_chexpert_are_refused(chexpert):
    with pytest.raises(UsageError, match="unknown word after the folder of chexpert 'onez'; did you mean ones"):
        open_source(f"chexpert:{chexpert}:train:onez")
    with pytest.raises(UsageError, match="unknown meaning of uncertain 'maybe'"):
        open_source(f"chexpert:{chexpert}:train", uncertain="maybe")
    with pytest.raises(UsageError, match="there is no folder"):
        open_source(f"chexpert:{chexpert}/none")
    text = (chexpert / "train.csv").read_text()
    (chexpert / "train.csv").write_text(text.replace("Edema", "Oedema"))
    with pytest.raises(UsageError, match="has no column 'Edema'"):
        open_source(f"chexpert:{chexpert}:train")
    (chexpert / "train.csv").write_text(text.replace("-1.0", "maybe"))
    with pytest.raises(UsageError, match=r"a label is 'maybe'; it must be 1, 0, -1 \(uncertain\) or blank"):
        open_source(f"chexpert:{chexpert}:train")


def test_mimic_joins_its_three_tables(tmp_path):
    rows = [("a1", "50", "1012", "train"), ("a2", "50", "1012", "train"), ("a3", "51", "1013", "validate")]
    keys = ("dicom_id", "study_id", "subject_id", "split")
    table(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", [dict(zip(keys, row, strict=True)) for row in rows])
    views = [{"dicom_id": name, "ViewPosition": view} for name, view in (("a1", "PA"), ("a2", "LATERAL"), ("a3", "AP"))]
    table(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", views)
    findings = [dict(zip(CHEXPERT, values, strict=True)) for values in (("1.0", "-1.0", "", "0.0", ""), ("",) * 5)]
    studies = [{"study_id": number, **found} for number, found in zip(("50", "51"), findings, strict=True)]
    table(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", studies)
    for name, patient, study in (("a1", "1012", "50"), ("a3", "1013", "51")):
        deep_png(tmp_path / f"files/p10/p{patient}/s{study}/{name}.jpg".replace(".jpg", ".png"))
    for path in list((tmp_path / "files").rglob("*.png")):
        Image.open(path).convert("L").save(path.with_suffix(".jpg"))
        path.unlink()
    train = open_source(f"mimic-cxr:{tmp_path}")
    np.testing.assert_array_equal(train.labels, np.array([[1, np.nan, 0, 0, 0]], dtype=np.float32))
    assert train.key(0) == "files/p10/p1012/s50/a1.jpg"
    assert len(open_source(f"mimic-cxr:{tmp_path}:val")) == 1


def test_covidx_is_one_class_per_image(tmp_path):
    for name in ("a.png", "b 1.png", "c.png"):
        deep_png(tmp_path / "train" / name)
    lines = ["1 a.png normal rsna", "2 b 1.png pneumonia rsna", "3 c.png positive cohen"]
    (tmp_path / "train_COVIDx9A.txt").write_text("\n".join(lines))
    source = open_source(f"covidx:{tmp_path}")
    assert not source.multilabel
    assert source.class_names == ["normal", "pneumonia", "COVID-19"]
    assert source.labels.tolist() == [0, 1, 2]
    assert source.read(1).label == 1
    (tmp_path / "train_COVIDx9A.txt").write_text("1 a.png negative rsna")
    with pytest.raises(UsageError, match="line 1, 'negative'"):
        open_source(f"covidx:{tmp_path}")
    with pytest.raises(UsageError, match=r"has to hold one list test\*.txt; found: none"):
        open_source(f"covidx:{tmp_path}:test")


def test_vectors_of_labels_go_through_loader_subset_and_memory(chexpert):
    source = open_source(f"chexpert:{chexpert}:train:ignore")
    batch = next(iter(make_loader(source, EvalTransform(16), 2, shuffle=False, num_workers=0)))
    assert batch["label"].dtype == torch.float32
    np.testing.assert_array_equal(batch["label"].numpy(), source.labels)
    part = SubsetSource(source, np.array([1]))
    assert part.multilabel
    np.testing.assert_array_equal(part.labels, source.labels[1:])
    held = MemorySource("held", [source.read(0), source.read(1)], source.class_names)
    assert held.multilabel
    assert held.labels.dtype == np.float32
    with pytest.raises(UsageError, match="several labels each"):
        sample_indices(source, 2, per_class=1)
