"""Detection with ViT-CoMer: windows keep boxes on objects, it trains, resumes exactly and writes COCO's results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.cli import main
from patchloom.data.coco import CocoSource
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.vit_comer.detect_data import DetectView
from patchloom.systems.vit_comer.detect_method import DetectMethod
from patchloom.systems.vit_comer.detector import Detector, DetectorShape
from patchloom.training.run import resolve

pytest.importorskip("pycocotools")
FAST = {"batch_size": 2, "num_workers": 0, "accelerator": "cpu", "image_size": 64, "probe_every": 0, "width": 8}
FAST |= {"head_width": 8, "conv_width": 4, "num_points": 1, "num_extra": 0, "boxes_per_image": 8, "anchor_scale": 4.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    small = {"image_size": 32, "embed_dim": 16, "depth": 4, "num_heads": 2}
    encoder = create_encoder("vit_tiny_patch16_224", patch_size=16, **small)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


def paint(folder, count, seed=0):
    """Images with a bright square each, in boxes and outlines of COCO's layout."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, found = [], []
    for number in range(count):
        pixels = generator.integers(0, 60, (50, 70, 3)).astype(np.uint8)
        top, left = int(generator.integers(0, 30)), int(generator.integers(0, 50))
        pixels[top : top + 20, left : left + 20] = (230, 60, 60)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number + 10, "file_name": f"{number}.png", "height": 50, "width": 70})
        corners = [left, top, left + 20, top, left + 20, top + 20, left, top + 20]
        about = {"id": number, "image_id": number + 10, "category_id": 4, "bbox": [left, top, 20, 20], "iscrowd": 0}
        found.append({**about, "segmentation": [corners]})
    categories = [{"id": 9, "name": "disc"}, {"id": 4, "name": "square"}]
    file = folder / "boxes.json"
    file.write_text(json.dumps({"images": images, "annotations": found, "categories": categories}))
    return str(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    return paint(root / "train", 4), paint(root / "test", 2, seed=1)


def test_boxes_and_outlines_of_a_coco_file(files):
    source = CocoSource(files[0])
    sample = source.read(0)
    assert source.class_names == ["square", "disc"]
    assert sample.named["box_classes"].tolist() == [0]
    (left, top, right, bottom) = sample.named["boxes"][0].int().tolist()
    mask = sample.named["instance_masks"][0]
    assert mask[top:bottom, left:right].all()
    assert int(mask.sum()) == 400


@pytest.mark.parametrize("seed", range(4))
def test_windows_keep_boxes_and_masks_on_their_objects(files, seed):
    sample = CocoSource(files[0]).read(seed)
    view = DetectView((64, 64), None, (0.7, 1.3), flip=0.5)
    found = view(sample.image, torch.Generator().manual_seed(seed), **sample.named)
    bright = found["image"][0] > 150
    target = found["target"]
    assert found["image"].shape == (3, 64, 64)
    if len(target["boxes"]):
        (left, top, right, bottom) = target["boxes"][0].round().int().tolist()
        assert float(bright[top:bottom, left:right].float().mean()) > 0.9
        assert float((target["masks"][0].bool() == bright).float().mean()) > 0.95
        assert target["labels"].tolist() == [1]
    else:
        assert int(bright.sum()) < 40


def test_windows_without_objects_are_learnt_from(bundle, files, tmp_path):
    method = _method({"data": files[0], "encoder": bundle}, tmp_path)
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    target["masks"] = torch.zeros(0, 64, 64, dtype=torch.uint8)
    losses = method.training_loss({"image": torch.rand(2, 3, 64, 64), "target": [target, target]})
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()
    assert method.encoder.blocks[0].attn.qkv.weight.grad is not None


def _method(change, tmp_path):
    config = resolve("detect vit_comer", DetectMethod, {**FAST, "out": str(tmp_path / "run"), **change})
    source, config = DetectMethod.open_data(config)
    return DetectMethod(config, source)


def test_images_of_training_keep_their_size_and_those_of_testing_get_theirs(bundle):
    model = Detector(pl.load(bundle), ["a"], DetectorShape(8, 8, crop=64, short_side=96), settings={"conv_width": 4})
    sizes = {}
    for mode in (True, False):
        images, _ = model.train(mode).transform([torch.rand(3, 64, 64)])
        sizes[mode] = tuple(images.tensors.shape[-2:])
    assert sizes == {True: (64, 64), False: (96, 96)}


@pytest.mark.slow
def test_a_resumed_run_ends_where_one_in_a_piece_does_and_its_model_finds_objects(bundle, files, tmp_path, monkeypatch):
    settings = {**FAST, "data": files[0], "encoder": bundle, "max_steps": 3, "checkpoint_every": 1}
    whole = pl.detect("vit_comer", out=tmp_path / "whole", probe_data=files[1], **settings)
    assert {"box_ap", "mask_ap_interval", "box_ap_per_class"} <= set(whole.summary)
    assert "Average precision" in whole.report.read_text()
    loss = DetectMethod.training_loss

    def failing(self, batch):
        if self.step == 2:
            raise RuntimeError("the machine went away")
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DetectMethod, "training_loss", failing)
        with pytest.raises(RuntimeError, match="went away"):
            pl.detect("vit_comer", out=tmp_path / "cut", report=False, **settings)
    cut = pl.detect("vit_comer", out=tmp_path / "cut", resume=True)
    states = [
        torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, cut)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    model = pl.load(whole.path)
    assert isinstance(model, Detector)
    images = files[1].replace("boxes.json", "images")
    out = tmp_path / "objects"
    assert (
        main(["detect", "predict", str(whole.path), "--images", images, "--out", str(out), "--least_score", "0"]) == 0
    )
    results = json.loads((out / "objects.json").read_text())
    assert {one["id"] for one in json.loads((out / "index.json").read_text())["images"]} == {1, 2}
    assert all(one["category_id"] in (0, 1) and len(one["bbox"]) == 4 for one in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 80}, "image_size is 80; ViT-CoMer takes multiples of 32, such as 64"),
        ({"drops": (0.5, 1.0)}, "drops is"),
        ({"data": "images/"}, "images/ is no JSON file"),
        ({"data": "nowhere.json"}, "there is no file nowhere.json"),
        ({"layers": (0, 1)}, "unknown setting 'layers'"),
    ],
)
def test_what_cannot_be_trained_is_refused(bundle, files, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        _method({"data": files[0], "encoder": bundle, **change}, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "lists no image"),
        ({"categories": []}, "has no category"),
        ({"annotations": [{"image_id": 99, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, "annotation of image 99"),
        ({"annotations": [{"image_id": 10, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "annotation of category 5"),
        ({"annotations": [{"image_id": 10, "category_id": 4, "bbox": [0, 0, 0, 1]}]}, "holds no box to learn from"),
        ({"images": [{"id": 10, "file_name": "gone.png"}]}, "gone.png"),
    ],
)
def test_coco_files_that_are_wrong_are_refused(bundle, files, tmp_path, change, message):
    about = json.loads(Path(files[0]).read_text())
    about["annotations"] = [one for one in about["annotations"] if one["image_id"] == 10]
    about["images"] = about["images"][:1]
    (tmp_path / "images").symlink_to(files[0].replace("boxes.json", "images"))
    (tmp_path / "boxes.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(UsageError, match=message):
        _method({"data": str(tmp_path / "boxes.json"), "encoder": bundle}, tmp_path)
