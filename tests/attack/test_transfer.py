"""Attacks on a bundle and on an adapter, from the command line and from Python: the table, what is kept, resuming."""

from __future__ import annotations

import csv
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import patchloom as pl
from patchloom.attack.measure import beyond, checks, evaluate_transfer, figures_of
from patchloom.cli import main
from patchloom.encoders import create_encoder
from patchloom.encoders.insertion import insert
from patchloom.errors import UsageError
from patchloom.models.adapters import encoder_hash, save_adapter
from patchloom.models.bundle import save_bundle
from patchloom.systems.adaptformer.model import AdaptFormer
from patchloom.systems.dta.attacks import RandomNoise
from patchloom.systems.dta.features import PixelClassifier
from small_images import write_images

CLASSES = ["blue", "green", "red"]
SHAPE = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Images, a public encoder, a classifier made from it, and an adapter of it."""
    folder = tmp_path_factory.mktemp("attack")
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=16, **SHAPE)
    save_bundle(encoder, folder / "public")
    classifier = pl.load(folder / "public")
    classifier.reset_classifier(3)
    classifier.pretrained_cfg = {**classifier.pretrained_cfg, "label_names": CLASSES[::-1]}
    save_bundle(classifier, folder / "tuned")
    adapted = pl.load(folder / "public")
    base = encoder_hash(adapted)
    insert(adapted, AdaptFormer(adapted, 4, num_classes=3), "adapter")
    save_adapter(adapted, folder / "adapted", base=base, encoder_path=str(folder / "public"), class_names=CLASSES)
    write_images(folder / "images", 4)
    return folder


def settings(places, out, **more):
    quick = {"steps": 2, "search_steps": 1, "curve_images": 0, "pictured": 0, "num_workers": 0, "device": "cpu"}
    return {
        "encoder": str(places / "public"),
        "victim": f"{places / 'tuned'},{places / 'adapted'}",
        "data": str(places / "images"),
        "out": str(out),
        "eps": "8/255",
        **quick,
        **more,
    }


def command(given):
    words = ["attack", "dta"]
    for name, value in given.items():
        words += [f"--{name}", f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)]
    return words


@pytest.mark.slow
def test_every_attack_on_a_bundle_and_an_adapter(places, tmp_path, capsys):
    everything = "[noise,pgd,feature_l2,last,middle,flat,pap,mi,di,ti,dta,universal,white_box]"
    given = settings(places, tmp_path / "out", curve_images=3, curve_levels=(2, 8), pictured=1, limit=6)
    assert main([*command(given), "--attacks", everything, "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)["summary"]
    assert "pgd is left out: public has no classes of its own" in captured.err
    assert "6 of 12 images are attacked" in captured.err
    assert len(summary["table"]) == 2 * 12
    assert {row["victim"] for row in summary["table"]} == {"tuned", "adapted"}
    for row in summary["table"]:
        assert row["error"] == pytest.approx(100 - row["robust"])
        assert row["robust_interval"][0] <= row["robust"] <= row["robust_interval"][1]
        assert row["asr"] is None or row["asr_interval"][0] <= row["asr"] <= row["asr_interval"][1]
    scores = summary["layer_scores"]["public"]
    assert summary["layers"] == {"public": [int(min(scores, key=scores.get))]}
    assert summary["curves"]["tuned"]["eps"]["x"] == [0, 2, 8]
    assert {row["check"] for row in summary["checks"]} == {
        "has something to lose",
        "more than noise",
        "knowing the victim helps",
        "grows with ε",
        "grows with steps",
    }
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text()) == summary
    with (out / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 24
    page = (out / "report.html").read_text()
    assert "Can the figures be trusted?" in page
    assert "patchloom attack dta" in page
    assert (out / "white_box" / "tuned" / "deltas.safetensors").exists()


def test_attacked_images_lie_within_the_ball_on_disk(places, tmp_path):
    run = pl.attack("dta", **settings(places, tmp_path / "out", attacks=("dta", "pap")))
    for name in ("dta", "pap"):
        deltas = load_file(run.path / name / "deltas.safetensors")["deltas"]
        assert deltas.dtype == torch.int16
        assert deltas.abs().max() <= 8
        assert deltas.abs().max() > 4
        about = json.loads((run.path / name / "attack.json").read_text())
        files = sorted((run.path / name / "images").glob("*.png"))
        assert len(files) == len(about["keys"]) == 12
        for number in (0, 11):
            clean = np.asarray(Image.open(places / "images" / about["keys"][number])).astype(int)
            shown = np.asarray(Image.open(files[number])).astype(int)
            assert np.array_equal(shown - clean, deltas[number].permute(1, 2, 0).numpy())


def test_figures_are_those_of_the_stored_images(places, tmp_path):
    run = pl.attack("dta", **settings(places, tmp_path / "out", attacks=("dta",)))
    model = pl.load(places / "tuned")
    names = model.pretrained_cfg["label_names"]
    right = []
    about = json.loads((run.path / "dta" / "attack.json").read_text())
    for key, file in zip(about["keys"], sorted((run.path / "dta" / "images").glob("*.png")), strict=True):
        pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        right.append(names[int(model((pixels - mean) / std).argmax())] == key.split("/")[0])
    row = next(row for row in run.summary["table"] if row["victim"] == "tuned")
    assert row["robust"] == pytest.approx(100 * sum(right) / len(right))
    with (run.path / "predictions.csv").open() as file:
        said = [one for one in csv.DictReader(file) if one["victim"] == "tuned"]
    assert [one["image"] for one in said] == about["keys"]
    assert [one["dta"] == one["class"] == one["image"].split("/")[0] for one in said] == right
    assert 100 * sum(one["clean"] == one["class"] for one in said) / len(said) == pytest.approx(row["clean"])


def test_a_loader_of_ones_own(places):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, n])) for n in range(2)]
    victim = PixelClassifier(pl.load(places / "tuned")).eval()
    noise = RandomNoise(8 / 255, torch.Generator().manual_seed(1))
    (row,) = evaluate_transfer({"noise": noise}, {"tuned": victim}, batches)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert row["clean"] == pytest.approx(100 * float((victim(images).argmax(1) == labels).double().mean()))
    assert (row["attack"], row["victim"], row["n"]) == ("noise", "tuned", 8)
    (rounded,) = evaluate_transfer(lambda x: x, {"tuned": victim}, batches, eps=1.0)
    assert rounded["clean"] == row["clean"]
    with pytest.raises(UsageError, match="no image to attack"):
        evaluate_transfer({}, {}, [])


def test_going_on_makes_what_is_missing_and_nothing_else(places, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(places)
    here = {"encoder": "public", "victim": "tuned,adapted", "data": "images"}
    first = pl.attack("dta", **settings(places, out, attacks=("noise", "dta", "last"), **here))
    monkeypatch.chdir(tmp_path)  # places lead there from anywhere
    kept = (out / "dta" / "deltas.safetensors").stat().st_mtime_ns
    (out / "last" / "attack.json").unlink()  # as if killed before the end
    capsys.readouterr()
    assert main(["attack", "dta", "--resume", "--out", str(out)]) == 0
    assert "last: " in capsys.readouterr().err
    again = json.loads((out / "summary.json").read_text())
    assert again["table"] == first.summary["table"]
    assert (out / "dta" / "deltas.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(UsageError, match="have steps=2, not 3"):
        pl.attack("dta", **settings(places, out, attacks=("noise",), steps=3, resume=True))
    with pytest.raises(UsageError, match="is not empty; resume goes on"):
        pl.attack("dta", **settings(places, out))


def test_how_batches_are_cut_changes_nothing(places, tmp_path):
    tables = [
        pl.attack("dta", **settings(places, tmp_path / str(size), attacks=("noise", "last"), batch_size=size)).summary[
            "table"
        ]
        for size in (12, 5)
    ]
    deltas = [load_file(tmp_path / str(size) / "noise" / "deltas.safetensors")["deltas"] for size in (12, 5)]
    assert torch.equal(*deltas)
    assert tables[0] == tables[1]


def test_two_encoders_and_a_choice_for_each_image(places, tmp_path):
    second = create_encoder("vit_tiny_patch16_224", image_size=32, **SHAPE)
    run = pl.attack(
        "dta",
        **settings(places, tmp_path / "a", attacks=("dta",), encoder=[pl.load(places / "public"), second]),
    )
    assert list(run.summary["layers"]) == ["VisionTransformer", "VisionTransformer'"]
    each = pl.attack("dta", **settings(places, tmp_path / "b", attacks=("dta",), per="sample", optimizer="adam_tanh"))
    assert each.summary["layers"] == "one for each image"


def test_a_victim_of_another_size_resizes_and_that_is_said(places, tmp_path, capsys):
    larger = create_encoder("vit_tiny_patch16_224", image_size=24, **SHAPE)
    larger.reset_classifier(3)
    given = settings(
        places, tmp_path / "out", attacks=("dta",), victim={"larger": larger, "own": str(places / "tuned")}
    )
    run = pl.attack("dta", **given, momentum=1.0, diversity=0.5, smoothing=True)
    told = capsys.readouterr().err
    assert "larger takes images of 24x24 pixels and the encoder of 16x16" in told
    assert "larger does not name its classes" in told
    assert [row["victim"] for row in run.summary["table"]] == ["larger", "own"]


def test_autoattack_is_that_of_torchattacks(places, tmp_path, monkeypatch):
    given = settings(places, tmp_path / "out", attacks=("auto_attack",))
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UsageError, match="pip install torchattacks"):
        pl.attack("dta", **given)
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace())
    with pytest.raises(UsageError, match="tuned has 3 classes and the losses of auto_attack compare 4"):
        pl.attack("dta", **given)
    asked = []

    class AutoAttack:
        def __init__(self, model, eps, n_classes, seed):
            asked.append((eps, n_classes))

        def __call__(self, images, labels):
            return images + 1  # far out of the ball

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(AutoAttack=AutoAttack))
    four = pl.load(places / "public")
    four.reset_classifier(4)
    four.pretrained_cfg = {**four.pretrained_cfg, "label_names": [*CLASSES, "white"]}
    run = pl.attack("dta", **{**given, "victim": {"four": four}})
    assert asked == [(pytest.approx(8 / 255), 4)]
    assert load_file(run.path / "auto_attack" / "four" / "deltas.safetensors")["deltas"].max() == 8


def test_success_is_counted_over_what_was_right():
    labels = torch.tensor([0, 0, 1, 1])
    clean = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    found = figures_of(clean, torch.eye(3)[torch.tensor([1, 0, 0, 1])], labels)
    assert found["asr"] == pytest.approx(100 * 2 / 3)
    assert found["asr_interval"] == pytest.approx([9.43, 99.16], abs=0.01)
    assert (found["n"], found["n_right"]) == (4, 3)
    nothing = figures_of(clean, clean, torch.tensor([2, 2, 2, 0]))
    assert nothing["asr"] is None
    assert nothing["asr_interval"] is None


def test_signs_of_masked_gradients_are_named():
    labels = torch.arange(40) % 2
    right, wrong = torch.eye(2)[labels], torch.eye(2)[1 - labels]
    much, little = beyond(right, wrong, labels), beyond(right, right, labels)
    assert much["points"] == pytest.approx(100)
    good = {"eps": {"x": [1, 8], "robust": [80, 10], "low": [75, 5], "high": [85, 15]}}
    bad = {"eps": {"x": [1, 4, 8], "robust": [40, 10, 60], "low": [35, 5, 55], "high": [45, 15, 65]}}
    assert all(row["good"] for row in checks("v", {"dta": 10, "white_box": 0}, much, good))
    assert not any(row["good"] for row in checks("v", {"dta": 10, "white_box": 40}, little, bad, 10, 50))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": "0"}, "eps is 0"),
        ({"eps": "eight"}, "eps is 'eight'; give a number such as 0.03 or 8/255"),
        ({"steps": 0}, "steps is 0"),
        ({"victim": "{public}"}, "the victim public has no classes"),
        ({"attacks": ("dtaa",)}, "unknown attacks 'dtaa'; did you mean dta?"),
        ({"attacks": ("pgd",)}, "no attack is left to make"),
        ({"attacks": ("universal",), "per": "sample"}, "no per=sample for it"),
        ({"candidates": (7,)}, "there is no block 7; the encoder has blocks 0 to 1"),
        ({"data": "digits"}, "the images show the class 0, and the victim tuned has red, green, blue"),
        ({"curve_levels": (0, 4)}, "curve_levels is (0, 4); each must be at least 1"),
        ({"out": "{images}"}, "is not empty and holds no attacks"),
        ({"resume": True, "overwrite": True}, "set one of them"),
        ({"encoder": ""}, "encoder names no model"),
    ],
)
def test_bad_requests_are_told_in_one_sentence(places, tmp_path, changes, said):
    known = {name: str(places / name) for name in ("public", "images")}
    changes = {name: value.format(**known) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=re.escape(said)):
        pl.attack("dta", **{**settings(places, tmp_path / "out"), **changes})
    assert not (tmp_path / "out").exists()
