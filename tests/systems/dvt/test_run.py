"""The three stages from images to a bundle: what they leave, going on, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.cli import main
from patchloom.encoders import create_encoder, tokens
from patchloom.encoders.denoised import encoder_features
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.systems.dvt import run as run_module
from patchloom.systems.dvt.commands import apply, decompose
from patchloom.systems.dvt.config import DecomposeConfig
from patchloom.systems.dvt.decompose import default_size, denoise_image
from patchloom.systems.dvt.folder import FeatureFolder
from patchloom.systems.dvt.method import training_rate
from patchloom.systems.dvt.pairs import FeaturePairs
from patchloom.systems.dvt.saved import load_denoiser

QUICK = {"num_views": 3, "steps": 4, "batch_tokens": 16, "levels": 2, "pictures": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "bundle"
    torch.manual_seed(0)
    made = create_encoder("vit_tiny_patch16_224", embed_dim=64, depth=2, num_heads=2, image_size=32, patch_size=8)
    save_bundle(made, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg.png", "sub/a.png", "sub/a.jpg", "c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def features(encoder, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "f"
    decompose(DecomposeConfig(encoder=str(encoder), data=str(images), out=str(out), **QUICK))
    return out


@pytest.fixture(scope="module")
def trained(features, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "denoiser"
    quick = {"max_steps": 4, "batch_size": 2, "num_workers": 0, "accelerator": "cpu"}
    return pl.clean("dvt_train", data=str(features), out=str(out), **quick)


def settings(encoder, images, out, **more):
    return DecomposeConfig(encoder=str(encoder), data=str(images), out=str(out), **{**QUICK, **more})


def test_the_folder_has_features_by_image_an_index_a_picture_and_a_page(features, encoder):
    folder = FeatureFolder(features)
    assert sorted(folder.images) == ["a.png", "b.jpg.png", "c.png", "sub/a.jpg", "sub/a.png"]
    files = {entry["file"] for entry in folder.images.values()}
    assert files == {"a.npy", "b.jpg.npy", "c.npy", "sub/a.npy", "sub/a.png.npy"}
    assert (folder.grid, folder.width, folder.index["layer"]) == ((4, 4), 64, 1)
    raw = np.load(features / "features" / "raw" / "sub" / "a.npy")
    assert (raw.shape, raw.dtype) == ((4, 4, 64), np.float16)
    assert len(list((features / "pictures").rglob("*.png"))) == 1
    assert "Features taken apart" in (features / "report.html").read_text()


def test_raw_features_are_those_of_the_whole_image(features, encoder, images):
    from patchloom.data.pixels import resize, unit
    from patchloom.encoders import normalize

    model = pl.load(encoder)
    pixels = torch.from_numpy(np.array(Image.open(images / "c.png"))).permute(2, 0, 1)
    expected, _ = encoder_features(model, normalize(resize(unit(pixels), (32, 32))[None], model))
    torch.testing.assert_close(FeatureFolder(features).read("c.png", "raw"), expected[0], atol=5e-3, rtol=5e-3)


def test_a_run_that_stopped_goes_on_and_gives_the_same(features, encoder, images, tmp_path, monkeypatch):
    out = tmp_path / "f"
    made = run_module.denoise_images
    calls = []

    def stops(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(*args, **kwargs)

    monkeypatch.setattr(run_module, "denoise_images", stops)
    with pytest.raises(KeyboardInterrupt):
        decompose(settings(encoder, images, out, images_at_once=2))
    assert len(FeatureFolder(out).images) == 2
    (out / "features" / "denoised" / "a.npy").unlink()  # known, and gone
    result = decompose(settings(encoder, images, out, images_at_once=1))
    assert (result["images"], result["new"]) == (5, 4)
    whole = FeatureFolder(features)
    for key in whole.images:
        torch.testing.assert_close(
            FeatureFolder(out).read(key, "denoised"), whole.read(key, "denoised"), atol=2e-2, rtol=2e-2
        )
    assert decompose(settings(encoder, images, out))["new"] == 0


def test_other_settings_another_encoder_and_other_folders_are_refused(features, encoder, images, tmp_path):
    with pytest.raises(UsageError, match="num_views=3, not 5"):
        decompose(settings(encoder, images, features, num_views=5))
    other = create_encoder("vit_tiny_patch16_224", embed_dim=64, depth=2, num_heads=2, image_size=32, patch_size=8)
    save_bundle(other, tmp_path / "other")
    with pytest.raises(UsageError, match="encoder hash"):
        decompose(settings(tmp_path / "other", images, features))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="holds no features of DVT; choose another out"):
        decompose(settings(encoder, images, tmp_path / "full"))
    with pytest.raises(UsageError, match="divisible"):
        decompose(settings(encoder, images, tmp_path / "new", image_size=30))
    with pytest.raises(UsageError, match="blocks 0 to 1"):
        decompose(settings(encoder, images, tmp_path / "new", layer=2))
    with pytest.raises(UsageError, match="patch tokens"):
        decompose(settings(create_backbone_bundle(tmp_path), images, tmp_path / "new"))


def create_backbone_bundle(folder):
    from patchloom.encoders import create_backbone

    save_bundle(create_backbone("resnet18", image_size=32), folder / "resnet")
    return folder / "resnet"


def test_views_that_tell_nothing_are_warned_of(encoder, capsys):
    denoise_image(str(encoder), torch.rand(3, 40, 40), **{**QUICK, "crop_scale": (0.95, 1.0)})
    said = capsys.readouterr().err
    assert "3 views are too few" in said
    assert "crops of at least 95%" in said


def test_an_image_in_memory_is_taken_apart(encoder):
    found = denoise_image(pl.load(encoder), torch.rand(3, 40, 40), **QUICK)
    assert found.denoised.shape == (4, 4, 64)
    torch.testing.assert_close(found.subtracted, found.raw - found.artifact - found.residual)
    assert found.artifact_share >= 0


def test_the_size_is_the_papers_for_encoders_made_for_224_pixels_and_more():
    assert default_size(create_encoder("vit_tiny_patch16_224", depth=1)) == (512, 512)
    assert default_size(create_encoder("vit_small_patch14_dinov2", depth=1)) == (518, 518)
    assert default_size(create_encoder("ccvit_tiny_patch8_64")) == (64, 64)


def test_an_unreadable_image_is_left_out_and_told_of(encoder, images, tmp_path, capsys):
    data = tmp_path / "images"
    shutil.copytree(images, data)
    (data / "broken.png").write_bytes(b"no image")
    result = decompose(settings(encoder, data, tmp_path / "f"))
    assert result["images"] == 5
    assert [each["file"] for each in result["skipped"]] == ["broken.png"]


def test_the_denoiser_trains_on_pairs_and_is_measured_on_others(trained, features):
    assert trained.summary["held_out_images"] == 1
    assert trained.summary["steps"] == 4
    assert {"held_out_ratio", "raw_cosine"} <= set(trained.summary)
    denoiser, about = load_denoiser(trained.path)
    assert denoiser.grid_size == (4, 4)
    assert about["encoder_hash"] == FeatureFolder(features).index["encoder_hash"]
    assert "Denoised features" in trained.report.read_text()


def test_training_goes_on_to_the_bit(trained, features, tmp_path):
    quick = {"max_steps": 4, "batch_size": 2, "num_workers": 0, "accelerator": "cpu", "report": False}
    from patchloom.systems.dvt.method import DVTTrainMethod

    made = DVTTrainMethod.training_loss
    count = []

    def stops(self, batch):
        count.append(1)
        if len(count) == 4:
            raise RuntimeError("stopped")
        return made(self, batch)

    DVTTrainMethod.training_loss = stops
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            pl.clean("dvt_train", data=str(features), out=str(tmp_path / "r"), checkpoint_every=1, **quick)
    finally:
        DVTTrainMethod.training_loss = made
    again = pl.clean("dvt_train", out=str(tmp_path / "r"), resume=True)
    assert again.summary["steps"] == 4
    first, second = load_denoiser(trained.path)[0].state_dict(), load_denoiser(again.path)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_bundle_is_an_encoder_as_any_other(trained, encoder, tmp_path):
    bundle = apply(str(trained.path), str(tmp_path / "clean"))
    model, plain = pl.load(bundle), pl.load(encoder)
    pixels = torch.randn(2, 3, 32, 32)
    raw, prefix = encoder_features(plain, pixels)
    expected = load_denoiser(trained.path)[0](raw).flatten(1, 2)
    torch.testing.assert_close(tokens(model, pixels).patches, expected)
    torch.testing.assert_close(tokens(model, pixels).prefix, prefix)
    # The run itself is opened as the same.
    torch.testing.assert_close(tokens(pl.load(trained.path), pixels).patches, expected)
    lineage = json.loads((tmp_path / "clean" / "patchloom.json").read_text())["lineage"]
    assert lineage["from"]["lineage"]["made_by"] == "clean dvt_train"
    with pytest.raises(UsageError, match="exists"):
        apply(str(trained.path), str(tmp_path / "clean"))


def test_another_encoder_than_that_of_the_features_is_refused(trained, features, tmp_path):
    other = create_encoder("vit_tiny_patch16_224", embed_dim=64, depth=2, num_heads=2, image_size=32, patch_size=8)
    save_bundle(other, tmp_path / "other")
    with pytest.raises(UsageError, match="the features are of the encoder"):
        apply(str(trained.path), str(tmp_path / "clean"), encoder=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="the features are of the encoder"):
        pl.clean("dvt_train", data=str(features), out=str(tmp_path / "r"), encoder=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="there is no denoiser"):
        apply(str(tmp_path), str(tmp_path / "clean"))


def test_an_encoder_learns_what_its_denoiser_makes_of_it(trained, encoder, images, tmp_path):
    run = pl.clean(
        "dvt_distill",
        data=str(images),
        teacher=str(trained.path),
        out=str(tmp_path / "r"),
        max_steps=4,
        batch_size=2,
        num_workers=0,
        accelerator="cpu",
        report=False,
        lr=1e-2,
    )
    student, plain = pl.load(run.model), pl.load(encoder)
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(student.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)


def test_missing_pairs_are_told_of_and_none_left_is_refused(features, tmp_path, capsys):
    copy = tmp_path / "f"
    shutil.copytree(features, copy)
    (copy / "features" / "raw" / "a.npy").unlink()
    pairs = FeaturePairs(str(copy))
    assert len(pairs) == 4
    assert "1 of 5 images are left out: a.png: its raw features are gone" in capsys.readouterr().err
    np.save(copy / "features" / "raw" / "c.npy", np.zeros((2, 2, 64)))
    with pytest.raises(Exception, match=r"\(2, 2, 64\), and the index says \(4, 4, 64\)"):
        pairs.read(pairs.keys.index("c.png"))
    shutil.rmtree(copy / "features" / "raw")
    with pytest.raises(UsageError, match="no pair"):
        FeaturePairs(str(copy))
    (copy / "index.json").write_text("{")
    with pytest.raises(UsageError, match=r"index.json is damaged"):
        FeaturePairs(str(copy))
    with pytest.raises(UsageError, match="patchloom clean dvt decompose makes them"):
        FeaturePairs(str(tmp_path))


def test_the_schedule_of_training_is_the_published_one():
    rates = [training_rate(step, 100, 2.0, 0.5, 15) for step in range(100)]
    published = [*np.linspace(0, 2.0, 15), *(0.5 + 0.5 * 1.5 * (1 + np.cos(np.pi * np.arange(85) / 85)))]
    np.testing.assert_allclose(rates, published)


def test_commands_of_three_words(capsys):
    for words, option in ((("decompose",), "--num_views"), (("train",), "--num_blocks"), (("apply",), "--encoder")):
        with pytest.raises(SystemExit) as done:
            main(["clean", "dvt", *words, "--help"])
        assert done.value.code == 0
        assert option in capsys.readouterr().out
    assert main(["clean", "dvt"]) == 2
    assert "dvt_train" in capsys.readouterr().err
