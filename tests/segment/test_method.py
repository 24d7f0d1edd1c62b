"""Decoders as runs: they resume exactly, and what they leave behind segments images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.cli import main
from patchloom.data.segmentation import open_segmentation
from patchloom.encoders import create_encoder
from patchloom.encoders.denoised import Denoiser, denoised
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.segment.commands import predict
from patchloom.segment.saved import load_segmenter
from patchloom.training.run import resolve
from segment_support import paint_pairs

FAST = {"batch_size": 4, "num_workers": 0, "accelerator": "cpu", "width": 16, "image_size": 32, "probe_every": 0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    return str(save_bundle(encoder, tmp_path_factory.mktemp("encoder") / "model"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(paint_pairs(root / "train", 8)), str(paint_pairs(root / "test", 3, seed=1))


def weights(run):
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"], checkpoint["step"]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "bn", "upernet"])
def test_a_resumed_run_ends_where_one_in_a_piece_does(bundle, folders, tmp_path, head):
    from patchloom.segment.method import SegmentMethod

    settings = {**FAST, "data": folders[0], "encoder": bundle, "max_steps": 6, "checkpoint_every": 1}
    whole = pl.segment(head, out=tmp_path / "whole", **settings)
    loss = SegmentMethod.training_loss

    def failing(self, batch):
        if self.step == 3:
            raise RuntimeError("the machine went away")
        return loss(self, batch)

    SegmentMethod.training_loss = failing
    try:
        with pytest.raises(RuntimeError, match="went away"):
            pl.segment(head, out=tmp_path / "cut", **settings)
    finally:
        SegmentMethod.training_loss = loss
    cut = pl.segment(head, out=tmp_path / "cut", resume=True)
    (expected, steps), (found, steps_found) = weights(whole), weights(cut)
    assert (steps, steps_found) == (6, 6)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(name.startswith("head.") for name in expected)


def test_the_encoder_stays_as_it_is_unless_it_is_asked_to_learn(bundle, folders, tmp_path):
    before = pl.load(bundle).state_dict()
    for trains in (False, True):
        settings = {**FAST, "data": folders[0], "encoder": bundle, "max_steps": 2, "train_encoder": trains}
        run = pl.segment("linear", out=tmp_path / str(trains), **settings)
        whole = pl.load(str(run.model))
        after = whole.encoder.state_dict()
        assert whole(torch.randn(1, 3, 40, 56)).shape == (1, 3, 40, 56)  # logits of three classes, of the images' size
        assert before.keys() == after.keys()
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same != trains


def test_a_run_measures_reports_and_predicts(bundle, folders, tmp_path, capsys):
    train, test = folders
    settings = {**FAST, "data": train, "encoder": bundle, "max_steps": 30, "lr": 2e-2, "colours": False}
    run = pl.segment("bn", out=tmp_path / "run", probe_data=test, scale=(1.0, 1.0), **settings)
    figures = run.summary
    assert figures["miou"] > 0.3
    for name, ends in (("miou", "interval"), *((n, f"{n}_interval") for n in ("pixel_accuracy_test", "boundary_f"))):
        low, high = figures[ends]
        assert low <= figures[name] <= high
    assert figures["per_class_iou"].keys() == figures["per_class_interval"].keys()
    assert set(figures["per_class_boundary_f"]) == {"0", "1", "2"}
    assert run.summary["masks"]["train"]["class_shares"].keys() == {"0", "1", "2"}
    page = run.report.read_text()
    assert "Test images, their masks, and what the decoder says" in page
    assert "as coloured masks" in page
    assert "Images the worst, by the share of wrong pixels." in page
    assert "Borders: F" in page
    said = capsys.readouterr().err
    assert f"masks of {train}: class numbers 0 to 2" in said
    assert f"Mean IoU {figures['miou']:.1%} (95 %: " in said
    assert main(["segment", "predict", str(run.path), "--images", f"{test}/images", "--out", str(tmp_path / "p")]) == 0
    source = open_segmentation(test)
    model = load_segmenter(run.path)
    right = total = 0
    for index in range(len(source)):
        mask = Image.open(tmp_path / "p" / f"{index}.png")
        assert mask.mode == "P"
        assert mask.getpalette()[:9] == [0, 0, 0, 255, 0, 0, 0, 255, 0]
        said = np.asarray(mask)
        image = source.read(index).image.float() / 255
        assert np.array_equal(said, model.segment(image).numpy())
        truth = source.read_mask(index).numpy()
        assert said.shape == truth.shape
        right, total = right + (said == truth).sum(), total + truth.size
    assert right / total == pytest.approx(run.summary["pixel_accuracy_test"], abs=1e-6)
    with pytest.raises(UsageError, match="not an empty folder"):
        predict(str(run.path), f"{test}/images", str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("upernet", "upernet reads blocks without the final norm.*give --apply_norm true, or an encoder"),
        (
            "vit_comer",
            "vit_comer reads blocks without the final norm.*give an encoder that patchloom clean dvt distill",
        ),
        ("point", "points have tokens of their own"),
    ],
)
def test_a_denoiser_that_would_do_nothing_is_refused(bundle, folders, tmp_path, head, said):
    clean = str(save_bundle(denoised(pl.load(bundle), Denoiser(32, (4, 4))), tmp_path / "clean"))
    settings = {**FAST, "data": folders[0], "encoder": clean, "max_steps": 1}
    if head == "point":
        settings.pop("width")
    with pytest.raises(UsageError, match=said):
        pl.segment(head, out=tmp_path / "run", **settings)


def test_masks_read_otherwise_do_not_go_on_with_a_run(bundle, tmp_path):
    root = paint_pairs(tmp_path / "set", 4)
    run = pl.segment("linear", out=tmp_path / "run", data=str(root), encoder=bundle, max_steps=1, **FAST)
    for file in (root / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
    summary = run.path / "summary.json"
    summary.unlink()
    with pytest.raises(UsageError, match="are read otherwise now than when the run in"):
        pl.segment("linear", out=run.path, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "no folder 'nowhere' of images and masks"),
        ({"ema": 0.9}, "set train_encoder"),
        ({"width": 0}, "width is 0"),
        ({"layers": (9,)}, "there is no block 9"),
        ({"ignore_label": "0,1,2"}, "hold no class"),
        ({"class_weights": "1,2"}, "class_weights 1,2 are 2 and there are 3 classes"),
        ({"class_weights": "balanced", "loss": "dice"}, "set dice.ce"),
        (
            {"label_field": "_class"},
            "about labels of whole images, and here the classes of pixels are learnt from masks",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(bundle, folders, tmp_path, change, message):
    settings = {"data": folders[0], "encoder": bundle, **FAST, **change}
    with pytest.raises(UsageError, match=message):
        pl.segment("linear", out=tmp_path / "run", **settings)


def test_weights_of_classes_count_and_are_written_down(bundle, folders, tmp_path, capsys):
    settings = {**FAST, "data": folders[0], "encoder": bundle, "max_steps": 2, "report": False}
    plain, ones, car = (
        pl.segment("linear", out=tmp_path / f"{number}", class_weights=given, **settings)
        for number, given in enumerate((None, "1,1,1", "2=50"))
    )
    assert "class weights: 0 1, 1 1, 2 50" in capsys.readouterr().err
    assert "class_weights" not in plain.summary
    assert car.summary["class_weights"] == {"0": 1, "1": 1, "2": 50}
    assert ones.summary["loss"] == pytest.approx(plain.summary["loss"], rel=1e-5)
    assert weights(car)[0].keys() == weights(plain)[0].keys()
    assert not torch.equal(weights(car)[0]["head.conv_seg.weight"], weights(plain)[0]["head.conv_seg.weight"])


def test_whole_images_are_segmented_at_once_where_that_is_asked_for(bundle, folders, tmp_path):
    train, test = folders
    settings = {**FAST, "data": train, "probe_data": test, "encoder": bundle, "max_steps": 2, "report": False}
    run = pl.segment("linear", out=tmp_path / "run", inference="whole", **settings)
    model = load_segmenter(run.path)
    image = open_segmentation(test).read(0).image.float() / 255
    assert image.shape[-2:] == (40, 52)
    sides = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape)))
    whole = model.segment(image)
    assert sides == [(1, 3, 40, 52)]
    model.inference = "slide"
    assert model.segment(image).shape == whole.shape
    assert {side[-2:] for side in sides[1:]} == {(32, 32)}
    about = run.model / "decoder.json"
    older = {name: value for name, value in json.loads(about.read_text()).items() if name != "inference"}
    about.write_text(json.dumps(older))
    assert load_segmenter(run.path).inference == "slide"


def test_a_model_without_decoder_and_a_damaged_one_are_named(bundle, tmp_path, folders):
    with pytest.raises(UsageError, match="holds no decoder; train one"):
        load_segmenter(bundle)
    run = pl.segment("linear", out=tmp_path / "run", data=folders[0], encoder=bundle, max_steps=1, **FAST)
    about = run.model / "decoder.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"class_names": ["a", "b"]}))
    with pytest.raises(UsageError, match="is damaged"):
        load_segmenter(run.path)


def test_upernet_takes_blocks_over_the_depth_at_its_own_rates():
    from patchloom.segment.method import UPerNetMethod

    config = resolve("segment upernet", UPerNetMethod, {"data": "d", "out": "o", "encoder": "vit_tiny_patch16_224"})
    assert (config.blocks, config.lr, config.weight_decay) == ("spread", 1e-4, 0.05)
