"""`evaluate slides` from features and from slides, and what it refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import patchloom as pl
from patchloom import cli
from patchloom.errors import UsageError
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.validate import MILEnsemble
from slides_support import slide_pixels, write_slide

QUICK = {"folds": 2, "repeats": 2, "epochs": 8, "lr": [3e-3], "weight_decay": [0.0], "batch_size": 8, "device": "cpu"}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001080200000090775"
    "3de0000000c4944415478da63606060000000040001f61738550000000049454e44ae426082"
)


def make_cohort(folder, name: str, slides: int, seed: int, strength: float = 5.0, **about):
    """Write features of slides whose positives hold a tile that points along the first axis, and their labels."""
    generator = np.random.default_rng(seed)
    store = TileStore(
        folder / name, {"encoder": "made up", "weights": "w", "tiles": {"tile_size": 64, "mpp": 0.5}, **about}
    )
    rows = []
    for number in range(slides):
        label, tiles = number % 2, int(generator.integers(4, 12))
        features = generator.normal(size=(tiles, 8)).astype(np.float32)
        features[0, 0] += strength * label
        places = np.stack([np.arange(tiles), np.zeros(tiles, int)], 1)
        known = {"file": "gone.tif", "mpp": 0.5, "tiles": tiles, "tile_size": 64, "tile_mpp": 0.5, "thumbnail_mpp": 8.0}
        store.write(f"{name}-{number}", 5, places, features, known, thumbnail=PNG)
        rows.append([f"{name}-{number}", ("normal", "tumour")[label], f"{name}-patient-{number // 2 * 2 + label}"])
    with (folder / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide", "label", "patient"], *rows])
    return {"features": str(folder / name), "labels": str(folder / f"{name}.csv")}


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohorts")
    return {
        "home": make_cohort(folder, "home", 32, 0),
        "away": make_cohort(folder, "away", 24, 1),
        "folder": folder,
    }


def settings(cohorts, test: bool = True, **more):
    home, away = cohorts["home"], cohorts["away"]
    chosen = {"train": home["features"], "train_labels": home["labels"], **QUICK}
    return {**chosen, **({"test": away["features"], "test_labels": away["labels"]} if test else {}), **more}


def test_a_test_cohort(cohorts, tmp_path):
    out = tmp_path / "run"
    figures = pl.evaluate("slides", **settings(cohorts, out=str(out)))
    assert figures["score"] > 0.8
    assert figures["interval"][0] <= figures["score"] <= figures["interval"][1]
    assert (figures["models"], figures["n"], figures["train_slides"], figures["dim"]) == (4, 24, 32, 8)
    assert figures["score_name"] == "AUROC"
    assert 0 <= figures["ensembling"]["p_value"] <= 1
    assert figures["ensembling"]["difference"] == pytest.approx(figures["score"] - figures["one_model"])
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    truth = [row["label"] == "tumour" for row in rows]
    assert roc_auc_score(truth, [float(row["score"]) for row in rows]) == pytest.approx(figures["score"])
    store = TileStore(cohorts["away"]["features"])
    ensemble = MILEnsemble.load(out / "ensemble")
    bags = [store.bag(row["slide"]).features for row in rows]
    import torch

    again = ensemble.predict([torch.from_numpy(np.array(bag)) for bag in bags])
    np.testing.assert_allclose(again, [float(row["score"]) for row in rows], rtol=1e-5)
    saved = json.loads((out / "summary.json").read_text())
    assert saved == json.loads(json.dumps(figures))
    page = (out / "report.html").read_text()
    assert all(word in page for word in ("AUROC", "Attention maps", "one retrained model", "Predictions"))
    with pytest.raises(UsageError, match="exists; choose another out"):
        pl.evaluate("slides", **settings(cohorts, out=str(out)))


def test_without_a_test_cohort_the_score_is_of_unseen_folds(cohorts):
    plain = pl.evaluate("slides", **settings(cohorts, test=False))
    assert plain["measured_on"].startswith("unseen folds")
    assert "one_model" not in plain
    nested = pl.evaluate("slides", **settings(cohorts, test=False, nested=True))
    assert nested["measured_on"].startswith("outer folds of nested")
    assert len(nested["nested"]["folds"]) == 4
    assert nested["score"] == pytest.approx(np.mean([row["metric"] for row in nested["nested"]["folds"]]))


def test_comparing_two_encoders(cohorts):
    folder = cohorts["folder"]
    weak = [make_cohort(folder / "weak", name, n, s, 1.0) for name, n, s in (("home", 32, 0), ("away", 24, 1))]
    figures = pl.evaluate("slides", **settings(cohorts, compare=weak[0]["features"], compare_test=weak[1]["features"]))
    comparison = figures["comparison"]
    assert comparison["difference"] == pytest.approx(figures["score"] - comparison["other_score"])
    assert comparison["difference"] > 0.1
    assert comparison["p_value"] < 0.1
    fewer = make_cohort(folder / "fewer", "home", 30, 0)
    with (
        pytest.raises(UsageError, match="different slides, home-30 among them"),
        pytest.warns(UserWarning, match="no features"),
    ):
        pl.evaluate("slides", **settings(cohorts, test=False, compare=fewer["features"]))


def test_multiclass_and_other_heads(cohorts, tmp_path):
    figures = pl.evaluate(
        "slides",
        **settings(cohorts, task="multiclass", head="meanpool", head_args={"hidden": [8]}, out=str(tmp_path / "a")),
    )
    assert figures["score_name"] == "macro one-vs-rest AUROC"
    assert (tmp_path / "a" / "predictions.csv").read_text().startswith("slide,patient,label,normal,tumour")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": None}, "needs both test and test_labels"),
        ({"compare": "elsewhere"}, "needs compare, and compare_test"),
        ({"folds": 40}, "class normal has 16 patients, fewer than 40 folds"),
        ({"head_args": {"n_top": 3}}, "do not fit abmil"),
        ({"lr": []}, "give at least 1"),
        ({"train": "/nowhere"}, "holds no tile features"),
        ({"n_tiles": 0}, "n_tiles is 0"),
    ],
)
def test_what_cannot_be_is_refused(cohorts, change, message):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("slides", **{**settings(cohorts), **change})


def test_cohorts_that_do_not_go_together(cohorts, tmp_path):
    home = cohorts["home"]
    with pytest.raises(UsageError, match="32 patients or slides are in both cohorts"):
        pl.evaluate("slides", **{**settings(cohorts), "test": home["features"], "test_labels": home["labels"]})
    for change, message in (
        ({"weights": "other"}, "made with weights other, those in .* with w"),
        ({"tiles": {"tile_size": 64, "mpp": 1.0}}, "have mpp 1.0, those in .* 0.5"),
    ):
        unlike = make_cohort(tmp_path / str(len(message)), "far", 10, 3, **change)
        with pytest.raises(UsageError, match=message):
            pl.evaluate("slides", **{**settings(cohorts), "test": unlike["features"], "test_labels": unlike["labels"]})


@pytest.mark.slow
@pytest.mark.extra("slides")
def test_from_slides_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(12):
        pixels = slide_pixels((320, 256), (32, 32, 288, 224), seed=number)
        if number % 2:
            left = int(generator.integers(1, 5)) * 32
            pixels[96:128, left : left + 32] = (200, 30, 30)
        write_slide(tmp_path / "slides" / f"s{number}.tif", pixels)
        rows.append(f"s{number}.tif,{'yes' if number % 2 else 'no'}")
    write_slide(tmp_path / "slides" / "glass.tif", slide_pixels((320, 256), None))
    (tmp_path / "labels.csv").write_text("slide,label\n" + "\n".join(rows))
    words = "evaluate slides --train slides --train_labels labels.csv --encoder vit_tiny_patch16_224 --untrained"
    words += " --image_size 16 --tile_size 32 --folds 2 --repeats 1 --epochs 2 --lr [0.001] --weight_decay [0]"
    words += " --head_args.temperature 2 --device cpu --out run"
    assert cli.main([*words.split(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["train_slides"] == 12
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the tiles that count most, and how much" in page
    assert "--head_args.temperature 2" in page
    assert len(list((tmp_path / "tile-features").iterdir())) == 1
