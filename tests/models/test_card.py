"""The model card says what was recorded, and no place on anybody's disk."""

import json
from pathlib import Path

import pytest
import timm
import torch

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.models.bundle import save_bundle
from patchloom.models.card import public_lineage

FIRST = {
    "made_by": "pretrain mae",
    "data": {"name": "/home/anna/hospital/scans", "images": 900},
    "steps": 70,
    "settings": {"data": "/home/anna/hospital/scans", "out": "/home/anna/runs/a", "epochs": 7, "lr": 0.1},
    "from": None,
}
SECOND = {
    "made_by": "adapt finetune",
    "data": {"name": "clips:/home/anna/labelled", "images": 90},
    "steps": 30,
    "settings": {"data": "clips:/home/anna/labelled", "test": "C:\\anna\\test", "epochs": 3, "groups": None},
    "from": {"path": "/home/anna/runs/a/model", "lineage": FIRST},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    encoder = create_encoder("vit_micro_patch4_32")
    save_bundle(encoder, tmp_path / "run" / "model", lineage=SECOND)
    summary = {"accuracy": 0.8125, "knn_accuracy": 0.75, "verdict": "The features are healthy.", "steps": 30}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    return tmp_path / "run"


def test_the_card_tells_steps_figures_and_gaps_and_timm_opens_the_folder(run: Path, tmp_path: Path) -> None:
    out = Path(pl.export(str(run), out=str(tmp_path / "given"), format="hub"))
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: timm" in card.split("---")[1]
    first, second = card.index("| 1 | `patchloom pretrain mae` | 900 of `scans`"), card.index("| 2 | `patchloom adapt")
    assert first < second
    assert "| accuracy | 0.8125 |" in card
    assert "The features are healthy." in card
    assert "license" in card
    everything = card + (out / "patchloom.json").read_text() + (out / "config.json").read_text()
    assert "anna" not in everything
    model = pl.load(out).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), pl.load(run).eval()(images))


def test_a_run_without_figures_says_so(run: Path, tmp_path: Path) -> None:
    (run / "summary.json").unlink()
    card = (Path(pl.export(str(run), out=str(tmp_path / "given"), format="hub")) / "README.md").read_text()
    assert "Nothing was measured" in card
    assert "train a probe" in card


def test_places_are_cut_and_what_is_no_place_stays() -> None:
    public = public_lineage(SECOND)
    assert public["settings"] == {"data": "clips:labelled", "test": "test", "epochs": 3, "groups": None}
    assert public["from"]["path"] == "model"
    assert public["from"]["lineage"]["settings"] == {"data": "scans", "out": "a", "epochs": 7, "lr": 0.1}
    assert SECOND["data"]["name"] == "clips:/home/anna/labelled"  # the bundle's own is left as it is


def test_timm_alone_opens_a_folder_of_its_own_architecture(tmp_path: Path) -> None:
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, depth=2)
    save_bundle(encoder, tmp_path / "bundle", lineage={})
    out = pl.export(str(tmp_path / "bundle"), out=str(tmp_path / "given"), format="hub")
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    images = torch.rand(1, 3, 32, 32)
    assert torch.allclose(model.eval()(images), encoder.eval()(images), atol=1e-6)
    assert "Not recorded." in (Path(out) / "README.md").read_text()
