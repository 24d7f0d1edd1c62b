"""`patchloom anomaly ear` from good images to figures, maps on disk and ONNX."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score

import patchloom as pl
from defect_images import make_parts, part
from patchloom.data.defects import open_tested
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.evaluate.anomaly.commands import export, predict
from patchloom.evaluate.anomaly.measure import Scored, average_precision, defect_f1, figures, score_images
from patchloom.models.bundle import save_bundle
from patchloom.statistics.intervals import bootstrap_interval
from patchloom.systems.ear.method import EARMethod
from patchloom.systems.ear.model import EAR, RecoveryUNet
from patchloom.systems.ear.saved import EncoderAsked, load_ear, open_saliency, save_ear

SMALL = {"image_size": 32, "width": 4, "smoothing": 5, "mosaic_scale": 4, "num_workers": 0, "batch_size": 8}
TINY = SMALL | {"max_steps": 30, "lr": 3e-3, "accelerator": "cpu"}


class Brightness(torch.nn.Module):
    """A detector that is right on the parts drawn for the tests: defects are bright."""

    def forward(self, images):
        return {"anomaly_map": images.mean(1, keepdim=True), "pred_score": images.mean(1).amax((1, 2))}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    pipeline = EAR(None, RecoveryUNet(widths=(4, 6, 8, 10)), mosaic_cell=4, smoothing=5).eval()
    pipeline.calibrate([0.1, 0.5], [0.1, 0.5])
    path = tmp_path_factory.mktemp("model") / "model"
    return save_ear(pipeline, path, image_size=(32, 32), asked=EncoderAsked("none", None), reading={}, calibration={})


def test_a_perfect_detector_has_perfect_figures(parts):
    test = open_tested(str(parts / "test"))
    scored = score_images(Brightness(), test, (32, 32), batch_size=3)
    assert scored.labels == [int(kind == "square") for kind in scored.kinds]
    found = figures(scored, 0.8, 0.8)
    for name in ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "aupro", "pixel_ap", "pixel_f1"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
        low, high = found["intervals"][name]
        assert 0 < low <= 1 == pytest.approx(high, abs=1e-6)
    assert found["test_images"] == {"good": 5, "defect": 5}
    assert found["per_kind"] == {"square": {"images": 5, "image_auroc": 1.0}}


def test_without_good_images_figures_are_undefined_and_it_says_so(parts):
    test = open_tested(str(parts / "test"))
    scored = score_images(Brightness(), test.part(np.flatnonzero(test.labels)), (32, 32))
    assert scored.labels == [1] * 5
    assert figures(scored, 0.5, 0.5)["aupro"] == pytest.approx(1, abs=1e-6)  # their own good pixels remain
    found = figures(
        Scored(scored.keys, scored.labels, scored.kinds, scored.scores, scored.maps, scored.masks), 0.5, 0.5
    )
    assert found["image_auroc"] is None
    assert found["undefined"].startswith("no good image")
    assert "aupro" not in found


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_and_f1_of_draws_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    truth, scores = rng.integers(0, 2, 40), np.round(rng.normal(size=40), 1)
    weights = rng.integers(0, 3, (4, 40))
    for row, value in zip(weights, average_precision.weighted(scores, truth, weights), strict=True):
        assert value == pytest.approx(average_precision_score(np.repeat(truth, row), np.repeat(scores, row)))
    interval = bootstrap_interval(defect_f1, (scores > 0).astype(int), truth, strata=truth)
    assert interval.low < interval.value < interval.high


def test_predictions_are_written_at_the_images_own_size(tmp_path, model):
    for number, size in enumerate([(32, 32), (40, 61), (90, 33)]):
        (tmp_path / "new/line").mkdir(parents=True, exist_ok=True)
        part(number, size, defect=number == 1)[0].save(tmp_path / "new/line" / f"{number}.png")
    (tmp_path / "new/broken.png").write_bytes(b"nothing")
    found = predict(str(model), str(tmp_path / "new"), str(tmp_path / "out"), device="cpu")
    assert found["images"] == 3
    assert [one["file"] for one in found["skipped"]] == ["broken.png"]
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, (row, size) in enumerate(zip(rows, [(32, 32), (40, 61), (90, 33)], strict=True)):
        values = tifffile.imread(tmp_path / "out/maps/line" / f"{number}.tiff")
        assert values.shape == size
        assert values.dtype == np.float32
        assert float(row["peak"]) == pytest.approx(float(values.max()), rel=1e-6)
        assert values[int(row["peak_row"]), int(row["peak_column"])] == values.max()
        assert int(row["defect"]) == (float(row["score"]) >= found["threshold"])
        for folder in ("overlays", "masks"):
            assert Image.open(tmp_path / "out" / folder / f"line/{number}.png").size == size[::-1]
    predict(str(model), str(tmp_path / "new"), str(tmp_path / "again"), device="cpu")
    assert (tmp_path / "again/scores.csv").read_bytes() == (tmp_path / "out/scores.csv").read_bytes()
    with pytest.raises(UsageError, match="not an empty folder"):
        predict(str(model), str(tmp_path / "new"), str(tmp_path / "out"))


def test_a_grey_deep_and_a_transparent_image_are_scored(tmp_path, model):
    folder = tmp_path / "odd"
    folder.mkdir()
    image = np.asarray(part(0)[0])
    Image.fromarray(image.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.dstack([image] * 3 + [np.full_like(image, 255)])).save(folder / "alpha.png")
    Image.fromarray(image).save(folder / "grey.png")
    predict(str(model), str(folder), str(tmp_path / "out"), device="cpu")
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert len(scores) == 3
    assert np.ptp(scores) < 1e-3


@pytest.mark.slow
@pytest.mark.extra("onnx")
@pytest.mark.parametrize(
    ("name", "kind"), [("vit_tiny_patch16_224", "cls_attention"), ("beit_base_patch16_224", "pca")]
)
def test_the_whole_pipeline_in_onnx_gives_the_same(tmp_path, name, kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    encoder = create_encoder(name, image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    save_bundle(encoder, tmp_path / "encoder")
    saliency, asked = open_saliency(str(tmp_path / "encoder"), kind)
    pipeline = EAR(saliency, RecoveryUNet(widths=(4, 6, 8, 10)), mosaic_cell=16).eval()
    pipeline.calibrate([0.1, 0.5], [0.1, 0.5])
    # Larger than the encoder's images, and than what the exporter folds into constants by itself.
    save_ear(pipeline, tmp_path / "model", image_size=(104, 100), asked=asked, reading={}, calibration={})
    export(str(tmp_path / "model"), str(tmp_path / "ear.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "ear.onnx"), providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 104, 100)
    names = [one.name for one in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
    with torch.no_grad():
        expected = load_ear(tmp_path / "model").model(images)
    for output in ("anomaly_map", "pred_score", "mask"):
        np.testing.assert_allclose(found[output], expected[output].numpy(), atol=1e-4)
    assert float(session.get_modelmeta().custom_metadata_map["threshold"]) == pytest.approx(0.498)
    with pytest.raises(UsageError, match="exists"):
        export(str(tmp_path / "model"), str(tmp_path / "ear.onnx"))


@pytest.mark.slow
def test_a_run_finds_defects_and_stands_beside_its_baselines(tmp_path, parts):
    run = pl.anomaly("ear", data=str(parts), out=tmp_path / "run", baselines="patchcore,random_masks", **TINY)
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["image_auroc"] > 0.7
    assert set(summary["baselines"]) == {"patchcore", "random_masks"}
    assert summary["intervals"]["aupro"][0] <= summary["aupro"] <= summary["intervals"]["aupro"][1]
    assert summary["calibration"]["images"] == 2
    with (run.path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels, scores = ([float(row[name]) for row in rows] for name in ("label", "score"))
    assert roc_auc_score(labels, scores) == pytest.approx(summary["image_auroc"])
    page = run.report.read_text()
    assert page.index("Defects found") < page.index("Excision and recovery")
    # The scores are those of the model on disk, image by image.
    predict(str(run.path), str(parts / "test"), str(tmp_path / "out"), device="cpu")
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        again = {row["file"]: row["score"] for row in csv.DictReader(file)}
    assert again == {row["file"]: row["score"] for row in rows}
    before = (run.path / "summary.json").read_bytes()
    pl.anomaly("ear", out=run.path, resume=True)
    assert (run.path / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_good_images_alone_make_a_model_that_predicts(tmp_path, parts):
    run = pl.anomaly("ear", data=str(parts / "train/good"), out=tmp_path / "run", **{**TINY, "max_steps": 2})
    assert "image_auroc" not in run.summary
    assert run.summary["calibration"]["threshold"] > 0
    assert predict(str(run.path), str(parts / "test"), str(tmp_path / "out"), device="cpu")["images"] == 10


def test_masks_beside_the_images_are_not_predicted_on(tmp_path, model, capsys):
    for number in range(4):
        image, mask = part(number, defect=True)
        image.save(tmp_path / f"{number}.jpg")
        mask.save(tmp_path / f"{number}.png")
    assert predict(str(model), str(tmp_path), str(tmp_path / "out"), device="cpu")["images"] == 4
    assert "files *.png are masks of the images of the same name" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_to_the_same_model(tmp_path, parts, monkeypatch):
    settings = {"data": str(parts), "checkpoint_every": 2, **TINY, "max_steps": 7}
    whole = pl.anomaly("ear", out=tmp_path / "whole", **settings)
    loss = EARMethod.training_loss

    def breaks(self, batch):
        if self.step == 5:
            raise RuntimeError("the power is out")
        return loss(self, batch)

    monkeypatch.setattr(EARMethod, "training_loss", breaks)
    with pytest.raises(RuntimeError, match="the power is out"):
        pl.anomaly("ear", out=tmp_path / "broken", **settings)
    monkeypatch.setattr(EARMethod, "training_loss", loss)
    again = pl.anomaly("ear", out=tmp_path / "broken", resume=True)
    first, second = (load_file(run.path / "model/ear.safetensors") for run in (whole, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (whole.path / "scores.csv").read_bytes() == (again.path / "scores.csv").read_bytes()
