"""segment point as a run: it learns from masks, boxes and points, resumes exactly, and its model segments images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.cli import main
from patchloom.data import make_loader
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.vit_p.method import PointMethod
from patchloom.systems.vit_p.segmenter import PointSegmenter
from patchloom.training.run import resolve
from segment_support import paint_pairs

FAST = {"batch_size": 4, "num_workers": 0, "accelerator": "cpu", "image_size": 32, "probe_every": 0, "num_points": 20}
FAST |= {"optimizer": "adamw", "lr": 5e-3, "rotate": 0.0, "proposals": "superpixels:40"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    small = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder = create_encoder("vit_tiny_patch16_224", patch_size=4, **small)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(paint_pairs(root / "train", 8, (40, 60))), str(paint_pairs(root / "test", 2, (30, 46), seed=1))


@pytest.fixture(scope="module")
def run(bundle, folders, tmp_path_factory):
    """A run that has learnt something."""
    train, test = folders
    settings = {**FAST, "data": train, "probe_data": test, "encoder": bundle, "max_steps": 40, "epochs": 40}
    return pl.segment("point", out=tmp_path_factory.mktemp("run") / "r", things="1,2", report=False, **settings)


def weights(run):
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"], checkpoint["step"]


@pytest.mark.slow
def test_a_run_learns_and_is_measured(run):
    figures = run.summary
    assert figures["miou"] > 0.35  # all background: 0.27
    assert figures["oracle_miou"] >= figures["miou"]
    low, high = figures["interval"]
    assert low <= figures["miou"] <= high
    assert figures["point_accuracy"] > 0.5
    assert {"pq", "pq_interval", "boundary_f", "boundary_f_interval", "per_class_iou"} <= set(figures)
    assert figures["learnt_from"] == "masks"


@pytest.mark.slow
def test_predicted_masks_are_what_the_model_says(run, folders, tmp_path):
    images = f"{folders[1]}/images"
    command = ["segment", "predict", str(run.path), "--images", images, "--out", str(tmp_path / "p")]
    assert main([*command, "--overlays"]) == 0
    model = pl.load(run.path)
    assert isinstance(model, PointSegmenter)
    for number in range(2):
        said = np.asarray(Image.open(tmp_path / "p" / f"{number}.png"))
        image = torch.from_numpy(np.array(Image.open(f"{images}/{number}.png"))).permute(2, 0, 1).float() / 255
        assert said.shape == (30, 46)
        assert np.array_equal(said, model.segment(image).numpy())
        assert Image.open(tmp_path / "p" / "overlays" / f"{number}.png").size == (46, 30)
        logits = model(normalize(image[None], model.encoder))
        assert np.array_equal(logits[0].argmax(0).numpy(), said)


@pytest.mark.slow
def test_segments_and_objects_are_written_as_coco_has_them(run, folders, tmp_path):
    images = f"{folders[1]}/images"
    for task in ("panoptic", "instance"):
        command = ["segment", "predict", str(run.path), "--images", images, "--out", str(tmp_path / task)]
        assert main([*command, "--task", task]) == 0
    about = json.loads((tmp_path / "panoptic" / "panoptic.json").read_text())
    for one in about["annotations"]:
        pixels = np.asarray(Image.open(tmp_path / "panoptic" / one["file_name"])).astype(int)
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in one["segments_info"]}
        for segment in one["segments_info"]:
            assert segment["area"] == int((ids == segment["id"]).sum())
    masks = pytest.importorskip("pycocotools.mask")
    results = json.loads((tmp_path / "instance" / "instances.json").read_text())
    assert results
    for one in results:
        mask = masks.decode(one["segmentation"])
        assert mask.shape == (30, 46)
        assert masks.toBbox(one["segmentation"]).tolist() == one["bbox"]
        assert one["category_id"] in (1, 2)


@pytest.mark.slow
def test_the_classifier_goes_into_onnx_for_any_number_of_points(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = pl.load(run.path)
    for size in (32, 48):
        file = tmp_path / f"{size}.onnx"
        command = ["segment", "export", str(run.path), "--out", str(file), "--image_size", str(size)]
        assert main(command) == 0
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        images, points = torch.randn(2, 3, size, size), torch.rand(2, 7, 2) * 2 - 1
        (found,) = session.run(None, {"images": images.numpy(), "points": points.numpy()})
        with torch.no_grad():
            expected = model.classifier(images, points)
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_ends_where_one_in_a_piece_does(bundle, folders, tmp_path, monkeypatch):
    settings = {**FAST, "data": folders[0], "encoder": bundle, "max_steps": 4, "checkpoint_every": 1, "rotate": 60.0}
    settings |= {"optimizer": "sgd", "report": False}
    whole = pl.segment("point", out=tmp_path / "whole", **settings)
    loss = PointMethod.training_loss

    def failing(self, batch):
        if self.step == 2:
            raise RuntimeError("the machine went away")
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PointMethod, "training_loss", failing)
        with pytest.raises(RuntimeError, match="went away"):
            pl.segment("point", out=tmp_path / "cut", **settings)
    cut = pl.segment("point", out=tmp_path / "cut", resume=True)
    (expected, steps), (found, steps_found) = weights(whole), weights(cut)
    assert (steps, steps_found) == (4, 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(name.startswith("classifier") for name in expected)


def test_the_map_from_places_has_a_rate_of_its_own(bundle, folders, tmp_path):
    method = _method({"data": folders[0], "encoder": bundle, "optimizer": "sgd", "lr": 1e-3}, tmp_path)
    optimizer = method.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    scales = {name: group["lr_scale"] for group in optimizer.param_groups for name in group["names"]}
    assert scales.pop("cls_embeddings.weight") == pytest.approx(10.0)
    assert set(scales.values()) == {1.0}
    assert "encoder.cls_token" not in scales


def test_an_image_on_which_nothing_is_known_has_no_loss(bundle, folders, tmp_path):
    method = _method({"data": folders[0], "encoder": bundle}, tmp_path)
    batch = {"image": torch.rand(1, 3, 32, 32), "points": torch.zeros(1, 5, 2), "classes": torch.full((1, 5), -100)}
    losses = method.training_loss(batch)
    assert float(losses["loss"]) == 0.0
    losses["loss"].backward()


def first_batch(method):
    return next(iter(make_loader(method.source, method.transform(), 4, shuffle=False, num_workers=0)))


def _method(change, tmp_path):
    config = resolve("segment point", PointMethod, {**FAST, "out": str(tmp_path / "run"), **change})
    source, config = PointMethod.open_data(config)
    return PointMethod(config, source)


@pytest.mark.parametrize("labels", ["boxes", "points"])
def test_boxes_and_points_made_of_masks_are_learnt_from(bundle, folders, tmp_path, labels):
    method = _method({"data": folders[0], "encoder": bundle, "labels": labels}, tmp_path)
    batch = first_batch(method)
    assert batch["points"].shape == (4, 20, 2)
    assert float(batch["points"].abs().max()) <= 1
    assert set(batch["classes"].unique().tolist()) <= {0, 1, 2}
    assert torch.isfinite(method.training_loss(batch)["loss"])


def test_tables_of_points_and_files_of_boxes_are_learnt_from(bundle, folders, tmp_path):
    images = f"{folders[0]}/images"
    (tmp_path / "images").symlink_to(images)
    lines = ["file,row,column,label", *(f"images/{n}.png,{n},5,crop\nimages/{n}.png,20,9,soil" for n in range(8))]
    (tmp_path / "points.csv").write_text("\n".join(lines))
    method = _method({"data": str(tmp_path / "points.csv"), "encoder": bundle}, tmp_path)
    assert (method.known, method.class_names) == ("points", ["crop", "soil"])
    about = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(8)],
        "categories": [{"id": 7, "name": "soil"}, {"id": 3, "name": "crop"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 7, "bbox": [5, 5, 20, 10]} for n in range(7)],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(about))
    method = _method({"data": str(tmp_path / "boxes.json"), "encoder": bundle}, tmp_path)
    assert (method.known, method.class_names) == ("boxes", ["crop", "soil"])
    sample = method.source.read(0)
    assert sample.named["boxes"].tolist() == [[5, 5, 25, 15]]
    assert sample.named["box_classes"].tolist() == [1]
    batch = first_batch(method)
    assert set(batch["classes"].unique().tolist()) <= {-100, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "30x30 pixels are not filled by patches of 4; the nearest sizes are 28x28 or 32x32"),
        ({"things": "1,car"}, "unknown class in things 'car'"),
        ({"proposals": "superpixel"}, "proposals is 'superpixel'; it is one of superpixels"),
        ({"proposals": "superpixels:0"}, "give a number from 1 behind the colon"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"probe_data": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused(bundle, folders, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        _method({"data": folders[0], "encoder": bundle, **change}, tmp_path)


def test_the_published_recipes():
    base = {"data": "d", "out": "o"}
    config = resolve("segment point", PointMethod, base)
    assert (config.optimizer, config.lr, config.momentum, config.clip_grad) == ("sgd", 9e-3, 0.9, 1.0)
    config = resolve("segment point", PointMethod, {**base, "preset": "ade20k_l"})
    assert (config.num_points, config.max_steps, config.lr, config.warmup_epochs) == (200, 19_200, 3e-2, 0.0)
    assert (config.encoder, config.point_start) == ("vit_large_patch14_dinov2", "place")
    config = resolve("segment point", PointMethod, {**base, "preset": "cityscapes_b"})
    assert (config.image_size, config.batch_size) == ((518, 1036), 20)
