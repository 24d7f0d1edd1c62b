"""Training on good images: what is held out, what is excised, what is refused, and the model on disk."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from defect_images import make_parts
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.ear.config import EARConfig
from patchloom.systems.ear.data import GoodView, MeasuredView, open_sets, usual_shape
from patchloom.systems.ear.excision import excise
from patchloom.systems.ear.method import EARMethod, split_good
from patchloom.systems.ear.saved import WEIGHTS, load_ear, open_saliency

TINY = {"image_size": 32, "width": 4, "smoothing": 5, "mosaic_scale": 4, "num_workers": 0, "batch_size": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "model"
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    save_bundle(encoder, path)
    return str(path)


def made(parts, tmp_path, **settings):
    config = EARConfig(data=str(parts), out=str(tmp_path / "run"), **{**TINY, **settings})
    sets, config = open_sets(config)
    return EARMethod(config, sets.good)


def batch_of(method, count=4):
    images = torch.cat([images for images, _, _ in method.views(method.source, 1)][:count])
    return {"image": (images * 255).to(torch.uint8), "key": [method.source.key(number) for number in range(count)]}


def test_some_good_images_are_held_out_for_the_threshold(parts, tmp_path):
    method = made(parts, tmp_path)
    learnt = {method.source.key(number) for number in range(len(method.source))}
    held = {method.held_out.key(number) for number in range(len(method.held_out))}
    assert (len(learnt), len(held)) == (22, 2)
    assert not learnt & held
    few = open_source(str(parts / "test/good"))
    assert split_good(few, method.config) == (few, few)


def test_images_for_the_threshold_may_be_named_and_need_no_masks(parts, tmp_path):
    (parts / "ground_truth/square/001_mask.png").rename(tmp_path / "away.png")
    try:
        method = made(parts, tmp_path, val_data=str(parts / "test"), probe_data=str(parts / "train"), masks=None)
        method.step = 1
        found = method.validate(torch.device("cpu"))
    finally:
        (tmp_path / "away.png").rename(parts / "ground_truth/square/001_mask.png")
    assert len(method.source) == 24
    assert method.calibration["rule"] == "best F1"
    assert method.calibration["images"] == 10
    assert found["threshold"] == method.calibration["threshold"]
    with pytest.raises(UsageError, match="has no good images"):
        made(parts, tmp_path, val_data=str(parts / "test/square"))


def test_the_loss_has_its_parts_and_what_is_excised_is_what_scoring_excises(parts, tmp_path, bundle):
    method = made(parts, tmp_path, encoder=bundle)
    batch = batch_of(method)
    losses = method.training_loss(batch)
    assert float(losses["loss"].detach()) == pytest.approx(
        sum(float(losses[name].detach()) for name in ("l2", "ssim", "msgms")), rel=1e-5
    )
    images = method.pixels(batch["image"])
    assert torch.equal(method._training_masks(batch["key"], images), excise(images, method.saliency(images), 0.85))
    # The second time it is remembered, by name.
    assert torch.equal(method._training_masks(batch["key"], 0 * images), excise(images, method.saliency(images), 0.85))
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in method.saliency.parameters())


def test_textures_are_mirrored_and_turned_and_their_masks_made_anew(parts, tmp_path):
    method = made(parts, tmp_path, augment="texture")
    batch = batch_of(method)
    images = method.pixels(batch["image"])
    method._training_masks(batch["key"], images)
    turned = images.rot90(1, (2, 3))
    assert torch.equal(method._training_masks(batch["key"], turned), excise(turned, method.saliency(turned), 0.85))
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    seen = {
        GoodView((8, 8), True)(image, torch.Generator().manual_seed(n))["image"].numpy().tobytes() for n in range(60)
    }
    assert len(seen) == 8
    oblong = {tuple(GoodView((8, 4), True)(image, torch.Generator().manual_seed(n))["image"].shape) for n in range(9)}
    assert oblong == {(3, 8, 4)}


def test_random_masking_empties_a_third_and_no_masking_nothing(parts, tmp_path):
    method = made(parts, tmp_path, masking="random")
    batch = batch_of(method)
    images = method.pixels(batch["image"])
    shares = [float(method._training_masks(batch["key"], images).mean()) for _ in range(20)]
    assert 0.25 < np.mean(shares) < 0.42
    assert len(set(shares)) > 1
    assert not made(parts, tmp_path, masking="none")._training_masks(batch["key"], images).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "by gradient) is excised, a mosaic of 4 x 4 pixels is left"),
        ({"hint": "empty"}, "nothing is left in its place"),
        ({"masking": "none"}, "Nothing is excised"),
    ],
)
def test_the_report_says_what_was_excised(parts, tmp_path, settings, words):
    method = made(parts, tmp_path, **settings)
    (section,) = method.report_sections(torch.empty(0))
    assert words in section.text
    assert len(section.figures) == 1


def test_the_cells_of_the_mosaic_are_settled_once_and_kept(parts, tmp_path):
    method = made(parts, tmp_path, mosaic_scale=None)
    (tmp_path / "run").mkdir()
    method.prepare(method.source, tmp_path / "run")
    method.load_prepared(tmp_path / "run")
    written = json.loads((tmp_path / "run/mosaic.json").read_text())
    assert method.mosaic_cell == written["cell"] in (4, 8, 16, 32)
    assert method.summary()["detail_lost"] == written["detail_lost"]
    (tmp_path / "run/mosaic.json").write_text(json.dumps({**written, "cell": 32}))
    method.prepare(method.source, tmp_path / "run")
    method.load_prepared(tmp_path / "run")
    assert method.mosaic_cell == 32


def test_the_shape_of_images_is_settled_by_most_of_them(tmp_path):
    assert usual_shape(open_source(str(make_parts(tmp_path / "square") / "train"))) == 256
    oblong = make_parts(tmp_path / "oblong", size=(32, 64))
    assert usual_shape(open_source(str(oblong / "train"))) == (184, 360)
    sets, config = open_sets(EARConfig(data=str(oblong), out=str(tmp_path / "run")))
    assert config.image_size == (184, 360)
    assert len(sets.test) == 10


def test_masks_are_resized_by_the_nearest_pixel():
    mask = torch.zeros(6, 6, dtype=torch.uint8)
    mask[2:4, 2:4] = 1
    views = MeasuredView((12, 12), True)(torch.zeros(3, 6, 6, dtype=torch.uint8), torch.Generator(), mask=mask)
    assert torch.equal(views["mask"], mask.repeat_interleave(2, 0).repeat_interleave(2, 1))


def saved(method, tmp_path):
    method.calibration = {"images": 2}
    method.thresholds = {
        name: torch.tensor(value) for name, value in (("threshold", 0.4), ("score_min", 0.1), ("score_max", 0.5))
    }
    for parameter in method.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    method.save_model(method.encoder.eval(), tmp_path / "model", {"made_by": "anomaly ear"})
    return tmp_path / "model"


def test_a_model_on_disk_gives_the_same_scores_and_does_not_hold_its_encoder(parts, tmp_path, bundle):
    method = made(parts, tmp_path, encoder=bundle)
    path = saved(method, tmp_path)
    assert not [name for name in load_file(path / WEIGHTS) if not name.startswith("unet.") and "." in name]
    images = torch.rand(2, 3, 32, 32)
    again = load_ear(path)
    expected = method.pipeline(method.encoder).eval()(images)
    assert all(torch.equal(value, expected[name]) for name, value in again.model(images).items())
    assert float(again.model.threshold) == pytest.approx(0.4)
    assert again.image_size == (32, 32)
    assert again.model.saliency.kind == "cls_attention"


def test_another_encoder_is_refused(parts, tmp_path, bundle):
    path = saved(made(parts, tmp_path, encoder=bundle), tmp_path)
    other = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(UsageError, match="something else"):
        load_ear(path, other)
    about = json.loads((path / "ear.json").read_text())
    (path / "ear.json").write_text(json.dumps({**about, "encoder": "gone/model", "encoder_from_here": "../gone"}))
    with pytest.raises(UsageError, match="no longer at gone/model"):
        load_ear(path)
    without = saved(made(parts, tmp_path), tmp_path / "without")
    with pytest.raises(UsageError, match="trained without an encoder"):
        load_ear(without, other)
    assert load_ear(without).model.saliency.kind == "gradient"


def test_damaged_and_missing_models_are_named(parts, tmp_path):
    path = saved(made(parts, tmp_path), tmp_path)
    (path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UsageError, match="damaged"):
        load_ear(path)
    (path / "ear.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        load_ear(path)
    with pytest.raises(UsageError, match="holds no anomaly model"):
        load_ear(tmp_path / "nowhere")


def test_saliency_suits_the_encoder(tmp_path):
    assert open_saliency("none")[0].kind == "gradient"
    encoder = create_encoder("ccvit_tiny_patch8_64")
    for made_by, kind in (("pretrain dinov2", "cls_attention"), ("pretrain ccvit", "pca")):
        path = save_bundle(encoder, tmp_path / made_by, lineage={"made_by": made_by})
        assert open_saliency(str(path))[0].kind == kind


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 1}, "at least 2 images at a time"),
        ({"image_size": 10}, "image_size is 10.* at least 11 pixels"),
        ({"image_size": 16, "smoothing": 41}, "at least 21 pixels"),
        ({"smoothing": 4}, "smoothing is 4"),
        ({"quantile": 1.5}, r"quantile is 1\.5"),
        ({"l2": 0.0, "ssim": 0.0, "msgms": 0.0}, "no loss"),
        ({"baselines": "padim"}, "baseline"),
        ({"saliency": "cls_attention"}, "needs an encoder"),
        ({"saliency": "gradient", "encoder": "vit_tiny_patch16_224"}, "does not use the encoder"),
        ({"drop_path": 0.1}, "drop_path has no meaning here"),
        ({"grad_checkpointing": True}, "for transformers"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        EARConfig(**{"data": "x", "out": "y", **TINY, **settings})


def test_one_good_image_is_too_few(parts, tmp_path):
    method = made(parts, tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/0.png").write_bytes((parts / "train/good/000.png").read_bytes())
    with pytest.raises(UsageError, match="at least 2"):
        EARMethod(method.config, open_source(str(tmp_path / "one")))


def test_weights_of_another_run_are_a_start(parts, tmp_path):
    path = saved(made(parts, tmp_path), tmp_path)
    method = made(parts, tmp_path, init_from=str(path))
    stored = load_file(path / WEIGHTS)
    assert all(torch.equal(value, stored[f"unet.{name}"]) for name, value in method.encoder.state_dict().items())
    with pytest.raises(UsageError, match="of another shape"):
        EARMethod(dataclasses.replace(method.config, width=6), method.source)
