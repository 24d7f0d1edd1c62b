"""CCViT as a method: what it refuses, what its settings do, a run from images to bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders.patches import patchify
from patchloom.errors import UsageError
from patchloom.systems.ccvit.method import CCViTConfig, CCViTMethod, MaskedViews, mask_counts
from patchloom.tokenizers.centroid import CentroidTokenizer

SMALL = {
    "data": "digits",
    "encoder": "ccvit_tiny_patch4_32",
    "image_size": 16,
    "batch_size": 8,
    "max_steps": 3,
    "k": 16,
    "codebook_images": 40,
    "codebook_iters": 2,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
    "min_block": 2,
}


def method(**settings: Any) -> CCViTMethod:
    config = CCViTConfig(out="unused", **{**SMALL, **settings})
    made = CCViTMethod(config, open_source(config.data))
    generator = torch.Generator().manual_seed(0)
    made.tokenizer = CentroidTokenizer(torch.rand(16, 48, generator=generator), 4)
    return made


def batch(made: CCViTMethod, count: int = 3) -> dict[str, torch.Tensor]:
    transform = made.transform()
    samples = [transform(made.source.read(i).image, torch.Generator().manual_seed(i)) for i in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.9, "replace_ratio": 0.2}, "exceed the whole image"),
        ({"mask_ratio": 0.0, "replace_ratio": 0.0}, "nothing to predict"),
        ({"mask_ratio": 1.2}, r"mask_ratio is 1\.2; it must be at least 0 and below 1"),
        ({"target": "dual", "shared_head": True}, "shared_head=false"),
        ({"target": "pixel", "head_layers": 0}, "head_layers to at least 1"),
        ({"target": "tokens"}, "did you mean token"),
        ({"k": 1}, "k is 1; it must be at least 2"),
        ({"k": 10**9}, "lower k"),
        ({"encoder": "ccvit_tiny_patch4_23"}, "did you mean ccvit_tiny_patch4_32"),
        ({"encoder": "resnet50"}, "timm's ViT, BEiT and EVA"),
        ({"image_size": 30}, "image size 30 is not divisible by patch size 4; use 28 or 32"),
        ({"early_layers": 13}, "early_layers is 13; it must be 1 to 12"),
        ({"data": "no/such/folder"}, "the image folder no/such/folder does not exist"),
        ({"codebook": "no/such/codebook"}, "there is no codebook"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        pl.pretrain("ccvit", **{**SMALL, "out": str(tmp_path / "run"), **settings})
    assert not (tmp_path / "run").exists()


def test_a_codebook_of_another_patch_size_is_refused(tmp_path):
    CentroidTokenizer(torch.rand(16, 192), 8).save(tmp_path / "codebook.safetensors")
    with pytest.raises(UsageError, match="codebook is of patch size 8, the encoder of patch size 4"):
        pl.pretrain("ccvit", **{**SMALL, "k": None, "out": str(tmp_path / "run"), "codebook": str(tmp_path)})


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(UsageError, match="no image in"):
        pl.pretrain("ccvit", **{**SMALL, "data": str(tmp_path), "out": str(tmp_path / "run")})


def test_counts_are_the_papers_at_the_papers_size():
    assert mask_counts((14, 14), 75 / 196, 20 / 196) == (75, 20)
    assert mask_counts((8, 8), 25 / 64, 6 / 64) == (25, 6)


def test_masks_have_their_counts_and_do_not_overlap():
    views = MaskedViews(None, (8, 8), 25, 6, 16)
    for seed in range(20):
        masked, replaced = views.draw(torch.Generator().manual_seed(seed))
        assert (int(masked.sum()), int(replaced.sum())) == (25, 6)
        assert not (masked & replaced).any()


def test_tokens_and_targets_come_from_the_clean_image_and_replaced_patches_are_their_centroids():
    made = method()
    seen = {}
    forward = made.model.forward

    def spy(x: torch.Tensor, masked: torch.Tensor, targets: torch.Tensor) -> Any:
        seen["x"] = x
        return forward(x, masked, targets=targets)

    made.model.forward = spy  # type: ignore[method-assign]
    data = batch(made)
    images = data["image"].float() / 255
    masked, replaced = data["masked"].flatten(1), data["replaced"].flatten(1)
    _, ids, targets = made.predict(images, images, masked, replaced)
    patches = patchify(images, 4)
    wanted = masked | replaced
    distances = torch.cdist(patches[wanted].double(), made.tokenizer.centroids.double())
    assert torch.equal(ids, distances.argmin(1))
    clean = patches[wanted].double()
    expected = (clean - clean.mean(1, keepdim=True)) / torch.sqrt(clean.var(1, keepdim=True, correction=1) + 1e-6)
    torch.testing.assert_close(targets.double(), expected, atol=1e-4, rtol=1e-4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    shown = patchify(seen["x"] * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1), 4)
    torch.testing.assert_close(shown[~replaced], patches[~replaced], atol=1e-5, rtol=0)
    nearest = made.tokenizer.centroids[torch.cdist(patches[replaced], made.tokenizer.centroids).argmin(1)]
    torch.testing.assert_close(shown[replaced], nearest, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"token_loss", "pixel_loss", "masked_token_accuracy", "replaced_token_accuracy"}),
        ({"target": "token"}, {"token_loss", "condenser_token_loss"}),
        ({"target": "token", "shared_head": True}, {"token_loss", "condenser_token_loss"}),
        ({"target": "pixel"}, {"pixel_loss"}),
        ({"target": "soft_centroid"}, {"soft_loss", "condenser_soft_loss"}),
        ({"replace_ratio": 0.0}, {"token_loss", "pixel_loss"}),
        ({"target_interpolation": "lanczos"}, {"token_loss", "pixel_loss"}),
    ],
)
def test_every_ablation_of_the_paper_trains_all_its_parameters(settings, parts):
    made = method(**settings)
    losses = made.training_loss(batch(made))
    assert parts <= losses.keys()
    assert torch.isfinite(losses["loss"])
    losses["loss"].backward()
    without = [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "digits"
    probed = {"probe_every": 1000, "report": True, "probe_data": "digits:test"}
    return pl.pretrain("ccvit", **{**SMALL, **probed, "out": str(out), "early_layers": 4})


def test_a_run_ends_with_bundle_figures_and_report(run):
    assert run.summary["steps"] == 3
    for figure in ("knn_accuracy", "knn_balanced_accuracy", "knn_majority_share"):
        assert 0 <= run.summary[figure] <= 1
        assert figure in (run.path / "metrics.csv").read_text()
    assert run.summary["codebook_size"] == 16
    assert run.summary["early_layers"] == 4
    page = run.report.read_text()
    for title in ("Codebook", "Attention", "Nearest neighbours", "Feature health", "Repeat this run"):
        assert title in page
    assert "k-NN commonest class" in page
    assert "patchloom pretrain ccvit --data digits" in page
    assert "http" not in page.replace("http-equiv", "").split("<main>")[0]


@pytest.mark.slow
def test_the_bundle_opens_with_timm_and_chains_into_evaluation(run):
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(images), pl.load(run.path)(images))
    result = pl.evaluate("knn", encoder=str(run.path), train="digits", test="digits:test", num_workers=0)
    assert result["accuracy"] > 0.3


def test_its_codebook_serves_another_run(run, tmp_path):
    again = pl.pretrain(
        "ccvit", **{**SMALL, "k": None, "max_steps": 1, "out": str(tmp_path / "again"), "codebook": str(run.path)}
    )
    assert again.summary["codebook_fingerprint"] == run.summary["codebook_fingerprint"]


def test_training_goes_on_from_a_bundle(run, tmp_path):
    again = pl.pretrain(
        "ccvit", **{**SMALL, "max_steps": 1, "lr": 1e-12, "out": str(tmp_path / "on"), "init_from": str(run.path)}
    )
    before, after = pl.load(run.path).state_dict(), pl.load(again.path).state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_resuming_from_the_command_line_needs_only_the_folder(run, capsys):
    from patchloom.cli import main

    assert main(["pretrain", "ccvit", "--resume", "--out", str(run.path)]) == 0
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_the_written_settings_repeat_the_run(run, tmp_path):
    from patchloom.cli import main

    out = tmp_path / "again"
    assert main(["pretrain", "ccvit", "--config", str(Path(run.path) / "config.yaml"), "--out", str(out)]) == 0
    before, after = pl.load(run.path).state_dict(), pl.load(out).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
