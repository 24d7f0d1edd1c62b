"""Bundles: they give back the same model, here and in timm alone, or say why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from patchloom.encoders import create_encoder, set_image_size
from patchloom.errors import UsageError
from patchloom.models import bundle
from patchloom.models.bundle import bundle_fingerprint, load, read_lineage, save_bundle
from patchloom.models.start import start_encoder

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
ENCODERS = {
    "ccvit": ("ccvit_tiny_patch8_64", {"image_size": 32, **SMALL}),
    "ccvit, grey": ("ccvit_tiny_patch4_32", {"image_size": 16, "in_chans": 1, **SMALL}),
    "vit": ("vit_tiny_patch16_224", {"image_size": 32, **SMALL}),
    "vit, oblong": ("vit_tiny_patch16_224", {"image_size": (32, 48), **SMALL}),
    "beit": ("beit_base_patch16_224", {"image_size": 32, **SMALL}),
    "eva": ("eva02_tiny_patch14_224", {"image_size": 28, **SMALL}),
    "registers and rope": ("vit_small_patch16_dinov3", {"image_size": 32, **SMALL}),
}
# Opens a bundle with timm alone, and writes what it makes of the images beside it.
OPENED_ELSEWHERE = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
bundle, images, out = sys.argv[1:]
model = timm.create_model("local-dir:" + bundle, pretrained=True).eval()
with torch.no_grad():
    save_file({"out": model(load_file(images)["images"])}, out)
assert not any(name.split(".")[0] == "patchloom" for name in sys.modules), "patchloom was imported"
"""


def randomised(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor random values, those that start at zero or one too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return encoder.eval()


def images_for(encoder, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = encoder.patch_embed.proj.weight.shape[1]
    return torch.randn(2, channels, *encoder.patch_embed.img_size, generator=generator)


@pytest.fixture
def encoder():
    name, options = ENCODERS["ccvit"]
    return randomised(create_encoder(name, **options))


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_a_bundle_gives_back_the_same_features(kind, tmp_path):
    name, options = ENCODERS[kind]
    encoder = randomised(create_encoder(name, **options))
    save_bundle(encoder, tmp_path / "b")
    again = load(tmp_path / "b")
    images = images_for(encoder)
    assert torch.equal(again(images), encoder(images))
    assert not again.training
    assert again.patchloom_args["architecture"] == name
    assert again.pretrained_cfg["mean"] == list(encoder.pretrained_cfg["mean"])


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_saving_what_was_loaded_changes_nothing(kind, tmp_path):
    name, options = ENCODERS[kind]
    encoder = randomised(create_encoder(name, **options))
    save_bundle(encoder, tmp_path / "first")
    save_bundle(load(tmp_path / "first"), tmp_path / "second")
    assert bundle_fingerprint(tmp_path / "first") == bundle_fingerprint(tmp_path / "second")
    first, second = (json.loads((tmp_path / b / "config.json").read_text()) for b in ("first", "second"))
    assert {k: v for k, v in first.items() if k != "model_args"} == {
        k: v for k, v in second.items() if k != "model_args"
    }
    assert first["model_args"].items() <= second["model_args"].items()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 5])
