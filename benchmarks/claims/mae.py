"""MAE's small-scale claims on CIFAR-10 (arXiv 2111.06377): does the method do what its paper says?

    python -m benchmarks.claims.mae --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --out scratch/claims/mae

Folders hold one sub-folder of JPEGs per class. Every run leaves its figures in `--out`, so an interrupted series goes
on where it stopped; `--write` puts the table into docs/systems/mae.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor

import patchloom as pl
from benchmarks.claims.ccvit import Series, pixels, subset
from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.encoders import normalize
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder, initialize_as_mae
from patchloom.encoders.patches import patchify
from patchloom.systems.mae.method import MAEConfig, MAEMethod

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "mae.md"
ENCODER = "mae_claims_patch4_32"
SEEDS = (0, 1, 2)
IMAGES, STEPS = 9000, 500
RECIPE: dict[str, Any] = {
    "encoder": ENCODER,
    "batch_size": 64,
    "lr": 1e-3,
    "lr_base_batch": None,
    "max_steps": STEPS,
    "epochs": 4,
    "warmup_epochs": 1.0,
    "decoder_dim": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 20,
    "precision": "32-true",
}


@register_model
def mae_claims_patch4_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder the claims were measured with: width 96, depth 5, three heads, patches of 4 pixels."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 5, "num_heads": 3, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **arguments)


def cost() -> dict[str, Any]:
    """Claim 1: seconds of a step with 75 % hidden, and of the same model on all patches."""
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    encoder = mae_claims_patch4_32(num_classes=0)
    initialize_as_mae(encoder)
    model = MaskedAutoencoder(encoder, 64, 2, 4).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    order = torch.arange(64).expand(64, -1)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def whole() -> None:
        pred = model.decode(model.encoder.forward_features(images), order)
        step(model.loss_of(images, pred, torch.ones(64, 64)))

    seconds = alternate({"masked": lambda: step(model.loss(images)), "whole": whole}, rounds=20, warmup=2)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pretrain(series: Series, name: str, folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Pre-train (once) and return the figures of the run; its model is in `runs/name`."""
    out = str(series.out / "runs" / name)

    def compute() -> dict[str, Any]:
        settings = {**RECIPE, **changes, "data": str(folder), "out": out, "seed": seed, "overwrite": True}
        return pl.pretrain("mae", **settings).summary

    return series.get(name, compute)


@torch.no_grad()
def inpainting(series: Series, name: str, folder: Path, test: Path) -> dict[str, Any]:
    """Claim 2: error on hidden patches of held-out images, raw pixels in [0, 1], beside the mean of what is visible."""

    def compute() -> dict[str, Any]:
        out = series.out / "runs" / name
        config = MAEConfig(data=str(folder), out=str(out), norm_pix_loss=False, **RECIPE)
        method = MAEMethod(config, open_source(str(folder)))
        state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        method.load_state_dict(state)
        model, images = method.model.eval(), pixels(test)[::10][:500]
        noise = torch.rand(len(images), 64, generator=torch.Generator().manual_seed(0))
        hidden = noise.argsort(1).argsort(1) >= 16
        said = method._denormalized(model.reconstruct(normalize(images, method.encoder), noise=noise))
        patches = patchify(images, 4)
        visible = (~hidden).unsqueeze(-1)
        colours = patches.unflatten(-1, (3, 16))
        mean = (colours * visible.unsqueeze(-1)).sum((1, 3)) / (visible.sum(1) * 16)  # of each channel
        fill = mean.repeat_interleave(16, dim=-1).unsqueeze(1).expand_as(patches)
        errors = {"model": patchify(said, 4), "mean": fill}
        return {key: float((value - patches).square().mean(-1)[hidden].mean()) for key, value in errors.items()}

    return series.get(f"inpainting_{name}", compute)


def linear(series: Series, name: str, train: Path, test: Path) -> float:
    """Return the accuracy of a linear probe on the mean of patch tokens."""
    encoder = str(series.out / "runs" / name / "model")
    settings = {"encoder": encoder, "train": str(train), "test": str(test), "pool": "avg", "num_workers": 0}
    return float(series.get(f"linear_{name}", lambda: pl.evaluate("linear", **settings))["accuracy"])


