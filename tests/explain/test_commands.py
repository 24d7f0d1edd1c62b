"""The commands leave galleries one can open; bad requests are told in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

import patchloom as pl
from explain.models import classifier, prompt_cam
from patchloom.cli import main
from patchloom.errors import UsageError

CLASSES = ["brick", "cat", "coins", "flower", "moon"]


@pytest.fixture
def model():
    made = prompt_cam().float()
    made.encoder.pretrained_cfg = {**made.encoder.pretrained_cfg, "label_names": CLASSES}
    return made


def settings(tmp_path, **more):
    return {
        "images": "photos:test",
        "out": str(tmp_path / "out"),
        "num_workers": 0,
        "limit": 4,
        "device": "cpu",
        **more,
    }


def test_traits_show_the_true_class_where_it_is_known(model, tmp_path):
    gallery = pl.explain("prompt_cam", model=model, **settings(tmp_path, limit=12, top=2))
    figures = json.loads((gallery.path / "explanation.json").read_text())
    rows = figures["images_explained"]
    assert len(rows) == 12
    for row in rows:
        photograph = row["image"].split("-")[0]
        assert row["class"] == (photograph if photograph in CLASSES else row["predicted"])
        assert sorted(row["heads_by_importance"]) == [0, 1, 2, 3]
        assert row["kept"] == row["heads_by_importance"][:2]
        assert len(row["probability_as_heads_go"]) == 4
    maps = np.load(gallery.path / "maps" / "maps.npy")
    assert maps.shape == (12, 4, 4, 4)
    assert maps.sum((2, 3)).max() < 1
    page = gallery.page.read_text()
    assert all(row["image"] in page for row in rows)
    assert page.count("data:image/png") >= 13
    assert "patchloom explain prompt_cam --model MODEL" in page
    assert len(list((gallery.path / "pictures").glob("*.png"))) == page.count("data:image/png")


def test_the_fewest_heads_and_a_class_asked_for(model, tmp_path):
    gallery = pl.explain("prompt_cam", model=model, **settings(tmp_path, until="misclassified", class_name="moon"))
    assert gallery.figures["class_shown"] == ["moon"] * 4
    for row in gallery.figures["images_explained"]:
        if row["predicted"] != "moon":
            assert len(row["kept"]) == 4


@pytest.mark.slow
def test_two_classes_are_told_apart_on_images_of_the_first(model, tmp_path):
    gallery = pl.explain(
        "prompt_cam", model=model, **settings(tmp_path, limit=60, class_name="moon", against="coins", top=3)
    )
    assert gallery.figures["images"]
    assert all(key.startswith("moon") for key in gallery.figures["images"])
    drops = np.load(gallery.path / "maps" / "drops.npy")
    assert drops.shape == (len(gallery.figures["images"]), 4)
    assert gallery.figures["heads_by_importance"] == (-drops.mean(0)).argsort().tolist()
    assert "moon against coins" in gallery.page.read_text()


def test_attention_of_an_encoder_and_of_a_classifier(tmp_path):
    encoder = classifier().float()
    gallery = pl.explain("attention", model=encoder, **settings(tmp_path))
    assert set(gallery.figures["maps"]) == {"heads", "rollout", "grad_cam", "gradient_attention"}
    encoder.reset_classifier(0)
    gallery = pl.explain("attention", model=encoder, **settings(tmp_path, overwrite=True, layer=0))
    assert gallery.figures["maps"] == {"heads": [4, 4, 4, 4], "rollout": [4, 4, 4]}
    assert gallery.figures["class_shown"] is None


def test_a_comparison_ranks_all_explanations_by_one_judge(model, tmp_path):
    gallery = pl.explain("compare", model=model, **settings(tmp_path, steps=8, pictured=2))
    table = gallery.figures["table"]
    assert [row["explanation"] for row in table][:2] == ["Prompt-CAM", "class-token attention"]
    assert len(table) == 6
    for row in table:
        difference = float(row["insertion ↑"]) - float(row["deletion ↓"])
        assert float(row["difference ↑"]) == pytest.approx(difference, abs=2e-3)
    scores = gallery.figures["scores"]["rollout"]["insertion"]
    assert len(scores) == 4
    chosen = pl.explain(
        "compare",
        model=classifier().float(),
        **settings(tmp_path, steps=4, overwrite=True, methods=["rollout", "random"]),
    )
    assert set(chosen.figures["scores"]) == {"rollout", "random"}


def test_the_command_line_explains_a_bundle(tmp_path, capsys):
    from patchloom.models.bundle import save_bundle

    bundle = save_bundle(classifier().float(), tmp_path / "bundle")
    arguments = [
        "explain",
        "attention",
        "--model",
        str(bundle),
        "--images",
        "photos:test",
        "--out",
        str(tmp_path / "maps"),
    ]
    assert main([*arguments, "--limit", "2", "--num_workers", "0"]) == 0
    assert "index.html" in capsys.readouterr().out
    assert main([*arguments, "--limit", "2"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (
        main(["explain", "prompt_cam", "--model", str(bundle), "--images", "photos", "--out", str(tmp_path / "b")]) == 2
    )
    assert "no class prompts" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main(["explain", "--help"]) == 0
    assert "prompt_cam" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "mon"}, "did you mean moon"),
        ({"class_name": "moon", "against": "sun"}, "unknown class 'sun'"),
        ({"class_name": "moon", "against": "moon"}, "two different classes"),
        ({"against": "moon"}, "needs class_name"),
        ({"top": 0}, "top is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"images": "nowhere"}, "no image folder"),
        ({"until": "never"}, "unknown until"),
        ({"topp": 3}, "did you mean top"),
    ],
)
def test_bad_requests_leave_nothing_behind(model, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        pl.explain("prompt_cam", model=model, **settings(tmp_path, **change))
    assert not (tmp_path / "out").exists()


def test_other_bad_requests(model, tmp_path):
    with pytest.raises(UsageError, match="unknown explanation 'lime'"):
        pl.explain("lime", model=model, **settings(tmp_path))
    with pytest.raises(UsageError, match="unknown explanation 'lime'"):
        pl.explain("compare", model=model, **settings(tmp_path, methods=["lime"]))
    with pytest.raises(UsageError, match="named twice"):
        pl.explain("compare", model=model, **settings(tmp_path, methods=["rollout", "rollout"]))
    with pytest.raises(UsageError, match="no class prompts"):
        pl.explain("compare", model=classifier().float(), **settings(tmp_path, methods=["prompt_cam"]))
    no_classes = classifier().float()
    no_classes.reset_classifier(0)
    with pytest.raises(UsageError, match="no classes to explain"):
        pl.explain("compare", model=no_classes, **settings(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="holds no gallery"):
        pl.explain("attention", model=model, **settings(tmp_path, overwrite=True))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"
    with pytest.raises(UsageError, match="is a file"):
        pl.explain("attention", model=model, **settings(tmp_path) | {"out": str(tmp_path / "out" / "mine.txt")})
