"""The segmentation probe, from folders to figures."""

from __future__ import annotations

import copy
import io
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.cli import main
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.evaluate.decoders import train_decoder
from patchloom.evaluate.segmentation import SegmentationConfig, open_pair
from patchloom.models.bundle import save_bundle
from patchloom.segment.metrics import Areas, iou
from patchloom.segment.overlap import counted_areas, scores_with_intervals
from patchloom.training.config import config_from_mapping
from segment_support import paint_pairs

FAST = {"steps": 60, "batch_size": 8, "lr": 2e-2, "num_workers": 0, "warmup": 5, "channels": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2
    ).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(paint_pairs(root / "train", 12)), str(paint_pairs(root / "test", 6, seed=1))


@pytest.mark.parametrize("head", ["linear", "bn", "dinov3", "multilayer", "upernet", "setr", "unet"])
def test_every_head_learns_rectangles(encoder, folders, head):
    train, test = folders
    figures = pl.evaluate(
        "segmentation",
        encoder=encoder,
        train=train,
        test=test,
        head=head,
        augment=head in ("bn", "upernet"),
        colours=False,
        scale=(1.0, 1.0),
        **FAST,
    )
    assert figures["score"] == figures["miou"] > 0.5
    low, high = figures["interval"]
    assert 0 <= low <= figures["miou"] <= high <= 1
    assert set(figures["per_class_iou"]) == {"0", "1", "2"}
    assert figures["n"] == 6
    assert figures["loss_last"] < figures["loss_first"]
    assert figures["miou"] == pytest.approx(np.mean(list(figures["per_class_iou"].values())))
    json.dumps(figures)


def test_a_fixed_seed_gives_fixed_figures_and_the_encoder_is_left_alone(encoder, folders):
    train, test = folders
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    grads = [p.requires_grad for p in encoder.parameters()]
    settings = dict(encoder=encoder, train=train, test=test, **{**FAST, "steps": 8})
    first, second = (pl.evaluate("segmentation", **settings) for _ in range(2))
    for figures in (first, second):
        figures.pop("seconds"), figures.pop("seconds_training")
    assert first == second
    assert [p.requires_grad for p in encoder.parameters()] == grads
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("inference", ["slide", "whole"])
def test_the_score_is_of_the_masks_own_pixels(encoder, folders, inference, tmp_path):
    train, test = folders
    figures = pl.evaluate(
        "segmentation",
        encoder=encoder,
        train=train,
        test=test,
        inference=inference,
        short_side=32,
        stride=(16, 16),
        crop=(32, 40),
        multiscale=inference == "whole",
        picture=str(tmp_path / "p.png"),
        augment=False,
        **FAST,
    )
    assert figures["miou"] > 0.4
    assert figures["crop"] == [32, 40]
    picture = Image.open(tmp_path / "p.png")
    assert picture.width > 500