def finetune(series: Series, name: str, encoder: str, train: Path, test: Path, seed: int) -> float:
    """Return the test accuracy after 10 epochs on 1 000 labels."""
    settings: dict[str, Any] = {
        "data": str(train),
        "test": str(test),
        "encoder": encoder,
        "out": str(series.out / "runs" / f"finetune_{name}"),
        "epochs": 10,
        "batch_size": 64,
        "lr": 1e-3,
        "lr_base_batch": None,
        "warmup_epochs": 2,
        "layer_decay": 0.75 if Path(encoder).exists() else 1.0,
        "drop_path": 0.0,
        "auto_augment": None,
        "color_jitter": 0.0,
        "erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "crop_scale": (0.4, 1.0),
        "init_scale": 1.0,
        "probe_every": 0,
        "num_workers": 0,
        "precision": "32-true",
        "seed": seed,
        "overwrite": True,
    }
    return float(series.get(f"finetune_{name}", lambda: pl.adapt("finetune", **settings).summary)["accuracy"])


def table(series: Series) -> str:
    """Return the claims with what was measured and whether the check holds."""
    seconds = series.known("cost") or {}
    share = seconds["masked"] / seconds["whole"]
    seeds = [seed for seed in SEEDS if series.known(f"finetune_scratch_{seed}")]  # the last of each seed's figures
    inpainted = [series.known(f"inpainting_raw_{seed}") or {} for seed in seeds]
    ratios = [figures["model"] / figures["mean"] for figures in inpainted]

    def scores(prefix: str) -> list[float]:
        return [100 * (series.known(f"{prefix}_{seed}") or {})["accuracy"] for seed in seeds]

    tuned, scratch = scores("finetune_norm"), scores("finetune_scratch")
    gain = [a - b for a, b in zip(tuned, scratch, strict=True)]
    normed, raw = scores("linear_norm"), scores("linear_raw")
    difference = [a - b for a, b in zip(normed, raw, strict=True)]
    rows = [
        [
            "1 dropping patches saves their cost (step, mask 75 %, decoder included, median of 20)",
            f"{1000 * seconds['masked']:.0f} ms against {1000 * seconds['whole']:.0f} ms on all patches: {share:.0%}",
            "≤ 60 %",
            share <= 0.6,
        ],
        [
            f"2 it learns to fill in ({STEPS} steps, raw targets, 500 held-out images)",
            f"pixel error {mean_and_deviation([f['model'] for f in inpainted], 4)} against "
            f"{mean_and_deviation([f['mean'] for f in inpainted], 4)} of the mean visible colour: "
            f"{mean_and_deviation(ratios)} ×",
            "≤ 0.70 ×",
            statistics.mean(ratios) <= 0.7,
        ],
        [
            "3 pre-training beats scratch (1 000 labels, 10 epochs)",
            f"{mean_and_deviation(tuned, 1)} % against {mean_and_deviation(scratch, 1)} %: "
            f"{mean_and_deviation(gain, 1)} points",
            "≥ +1.5 points",
            statistics.mean(gain) >= 1.5,
        ],
        [
            "4 normalised targets ≥ raw ones (linear probe, 5 000 labels)",
            f"{mean_and_deviation(normed, 1)} % against {mean_and_deviation(raw, 1)} %: "
            f"{mean_and_deviation(difference, 1)} points",
            "≥ −0.5 points",
            statistics.mean(difference) >= -0.5,
        ],
    ]
    marked = [[*row[:3], "yes" if row[3] else "**no**"] for row in rows]
    return f"{machine()}\n\n" + markdown_table(["claim", f"measured (seeds: {len(seeds)})", "check", "holds"], marked)


def main() -> None:
    """Run what is missing, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/mae"))
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/mae.md")
    options = parser.parse_args()
    series, start = Series(options.out), time.monotonic()
    unlabelled = subset(options.data, options.out / "data" / "pretrain", IMAGES // 10, seed=0)
    probing = subset(options.data, options.out / "data" / "probe", 500, seed=1)
    few = subset(options.data, options.out / "data" / "few", 100, seed=2)
    test = subset(options.test, options.out / "data" / "test", 200, seed=3)
    series.get("cost", cost)
    for seed in SEEDS:
        for kind, norm_pix in (("norm", True), ("raw", False)):
            pretrain(series, f"{kind}_{seed}", unlabelled, seed, norm_pix_loss=norm_pix)
            linear(series, f"{kind}_{seed}", probing, test)
        inpainting(series, f"raw_{seed}", unlabelled, test)
        finetune(series, f"norm_{seed}", str(series.out / "runs" / f"norm_{seed}" / "model"), few, test, seed)
        finetune(series, f"scratch_{seed}", ENCODER, few, test, seed)
    text = table(series)
    print(f"{text}\n\n{time.monotonic() - start:.0f} s")
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
