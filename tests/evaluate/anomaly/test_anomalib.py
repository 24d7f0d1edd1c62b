"""Anomalib's data and metrics with our detectors. The parts that need it are skipped where it is not installed."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.errors import MissingExtraError, UsageError
from patchloom.evaluate.anomaly.anomalib import anomalib_figures, batches, defect_sets, to_anomalib
from patchloom.evaluate.anomaly.measure import Scored, figures
from patchloom.systems.ear.saved import load_ear

TINY = {"image_size": 32, "width": 4, "max_steps": 2, "batch_size": 4, "mosaic_scale": 4, "num_workers": 0}


class Table(dict):
    """As much of a pandas table as a data set of anomalib is asked for."""

    def __len__(self):
        return len(self["image_path"])


class DataSet:
    """A stand-in for a data set of anomalib."""

    name = "Made"

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)


def data_set(root, kinds, masked=True):
    """Return a data set with files."""
    rng = np.random.default_rng(len(kinds))
    rows = []
    for number, kind in enumerate(kinds):
        (root / kind).mkdir(parents=True, exist_ok=True)
        file = root / kind / f"{number:02}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(file)
        mask = ""
        if kind != "good" and masked:
            mask = root / f"{kind}_{number:02}_mask.png"
            pixels = np.zeros((40, 40), np.uint8)
            pixels[5:15, 8:20] = 255
            Image.fromarray(pixels).save(mask)
        rows.append((str(file), str(mask), int(kind != "good"), kind))
    columns = [list(column) for column in zip(*rows, strict=True)]
    return DataSet(Table(zip(("image_path", "mask_path", "label_index", "label"), columns, strict=True)))


class Module:
    """A stand-in for a data module of anomalib: splits that are there once it is set up."""

    name = "Made"

    def __init__(self, root, tested=("good", "hole", "good", "scratch"), learnt=("good",) * 6, masked=True):
        self.made = data_set(root / "train", learnt), data_set(root / "test", tested, masked)

    def setup(self):
        self.train_data, self.test_data = self.made

    def train_dataloader(self):
        raise AssertionError("images are read by this library")


def scored(count=12, side=24, seed=0):
    rng = np.random.default_rng(seed)
    found = Scored(has_masks=True)
    for number in range(count):
        bad = number % 3 == 0
        mask = np.zeros((side, side), bool)
        if bad:
            mask[2 + number % 5 : 9, 3:8] = True
            mask[15:20, 12 : 15 + number % 4] = True
        heat = rng.random((side, side), np.float32).round(3) + 0.5 * mask * rng.random((side, side), np.float32)
        found.maps.append(heat.astype(np.float32))
        found.masks.append(mask if bad else None)
        found.labels.append(int(bad))
        found.scores.append(float(heat.max()))
        found.keys.append(f"{number}.png")
        found.kinds.append("hole" if bad else "good")
    return found


def test_a_data_module_gives_its_splits_with_kinds_and_masks(tmp_path):
    sets = defect_sets(Module(tmp_path))
    assert (len(sets.good), len(sets.test)) == (6, 4)
    assert sets.test.kinds == ["good", "hole", "good", "scratch"]
    assert sets.test.labels.tolist() == [0, 1, 0, 1]
    sample = sets.test.read(1)
    assert int(sample.named["mask"].sum()) == 10 * 12
    assert sample.image.shape == (3, 40, 40)
    assert not sets.test.read(0).named["mask"].any()
    assert sets.test.key(1) == "hole/01.png"


def test_without_masks_images_alone_are_judged(tmp_path):
    assert not defect_sets(Module(tmp_path, masked=False)).test.has_masks


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"learnt": ("good", "hole")}, "learnt from as good and labelled a defect"),
        ({"options": {"include": "*.png"}}, "include is .* cannot obey"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, match):
    options = changes.pop("options", {})
    with pytest.raises(UsageError, match=match):
        defect_sets(Module(tmp_path, **changes), **options)


def test_a_defect_without_its_mask_is_refused_where_others_have_one(tmp_path):
    module = Module(tmp_path)
    module.made[1].samples["mask_path"][3] = ""
    with pytest.raises(UsageError, match="has a defect and no mask"):
        defect_sets(module)


def test_a_detector_learns_from_a_data_module_and_is_measured_on_it(tmp_path):
    run = pl.anomaly("ear", data=Module(tmp_path), out=tmp_path / "run", report=False, **TINY)
    assert run.summary["test_images"] == {"good": 2, "defect": 2}
    assert "data: anomalib:Made" in (tmp_path / "run/config.yaml").read_text()
    again = pl.anomaly("ear", data=Module(tmp_path), out=tmp_path / "run", resume=True)
    assert again.summary["image_auroc"] == run.summary["image_auroc"]
    with pytest.raises(UsageError, match="a data module of anomalib, which no name opens"):
        pl.anomaly("ear", out=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="masks is elsewhere, and a data module"):
        pl.anomaly("ear", data=Module(tmp_path), out=tmp_path / "other", masks="elsewhere", **TINY)


def test_without_anomalib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anomalib.metrics", None)
    with pytest.raises(MissingExtraError, match=r"patchloom\[anomalib\]"):
        anomalib_figures(scored())


@pytest.mark.extra("anomalib")
def test_figures_are_those_of_anomalib():
    pytest.importorskip("anomalib.metrics")
    found = scored()
    theirs, ours = anomalib_figures(found), figures(found, 0.5, 0.5)
    for name in ("image_auroc", "pixel_auroc"):
        assert theirs[name.replace("auroc", "AUROC")] == pytest.approx(ours[name], abs=1e-3)
    assert theirs["pixel_AUPRO"] == pytest.approx(ours["aupro"], abs=1e-3)
    assert theirs["image_F1Max"] == pytest.approx(ours["image_f1_max"], abs=1e-3)
    assert theirs["pixel_F1Max"] == pytest.approx(ours["pixel_f1_max"], abs=1e-3)
    with pytest.raises(UsageError, match="no metric 'AUROK'"):
        anomalib_figures(found, ["AUROK"])


@pytest.mark.extra("anomalib")
def test_batches_are_those_of_anomalib():
    pytest.importorskip("anomalib.data")
    found = scored(5)
    sizes = [len(batch.gt_label) for batch in batches(found, 2)]
    batch = next(batches(found, 2))
    assert sizes == [2, 2, 1]
    assert batch.anomaly_map.shape == batch.gt_mask.shape == (2, 24, 24)


@pytest.mark.extra("anomalib")
def test_a_detector_answers_as_those_of_anomalib_do(tmp_path):
    pytest.importorskip("anomalib.data")
    run = pl.anomaly("ear", data=Module(tmp_path), out=tmp_path / "run", report=False, **TINY)
    images = torch.rand(2, 3, 32, 32)
    answer, own = to_anomalib(run)(images), load_ear(run.path).model(images)
    assert torch.equal(answer.pred_score.view(-1), own["pred_score"])
    assert torch.equal(answer.anomaly_map.reshape(2, 1, 32, 32), own["anomaly_map"])
    assert torch.equal(answer.pred_label.view(-1), own["pred_score"] >= float(load_ear(run.path).model.threshold))


@pytest.mark.extra("anomalib")
def test_a_folder_of_anomalib_is_read(tmp_path):
    data = pytest.importorskip("anomalib.data")
    data_set(tmp_path / "set", ["good"] * 8)
    data_set(tmp_path / "set", ["hole"] * 2)
    masks = tmp_path / "set/masks"
    masks.mkdir()
    for file in sorted((tmp_path / "set/hole").iterdir()):
        (tmp_path / "set" / f"hole_{file.stem}_mask.png").rename(masks / file.name)
    module = data.Folder(
        "made",
        "good",
        root=tmp_path / "set",
        abnormal_dir="hole",
        mask_dir="masks",
        val_split_mode="none",
        num_workers=0,
        seed=0,
    )
    sets = defect_sets(module)
    assert len(sets.good) + int((sets.test.labels == 0).sum()) == 8
    bad = int(np.flatnonzero(sets.test.labels)[0])
    assert int(sets.test.read(bad).named["mask"].sum()) == 10 * 12
