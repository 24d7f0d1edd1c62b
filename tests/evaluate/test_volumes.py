"""Volumes, classified and segmented slice by slice."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.encoders import create_encoder, pooled
from patchloom.errors import UsageError
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.volume_segmentation import Case, case_scores
from patchloom.evaluate.volumes import encoder_images, pool_slices, slice_encode
from patchloom.segment.metrics import areas, dice, hausdorff
from volume_support import class_volumes, paint_volumes, save_nifti

nibabel = pytest.importorskip("nibabel")
pytestmark = pytest.mark.extra("medical")
FAST = {"steps": 80, "batch_size": 6, "lr": 2e-2, "num_workers": 0, "warmup": 5, "device": "cpu", "rotate": 0.0}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder(
        "vit_tiny_patch16_224", image_size=24, patch_size=4, embed_dim=32, depth=5, num_heads=2
    ).eval()


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    return str(paint_volumes(root / "train", 4)), str(paint_volumes(root / "test", 3, seed=1))


@pytest.fixture(scope="module")
def sorted_volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    return str(class_volumes(root / "train", 6)), str(class_volumes(root / "test", 4, seed=1))


def test_padding_slices_are_never_seen(encoder):
    volumes = torch.randn(2, 4, 3, 24, 24)
    found = slice_encode(encoder, volumes, [4, 2], batch_size=3)
    assert [x.shape for x in found] == [(4, 32), (2, 32)]
    torch.testing.assert_close(found[1], pooled(encoder, volumes[1, :2]))
    volumes[1, 2:] = float("nan")
    torch.testing.assert_close(slice_encode(encoder, volumes, [4, 2])[1], found[1])
    assert torch.equal(pool_slices(found[0], "mean"), found[0].mean(0))
    assert torch.equal(pool_slices(found[0], "max"), found[0].max(0).values)
    with pytest.raises(UsageError, match="lengths"):
        slice_encode(encoder, volumes, [5, 2])
    with pytest.raises(UsageError, match="unknown pooling of slices"):
        pool_slices(found[0], "sum")


@pytest.mark.parametrize("slice_pool", ["mean", "max", "attention"])
def test_balls_are_found(encoder, sorted_volumes, slice_pool, tmp_path):
    train, test = sorted_volumes
    figures = pl.evaluate(
        "volumes",
        encoder=encoder,
        train=train,
        test=test,
        slice_pool=slice_pool,
        window="ct",
        device="cpu",
        lr=1e-2,
        predictions=str(tmp_path / "said.npz"),
    )
    assert figures["score"] > 0.85
    low, high = figures["interval"]
    assert low <= figures["score"] <= high
    assert figures["n"] == 8
    assert figures["slices"]["test"] > 8
    kept = Predictions.load(tmp_path / "said.npz")
    assert kept.interval().value == pytest.approx(figures["score"])
    json.dumps(figures)


def test_features_of_slices_are_kept_until_something_changes(encoder, sorted_volumes, tmp_path, monkeypatch):
    from patchloom.evaluate import volumes

    train, test = sorted_volumes
    encoded = []
    original = volumes.slice_encode
    monkeypatch.setattr(volumes, "slice_encode", lambda *given, **named: encoded.append(1) or original(*given, **named))

    def measure(cache=str(tmp_path / "cache"), model=encoder, **settings):
        encoded.clear()
        given = {"window": "ct", "device": "cpu", "lr": 1e-2, "draws": 20, **settings}
        figures = pl.evaluate("volumes", encoder=model, train=train, test=test, cache=cache, **given)
        return {name: value for name, value in figures.items() if name != "seconds"}, len(encoded)

    apart, first = measure(cache="none")
    assert first == 20  # 12 and 8 volumes
    assert measure() == (apart, 20)
    assert measure() == (apart, 0)
    assert measure(slice_pool="max")[1] == 0
    assert measure(slices=3)[1] == 20
    changed = copy.deepcopy(encoder)
    with torch.no_grad():
        changed.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
    assert measure(model=changed)[1] == 20


def test_slices_keep_their_proportions_and_can_be_fewer(tmp_path):
    from patchloom.data.volumes import open_volumes

    save_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).random((10, 20, 9)))
    volume = open_volumes(str(tmp_path)).volume(0)
    images = encoder_images(volume, "minmax", (24, 24), 3)
    assert images.shape == (9, 3, 24, 24)
    assert not images[..., :6].any()
    assert not images[..., 18:].any()
    assert images[..., 6:18].any(-1).all()
    assert torch.equal(encoder_images(volume, "minmax", (24, 24), 1, slices=3)[:, 0], images[[0, 4, 8], 0])


@pytest.mark.parametrize(("head", "size"), [("unet", {}), ("bn", {"resize": (32, 48)}), ("bn", {"short_side": 32})])
def test_balls_are_outlined_and_written_back(encoder, painted, tmp_path, head, size):
    train, test = painted
    figures = pl.evaluate(
        "volume_segmentation",
        encoder=encoder,
        train=train,
        test=test,
        head=head,
        loss="dice+ce",
        masks=str(tmp_path / "masks"),
        **size,
        **FAST,
    )
    assert figures["dice"] > 0.6
    low, high = figures["interval"]
    assert low <= figures["dice"] <= high
    assert set(figures["per_class_dice"]) == {"1"}
    json.dumps(figures)
    saved = sorted((tmp_path / "masks").iterdir())
    assert [file.name for file in saved] == [f"case{n}_0000.nii.gz" for n in range(3)]
    for number, file in enumerate(saved):
        said = np.asarray(nibabel.load(file).dataobj)
        truth = np.asarray(nibabel.load(f"{test}/masks/case{number}.nii.gz").dataobj)
        own = dice(areas(torch.from_numpy(said.copy()), torch.from_numpy(truth.copy()), 2))[1]
        assert figures["cases"][f"images/case{number}_0000.nii.gz"] == pytest.approx(float(own))
    distances = [
        hausdorff(
            np.asarray(nibabel.load(file).dataobj) == 1,
            np.asarray(nibabel.load(f"{test}/masks/case{n}.nii.gz").dataobj) == 1,
        )
        for n, file in enumerate(saved)
    ]
    assert figures["hausdorff95"] == pytest.approx(np.mean(distances), rel=1e-5)


def test_published_scores_do_not_see_false_alarms(encoder, painted):
    train, test = painted
    settings = dict(encoder=encoder, train=train, test=test, head="bn", hausdorff=False, **{**FAST, "steps": 15})
    own, published = (pl.evaluate("volume_segmentation", as_published=flag, **settings) for flag in (False, True))
    assert published["dice"] > own["dice"]
    assert own["hausdorff95"] is None


def test_odd_spacing_gives_a_warning_and_scores_of_the_original_voxels(encoder, tmp_path):
    for part, seed in (("train", 0), ("test", 1)):
        root = paint_volumes(tmp_path / part, 3, seed=seed)
        for folder in ("images", "masks"):
            for file in (root / folder).iterdir():
                image = nibabel.load(file)
                save_nifti(file, np.asarray(image.dataobj).copy(), np.diag([0.5, 1.0, 4.0, 1.0]))
    with pytest.warns(UserWarning, match="resampled to square"):
        figures = pl.evaluate(
            "volume_segmentation",
            encoder=encoder,
            train=str(tmp_path / "train"),
            test=str(tmp_path / "test"),
            head="bn",
            loss="dice+ce",
            masks=str(tmp_path / "masks"),
            **FAST,
        )
    assert figures["dice"] > 0.5
    assert nibabel.load(tmp_path / "masks/case0_0000.nii.gz").shape == (24, 28, 6)


def test_a_class_missed_everywhere_is_counted_and_one_nowhere_left_out():
    truth = torch.zeros(2, 4, 4, dtype=torch.uint8)
    truth[:, :2] = 1
    said = truth.clone()
    said[0] = 0

    def case(key, said, truth):
        found = areas(said, truth, 3)
        return Case(key, found, dice(found), [hausdorff(said == n, truth == n) for n in (1, 2)])

    empty = torch.zeros_like(truth)
    scores = case_scores([case("a", said, truth), case("b", empty, truth), case("c", empty, empty)], ["-", "x", "y"])
    assert scores["per_class_dice"]["x"] == pytest.approx((2 * 8 / 24 + 0) / 2)
    assert scores["per_class_dice"]["y"] is None
    assert scores["dice"] == pytest.approx(1 / 3)
    assert scores["missed_or_made_up"] == 1
    assert scores["classes_not_in_test"] == ["y"]
    assert scores["cases"] == {"a": pytest.approx(2 / 3), "b": 0.0, "c": None}
    assert math.isfinite(scores["hausdorff95"])


def test_broken_volumes_are_left_out_and_listed(encoder, sorted_volumes, tmp_path):
    train, _ = sorted_volumes
    test = class_volumes(tmp_path / "test", 2, seed=5)
    (test / "ill/0.nii.gz").write_bytes(b"no volume")
    figures = pl.evaluate("volumes", encoder=encoder, train=train, test=str(test), device="cpu")
    assert figures["n"] == 3
    assert figures["skipped"][0]["file"] == "ill/0.nii.gz"


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("volumes", {"encoder": "pixels"}, "volumes need an encoder"),
        ("volumes", {"slice_pool": "average"}, "unknown slice_pool"),
        ("volumes", {"window": "pet"}, "unknown window"),
        ("volumes", {"slices": 0}, "slices is 0"),
        ("volumes", {"view": "whole"}, "see window instead"),
        ("volumes", {"test": "TRAIN"}, "the same volumes"),
        ("volumes", {"test": "PAINTED"}, "has no classes"),
        ("volumes", {"encoder": "NAN"}, "not finite"),
        ("volume_segmentation", {"test": "SORTED"}, "has no masks"),
        ("volume_segmentation", {"train": "SORTED"}, "has no masks"),
        ("volume_segmentation", {"test": "TRAIN"}, "the same volumes"),
        ("volume_segmentation", {"head": "unett"}, "did you mean unet"),
        ("volume_segmentation", {"preset": "dino"}, "unknown preset"),
        ("volume_segmentation", {"encoder": "pixels"}, "raw pixels have none"),
    ],
)
def test_what_cannot_be_measured_is_refused(encoder, painted, sorted_volumes, protocol, change, message):
    train, test = sorted_volumes if protocol == "volumes" else painted
    broken = copy.deepcopy(encoder)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    words = {"TRAIN": train, "PAINTED": painted[0], "SORTED": sorted_volumes[0], "NAN": broken}
    change = {name: words.get(value, value) if isinstance(value, str) else value for name, value in change.items()}
    fast = {} if protocol == "volumes" else {**FAST, "steps": 2}
    with pytest.raises(UsageError, match=message):
        pl.evaluate(protocol, **{"encoder": encoder, "train": train, "test": test, "device": "cpu", **fast, **change})