@torch.no_grad()
def test_timm_alone_opens_a_bundle(classes, tmp_path):
    name, options = ENCODERS["ccvit"]
    encoder = create_encoder(name, **options)
    encoder.reset_classifier(classes)
    randomised(encoder)
    save_bundle(encoder, tmp_path / "b")
    images = images_for(encoder)
    save_file({"images": images}, tmp_path / "images.safetensors")
    # Isolated: neither the environment nor the working folder can bring our package in.
    command = [sys.executable, "-I", "-c", OPENED_ELSEWHERE, "b", "images.safetensors", "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "out.safetensors")["out"]
    assert got.shape == (2, classes or 48)
    torch.testing.assert_close(got, encoder(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timm_puts_a_new_classifier_on_a_bundle(encoder, tmp_path):
    save_bundle(encoder, tmp_path / "b")
    model = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True, num_classes=3).eval()
    images = images_for(encoder)
    assert model(images).shape == (2, 3)
    assert torch.equal(model.forward_head(model.forward_features(images), pre_logits=True), encoder(images))


@torch.no_grad()
def test_a_classifier_keeps_its_logits_and_gives_an_encoder(encoder, tmp_path):
    encoder.reset_classifier(4)
    randomised(encoder)
    save_bundle(encoder, tmp_path / "b")
    images = images_for(encoder)
    assert torch.equal(load(tmp_path / "b")(images), encoder(images))
    assert encoder(images).shape == (2, 4)
    bare = start_encoder(str(tmp_path / "b")).eval()
    assert torch.equal(bare(images), encoder.forward_head(encoder.forward_features(images), pre_logits=True))


@torch.no_grad()
def test_a_fine_tuned_model_with_a_table_per_block_comes_back(encoder, tmp_path):
    from patchloom.training.supervised import as_classifier

    classifier = randomised(as_classifier(encoder, 3))
    save_bundle(classifier, tmp_path / "b")
    images = images_for(encoder)
    for again in (load(tmp_path / "b"), timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()):
        assert torch.equal(again(images), classifier(images))


@torch.no_grad()
def test_an_encoder_set_to_another_size_is_saved_at_that_size(encoder, tmp_path):
    set_image_size(encoder, 48)
    save_bundle(encoder, tmp_path / "b")
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(load(tmp_path / "b")(images), encoder(images))


@torch.no_grad()
def test_a_plain_timm_model_is_saved_with_the_arguments_it_was_made_with(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, drop_path_rate=0.1, reg_tokens=2, **SMALL
    )
    save_bundle(randomised(model), tmp_path / "b")
    images = images_for(model)
    assert torch.equal(load(tmp_path / "b")(images), model(images))
    assert "drop_path_rate" not in json.loads((tmp_path / "b" / "config.json").read_text())["model_args"]


def test_weights_are_stored_in_the_type_they_have(encoder, tmp_path):
    save_bundle(encoder.to(torch.bfloat16), tmp_path / "b")
    assert {v.dtype for v in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.bfloat16}
    assert load(tmp_path / "b").cls_token.dtype == torch.float32


def test_lineage_comes_back_also_through_a_run_folder(encoder, tmp_path):
    lineage = {"made_by": "pretrain ccvit", "from": None, "settings": {"epochs": 3}}
    save_bundle(encoder, tmp_path / "run" / "model", lineage=lineage)
    assert read_lineage(tmp_path / "run") == read_lineage(tmp_path / "run" / "model") == lineage
    assert load(tmp_path / "run").embed_dim == 48
    about = json.loads((tmp_path / "run" / "model" / "patchloom.json").read_text())
    assert about["versions"]["timm"] == timm.__version__


def test_a_bundle_of_another_maker_has_no_lineage(encoder, tmp_path):
    save_bundle(encoder, tmp_path / "b", lineage={"made_by": "x"})
    (tmp_path / "b" / "patchloom.json").unlink()
    assert read_lineage(tmp_path / "b") == {}
    assert load(tmp_path / "b").patchloom_args["architecture"] == "beit_base_patch16_224"


def test_the_fingerprint_tells_weights_apart(encoder, tmp_path):
    save_bundle(encoder, tmp_path / "a")
    save_bundle(randomised(encoder, seed=7), tmp_path / "b")
    assert bundle_fingerprint(tmp_path / "a") != bundle_fingerprint(tmp_path / "b")


def test_nothing_is_replaced_unasked(encoder, tmp_path):
    save_bundle(encoder, tmp_path / "b")
    before = bundle_fingerprint(tmp_path / "b")
    randomised(encoder, seed=7)
    with pytest.raises(UsageError, match="exists; choose another folder, or set overwrite"):
        save_bundle(encoder, tmp_path / "b")
    assert bundle_fingerprint(tmp_path / "b") == before
    save_bundle(encoder, tmp_path / "b", overwrite=True)
    assert bundle_fingerprint(tmp_path / "b") != before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_is_no_bundle_is_never_replaced(encoder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "notes.txt").write_text("notes")
    for name, message in (("photos", "holds no bundle"), ("notes.txt", "is a file")):
        with pytest.raises(UsageError, match=message):
            save_bundle(encoder, tmp_path / name, overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cat.png", "notes.txt", "photos"]


def test_a_write_that_fails_leaves_the_old_bundle(encoder, tmp_path, monkeypatch):
    save_bundle(encoder, tmp_path / "b")
    before = bundle_fingerprint(tmp_path / "b")
    whole = bundle._write

    def full_disk(path: Path, values: dict) -> None:
        if path.name == "patchloom.json":
            raise OSError("No space left on device")
        whole(path, values)

    monkeypatch.setattr(bundle, "_write", full_disk)
    for target in ("b", "new"):
        with pytest.raises(OSError, match="No space left"):
            save_bundle(randomised(encoder, seed=7), tmp_path / target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert bundle_fingerprint(tmp_path / "b") == before


def test_a_changed_encoder_is_refused_before_anything_is_written(encoder, tmp_path):
    encoder.blocks[0].mlp.extra = nn.Linear(3, 3)
    with pytest.raises(UsageError, match=r"left over: blocks\.0\.mlp\.extra\.weight"):
        save_bundle(encoder, tmp_path / "b")
    with pytest.raises(UsageError, match="a Linear has no name to be made again by"):
        save_bundle(nn.Linear(3, 3), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "model.safetensors").write_bytes(b"short"), "is damaged"),
        (lambda b: (b / "config.json").write_text("{"), "is damaged"),
        (lambda b: (b / "config.json").write_text("{}"), "is damaged .*architecture"),
        (lambda b: (b / "patchloom.json").write_text("{"), "patchloom.json is damaged"),
        (lambda b: (b / "model.safetensors").unlink(), "there is no bundle"),
        (lambda b: set_in_config(b, architecture="vit_of_next_year"), "vit_of_next_year, which timm .* does not know"),
        (lambda b: set_in_config(b, architecture="resnet18"), "cannot be built|is a ResNet"),
        (lambda b: set_in_config(b, num_classes=7), "missing: head.weight, head.bias"),
        (lambda b: drop_tensor(b, "cls_token"), "missing: cls_token"),
        (lambda b: drop_tensor(b, "norm.weight", torch.ones(5)), r"of another shape: norm.weight \(5,\) for \(48,\)"),
    ],
)
def test_a_damaged_bundle_is_refused_with_what_is_wrong(encoder, tmp_path, damage, message):
    save_bundle(encoder, tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(UsageError, match=message) as refused:
        load(tmp_path / "b")
    assert "\n" not in str(refused.value)


def set_in_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def drop_tensor(folder: Path, name: str, other: torch.Tensor | None = None) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(name)
    save_file(state if other is None else state | {name: other}, folder / "model.safetensors")


def test_a_missing_bundle_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist; give a run folder or its model/"):
        load(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        load(tmp_path)