def test_from_the_command_line_with_a_bundle(encoder, folders, tmp_path, capsys):
    train, test = folders
    save_bundle(encoder, tmp_path / "model")
    arguments = [f"--{name}={value}" for name, value in FAST.items() if name != "steps"]
    code = main(
        ["evaluate", "segmentation", "--encoder", str(tmp_path / "model"), "--train", train, "--test", test, "--preset",
         "tiny", "--steps", "5", "--untrained", "--crop", "[32,32]", "--json",
         "--out", str(tmp_path / "out.json"), *arguments]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    said = json.loads(printed.out)
    assert said["protocol"] == "segmentation"
    assert json.loads((tmp_path / "out.json").read_text())["miou"] == said["miou"]


def test_a_class_absent_from_the_test_images_is_named_and_does_not_count(encoder, folders, tmp_path):
    train, _ = folders
    few = paint_pairs(tmp_path / "few", 2, classes=2, seed=3)
    figures = pl.evaluate(
        "segmentation", encoder=encoder, train=train, test=str(few), augment=False, **{**FAST, "steps": 5}
    )
    assert figures["classes_not_in_test"] == ["2"]


def test_a_broken_test_image_is_left_out_and_listed(encoder, folders, tmp_path):
    train, _ = folders
    root = paint_pairs(tmp_path / "test", 3, seed=4)
    (root / "images/1.png").write_bytes(b"no image")
    figures = pl.evaluate(
        "segmentation", encoder=encoder, train=train, test=str(root), augment=False, **{**FAST, "steps": 5}
    )
    assert figures["n"] == 2
    assert figures["skipped"][0]["file"] == "1.png"


def test_intervals_are_those_of_drawing_images(folders):
    rng = np.random.default_rng(0)
    true = torch.from_numpy(rng.integers(50, 100, (40, 3)))
    hit = (true * torch.from_numpy(rng.uniform(0.3, 0.9, (40, 3)))).long()
    found = Areas(hit, hit + 10, true)
    scores = scores_with_intervals(found, ["a", "b", "c"], draws=400)
    drawn = []
    for _ in range(400):
        chosen = torch.from_numpy(rng.integers(0, 40, 40))
        drawn.append(float(iou(Areas(*(x[chosen] for x in found)).total()).nanmean()))
    # A little wider on both sides: what was not seen, and Student's t for 40 images.
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert scores["interval"] == pytest.approx([low - 0.015, high + 0.015], abs=0.014)
    low, high = scores["per_class_interval"]["b"]
    assert low < scores["per_class_iou"]["b"] < high


def test_a_class_nowhere_has_no_score_but_the_others_do():
    empty = torch.zeros(5, 1, dtype=torch.long)
    full = torch.full((5, 1), 10)
    found = Areas(*(torch.cat([x, empty], 1) for x in (full, full, full)))
    scores = scores_with_intervals(found, ["there", "nowhere"])
    assert scores["per_class_iou"] == {"there": 1.0, "nowhere": None}
    assert scores["miou"] == 1.0
    assert "nowhere" not in scores["per_class_interval"]


def test_dice_and_jaccard_are_means_over_the_classes_but_the_background():
    torch.manual_seed(0)
    said, truth = torch.randint(0, 4, (6, 30, 30)), torch.randint(0, 3, (6, 30, 30))
    truth[:, 0] = 255
    names = ["background", "lung", "heart", "never there"]

    def overlap(kept):
        scores = {}
        for number, name in list(enumerate(names))[1:]:
            one, other = said[kept] == number, truth[kept] == number
            both, either = float((one & other).sum()), float((one | other).sum())
            scores[name] = (2 * both / float(one.sum() + other.sum()), both / either)
        return scores

    for as_published, kept in ((False, truth != 255), (True, (truth != 255) & (truth != 0))):
        found = [counted_areas(a, b, 4, as_published) for a, b in zip(said, truth, strict=True)]
        counted = Areas(*(torch.stack(rows) for rows in zip(*found, strict=True)))
        scores = scores_with_intervals(counted, names, draws=200)
        expected = overlap(kept)
        assert scores["per_class_dice"] == pytest.approx({name: both[0] for name, both in expected.items()})
        assert scores["foreground_dice"] == pytest.approx(np.mean([both[0] for both in expected.values()]))
        assert scores["foreground_jaccard"] == pytest.approx(np.mean([both[1] for both in expected.values()]))
        for name in ("foreground_dice", "foreground_jaccard"):
            low, high = scores[f"{name}_interval"]
            assert low < scores[name] < high


def test_false_alarms_on_the_background_count_unless_scores_are_as_published(encoder, folders):
    train, test = folders
    settings = dict(encoder=encoder, train=train, test=test, augment=False, **{**FAST, "steps": 6})
    own, published = (pl.evaluate("segmentation", as_published=flag, **settings) for flag in (False, True))
    assert own["miou"] == published["miou"]
    assert own["foreground_dice"] < published["foreground_dice"]
    assert own["foreground_jaccard"] < published["foreground_jaccard"]
    assert set(own["per_class_dice"]) == {"1", "2"}
    assert (own["as_published"], published["as_published"]) == (False, True)


@pytest.fixture(scope="module")
def coarse():
    torch.manual_seed(0)
    return create_encoder(
        "vit_tiny_patch16_224", image_size=60, patch_size=30, embed_dim=32, depth=5, num_heads=2
    ).eval()


@pytest.mark.parametrize("preset", ["dinov2", "dinov2_ms", "dinov3", "upernet"])
def test_presets_see_images_as_published_at_the_nearest_size_their_patches_fill(coarse, folders, preset):
    train, test = folders
    small = {"steps": 2, "batch_size": 2, "channels": 16, "num_workers": 0, "scales": (0.2, 0.3), "device": "cpu"}
    with pytest.warns(UserWarning, match=r"crop \(512, 512\) of preset .* patch of 30 pixels.*\(510, 510\)"):
        figures = pl.evaluate("segmentation", encoder=coarse, train=train, test=test, preset=preset, **small)
    assert figures["crop"] == [510, 510]
    made = config_from_mapping(SegmentationConfig, {"encoder": "e", "train": "a", "test": "b", "preset": preset})
    assert (made.crop, made.short_side, made.stride) == ((512, 512), 512, None)
    assert (made.decay, made.clip_grad) == (("one_cycle", 35.0) if preset == "dinov3" else ("poly", None))
    if preset == "dinov2_ms":
        assert made.scales == (1.0, 1.32, 1.73, 2.28, 3.0)
    if preset == "upernet":
        assert figures["layers"] == [0, 1, 3, 4]  # over the whole depth


def test_windows_of_a_preset_are_the_published_step_apart(coarse, folders):
    train, _ = folders
    settings = {"encoder": coarse, "train": train, "test": train, "num_workers": 0, "steps": 1, "batch_size": 1}
    config = config_from_mapping(SegmentationConfig, {**settings, "preset": "dinov2", "device": "cpu"})
    source = open_pair(train, folders[1], 3)[0]
    with pytest.warns(UserWarning, match="510"):
        trained = train_decoder(coarse, source, config, "segmentation")
    assert trained.stride == (341, 341)


@pytest.mark.parametrize(("given", "size"), [({}, 450), ({"resize": (60, 90)}, None), ({"crop": (60, 60)}, 450)])
def test_the_radiology_preset_resizes_out_of_proportion(coarse, folders, given, size):
    train, test = folders
    small = {"steps": 2, "batch_size": 2, "num_workers": 0, "device": "cpu"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figures = pl.evaluate(
            "segmentation", encoder=coarse, train=train, test=test, preset="radiology", **given, **small
        )
    assert figures["resize"] == ([size, size] if size else [60, 90])
    assert figures["crop"] == list(given.get("crop", figures["resize"]))
    assert any("resize (448, 448) of preset radiology" in str(w.message) for w in said) == bool(size)
    assert {"foreground_dice", "foreground_jaccard", "per_class_dice"} <= set(figures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": (32, 32), "short_side": 32}, "exclude each other"),
        ({"clip_grad": 0.0}, "clip_grad is 0.0; it must be above 0"),
        ({"decay": "cosine"}, "decay"),
        ({"encoder": "pixels"}, "raw pixels have none"),
        ({"head": "unett"}, "did you mean unet"),
        ({"head": "unet", "layers": (0, 1)}, "head unet takes 5 blocks; layers names 2"),
        ({"layers": (9,)}, "there is no block 9"),
        ({"crop": (30, 32)}, "30"),
        ({"stride": (0, 4)}, "stride"),
        ({"stride": (64, 64)}, "leave pixels out"),
        ({"steps": 0}, "steps is 0"),
        ({"preset": "dino"}, "unknown preset 'dino'"),
        ({"inference": "slides"}, "did you mean slide"),
        ({"test": "TRAIN"}, "are the same images"),
        ({"test": "FOUR"}, r"holds the value 3; .* has 3 classes"),
        ({"test": "UNKNOWN"}, "no pixel whose class is known"),
        ({"test": "NAMED"}, "differ in their classes: class 1 is 1 and sky"),
        ({"encoder": "NAN", "augment": False}, "features are not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(encoder, folders, tmp_path, change, message):
    train, test = folders
    if change.get("test") == "TRAIN":
        change = {"test": train}
    if change.get("test") == "FOUR":
        change = {"test": str(paint_pairs(tmp_path / "four", 2, classes=4))}
    if change.get("test") == "UNKNOWN":
        root = paint_pairs(tmp_path / "unknown", 1)
        Image.fromarray(np.full((40, 52), 255, np.uint8)).save(root / "masks/0.png")
        change = {"test": str(root)}
    if change.get("encoder") == "NAN":
        broken = copy.deepcopy(encoder)
        torch.nn.init.constant_(broken.norm.weight, float("nan"))
        change = {**change, "encoder": broken}
    if change.get("test") == "NAMED":
        root = paint_pairs(tmp_path / "named", 2)
        (root / "classes.txt").write_text("0\nsky\n2\n")
        change = {"test": str(root)}
    with pytest.raises(UsageError, match=message):
        pl.evaluate("segmentation", **{**FAST, "steps": 4, "encoder": encoder, "train": train, "test": test, **change})


def test_outputs_that_exist_are_refused(folders, encoder, tmp_path):
    (tmp_path / "there.png").write_bytes(b"")
    with pytest.raises(UsageError, match="exists"):
        pl.evaluate(
            "segmentation", encoder=encoder, train=folders[0], test=folders[1], picture=str(tmp_path / "there.png")
        )


def test_pictures_are_pngs_with_a_legend():
    from patchloom.report.masks import segmentation_figure

    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[5:10] = 1
    mask[15:] = 255
    figure = segmentation_figure(
        [torch.rand(3, 20, 30)], {"truth": [mask], "prediction": [mask]}, [(255, 0, 0), (0, 0, 255)], ["road", "sky"]
    )
    pixels = np.asarray(Image.open(io.BytesIO(figure.png)))
    reached = {tuple(pixel) for pixel in pixels.reshape(-1, 4)}
    assert {(255, 0, 0, 255), (0, 0, 255, 255), (0, 0, 0, 255)} <= reached
    with pytest.raises(UsageError, match="at least one image"):
        segmentation_figure([], {}, [], [])


def noise(root, count, values):
    rng = np.random.default_rng(len(str(root)))
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(rng.choice(values, (32, 32)).astype(np.uint8)).save(root / f"masks/{number}.png")
    return str(root)


def test_binary_masks_at_random_score_as_chance(encoder, tmp_path, capsys):
    train, test = noise(tmp_path / "train", 8, [0, 255]), noise(tmp_path / "measured", 8, [0, 255])
    figures = pl.evaluate("segmentation", encoder=encoder, train=train, test=test, augment=False, **FAST)
    assert figures["miou"] < 0.45  # half the pixels right: 1/3
    assert figures["interval"][0] < figures["miou"] < figures["interval"][1]
    assert figures["masks"]["mask_values"] == {"0": "background", "255": "foreground"}
    assert figures["masks"]["guessed"]
    shares = figures["masks"]["test"]["class_shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["foreground"] == pytest.approx(0.5, abs=0.03)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said[:2]] == [f"masks of {train}", f"masks of {test}"]
    with pytest.raises(UsageError, match=r"hold one class only, 0, and .* is ignored"):
        pl.evaluate("segmentation", encoder=encoder, train=train, test=test, ignore_label=255, **FAST)


def test_dozens_of_grey_levels_end_at_once_with_a_sentence(encoder, tmp_path):
    train, test = (noise(tmp_path / name, 2, np.arange(48) * 5) for name in ("train", "measured"))
    with pytest.raises(UsageError, match=r"hold 48 values: .*--foreground 118 .*--mask_values 0\.\.235"):
        pl.evaluate("segmentation", encoder=encoder, train=train, test=test, **FAST)
    settings = dict(encoder=encoder, train=train, test=test, augment=False, **{**FAST, "steps": 2})
    figures = pl.evaluate("segmentation", foreground=118, **settings)
    assert figures["masks"]["mask_values"] == {"rest": "background", "118..": "foreground"}
    assert set(figures["per_class_iou"]) == {"background", "foreground"}


def test_much_that_is_ignored_by_request_is_said_first(encoder, tmp_path, capsys):
    train, test = (noise(tmp_path / name, 3, [0, 1, 255, 255, 255]) for name in ("train", "measured"))
    settings = dict(encoder=encoder, train=train, test=test, augment=False, **{**FAST, "steps": 2})
    with pytest.raises(UsageError, match="are ignored, which was a guess; 255 is taken as unknown"):
        pl.evaluate("segmentation", **settings)
    figures = pl.evaluate("segmentation", ignore_label=255, **settings)
    assert list(figures)[:2] == ["protocol", "notice"]
    assert "of the pixels of the masks of" in figures["notice"]
    assert capsys.readouterr().err.splitlines()[0].startswith(figures["notice"].split(";")[0])


def test_progress_is_said_in_lines_where_there_is_no_terminal(encoder, folders, capsys, monkeypatch):
    monkeypatch.setattr("patchloom.base.progress.EVERY_SECONDS", 0.0)
    train, test = folders
    pl.evaluate("segmentation", encoder=encoder, train=train, test=test, augment=False, **{**FAST, "steps": 3})
    said = capsys.readouterr().err
    assert re.search(r"step 3/3  epoch .*  loss \d\.\d+  .* images/s  .* left", said)
    assert re.search(r"segmenting 5/6  .* images/s  .* left", said)
