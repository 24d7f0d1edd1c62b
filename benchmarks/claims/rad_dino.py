"""DINOv2's small-scale claims on CIFAR-10, CamVid and generated images (arXiv 2304.07193).

    python -m benchmarks.claims.rad_dino --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --camvid CAMVID_FOLDER

The CIFAR folders hold one sub-folder of images per class; CamVid's, `train/images`, `train/labels`, `test/images` and
`test/labels` (left out, claim 3 is). Every run leaves its figures in `--out`, so an interrupted series goes on where it
stopped; `--write` puts the table into docs/systems/rad_dino.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import register_model

import patchloom as pl
from benchmarks.claims.ccvit import Series, subset
from benchmarks.claims.thorax_mae import write_set
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.features.extract import extract
from patchloom.features.knn import knn_scores
from patchloom.models.bundle import save_bundle
from patchloom.training.metrics import read_metrics
from patchloom.training.metrics import series as column

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "rad_dino.md"
ENCODER = "vit_claims_dinov2_patch4_32"
SEEDS = (0, 1, 2)
PER_CLASS, TEST_PER_CLASS, STEPS, FURTHER_STEPS = 400, 100, 200, 300
RECIPE = {
    "encoder": ENCODER,
    "layer_scale": None,
    "local_size": 16,
    "local_crops": 4,
    "batch_size": 32,
    "max_steps": STEPS,
    "epochs": 2,
    "lr": 1e-3,
    "lr_base_batch": None,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "warmup_epochs": 0.4,
    "teacher_momentum": 0.97,
    "teacher_temp_epochs": 0.5,
    "freeze_last_layer_epochs": 0.1,
    "out_dim": 1024,
    "head_hidden_dim": 256,
    "bottleneck_dim": 64,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 5,
    "precision": "32-true",
    "accelerator": "cpu",
}
DENSE: dict[str, Any] = {
    "head": "linear",
    "augment": False,
    "short_side": 96,
    "stride": (32, 32),
    "steps": 400,
    "batch_size": 16,
    "lr": 2e-3,
    "warmup": 40,
    "num_workers": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "sinkhorn": {"centering": "sinkhorn_knopp"},
    "no_koleo": {"koleo_weight": 0.0},
    "no_ibot": {"ibot_weight": 0.0},
}


@register_model
def vit_claims_dinov2_patch4_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder the claims were measured with: width 96, depth 4, three heads, patches of 4 pixels."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return timm.models.vision_transformer.vit_tiny_patch16_224(pretrained, **{**shape, **kwargs})


def encoder_figures(model: Any, train: Path, test: Path) -> dict[str, Any]:
    """Return k-NN accuracy on test images and how near, on average, each one's nearest neighbour is."""
    known, asked = (extract(model, open_source(str(path)), num_workers=0, progress=False) for path in (train, test))
    unit = torch.nn.functional.normalize(asked.vectors, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).max(1).values
    accuracy = knn_scores(known.vectors, known.labels, asked.vectors, asked.labels, k=20).accuracy
    return {"knn": accuracy, "nearest_cosine": float(nearest.mean())}


def pretrain_on_findings(out: Series, kind: str, seed: int, root: Path) -> None:
    """Pre-train (once) on generated grey images, from scratch or from the encoder that has seen CIFAR-10 (claim 4)."""
    name = f"dinov2_{kind}_{seed}"
    start = {"init_from": str(out.out / "runs" / f"dinov2_base_{seed}" / "model")} if kind == "continued" else {}
    settings = {**RECIPE, "data": f"chexpert:{root}", "max_steps": FURTHER_STEPS, "seed": seed, **start}
    folder = str(out.out / "runs" / name)
    out.get(name, lambda: pl.pretrain("dinov2", out=folder, overwrite=True, **settings).summary)


def pretrain(out: Series, variant: str, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """Pre-train (once) and return the figures of the run."""
    name = f"dinov2_{variant}_{seed}"

    def compute() -> dict[str, Any]:
        folder = out.out / "runs" / name
        settings = {**RECIPE, **VARIANTS[variant], "seed": seed, "overwrite": True}
        run = pl.pretrain("dinov2", data=str(train), out=str(folder), **settings)
        entropy = column(read_metrics(folder / "metrics.csv"), "teacher_entropy")[1]
        return {
            **encoder_figures(pl.load(folder), train, test),
            "least_entropy": min(entropy[len(entropy) // 10 :]),
            "first_entropy": entropy[0],
            "seconds": run.summary["seconds"],
        }

    return out.get(name, compute)


def untrained(out: Series, seed: int, train: Path, test: Path) -> dict[str, Any]:
    """Return the figures of a random encoder, which is kept as a bundle beside the runs."""

    def compute() -> dict[str, Any]:
        torch.manual_seed(seed)
        folder = out.out / "runs" / f"dinov2_random_{seed}"
        save_bundle(create_encoder(ENCODER), folder / "model", overwrite=True)
        return encoder_figures(pl.load(folder), train, test)

    return out.get(f"dinov2_random_{seed}", compute)


def segmentation(out: Series, name: str, folder: Path) -> float:
    """Return the mean IoU of a linear head on CamVid (11 classes, void left out), windows of the encoder's size."""

    def compute() -> dict[str, Any]:
        sets = {part: f"camvid:{folder}:{part}" for part in ("train", "test")}
        return pl.evaluate("segmentation", encoder=str(out.out / "runs" / name), **sets, **DENSE)

    return float(out.get(f"camvid_{name}", compute)["miou"])


def findings(out: Series, name: str, root: Path) -> float:
    """Return the mean AUROC of linear heads for five patterns in generated grey images, learnt from 500 of them."""

    def compute() -> dict[str, Any]:
        encoder = str(out.out / "runs" / name)
        labelled = {"train": f"chexpert:{root / 'few'}", "test": f"chexpert:{root}:val"}
        return pl.evaluate("multilabel", encoder=encoder, num_workers=0, cache="none", **labelled)

    return float(out.get(f"findings_{name}", compute)["mean_auroc"])


def table(out: Series, has_camvid: bool) -> str:
    """Return the claims with what was measured and whether the check holds."""

    def all_of(variant: str, figure: str) -> list[float]:
        return [(out.known(f"dinov2_{variant}_{seed}") or {})[figure] for seed in SEEDS]

    knn, random = (np.array(all_of(name, "knn")) * 100 for name in ("base", "random"))
    with_, without = (np.array(all_of(name, "nearest_cosine")) for name in ("base", "no_koleo"))
    knn_without = np.array(all_of("no_koleo", "knn")) * 100
    rows: list[list[Any]] = []

    def add(claim: str, measured: str, check: str, holds: bool) -> None:
        rows.append([claim, measured, check, "yes" if holds else "**no**"])

    add(
        f"1 learns from scratch ({STEPS} steps of 32)",
        f"k-NN {mean_and_deviation(list(knn), 1)} %, random encoder {mean_and_deviation(list(random), 1)} %",
        "≥ random + 8 points",
        bool((knn - random).mean() >= 8),
    )
    add(
        "2 KoLeo spreads the features",
        f"cosine to the nearest neighbour {mean_and_deviation(list(with_), 3)}, without "
        f"{mean_and_deviation(list(without), 3)}; k-NN without {mean_and_deviation(list(knn_without), 1)} %",
        "lower by ≥ 0.02; k-NN at most 1 point worse",
        bool((without - with_).mean() >= 0.02 and (knn - knn_without).mean() >= -1),
    )
    if has_camvid:
        dense, plain = (
            np.array([100 * (out.known(f"camvid_dinov2_{name}_{s}") or {})["miou"] for s in SEEDS])
            for name in ("base", "no_ibot")
        )
        add(
            "3 iBOT helps dense tasks (linear head, CamVid)",
            f"mIoU {mean_and_deviation(list(dense), 1)} %, DINO alone {mean_and_deviation(list(plain), 1)} %: "
            f"{mean_and_deviation(list(dense - plain), 1)} points",
            "≥ +1 point",
            bool((dense - plain).mean() >= 1),
        )
    continued, fresh = (
        np.array([(out.known(f"findings_dinov2_{kind}_{seed}") or {})["mean_auroc"] for seed in SEEDS])
        for kind in ("continued", "fresh")
    )
    add(
        f"4 continued against from scratch ({FURTHER_STEPS} steps on generated grey images, linear probe of findings)",
        f"mean AUROC {mean_and_deviation(list(continued), 3)} against {mean_and_deviation(list(fresh), 3)}: "
        f"{mean_and_deviation(list(continued - fresh), 3)}",
        "≥ +0.03",
        bool((continued - fresh).mean() >= 0.03),
    )
    lows = {
        name: all_of(variant, "least_entropy") for name, variant in (("centring", "base"), ("Sinkhorn", "sinkhorn"))
    }
    add(
        "5 no collapse",
        "; ".join(f"{name}: least entropy {mean_and_deviation(values, 2)} of log K" for name, values in lows.items()),
        "> 0.7 throughout (after the first tenth)",
        all(min(values) > 0.7 for values in lows.values()),
    )
    return f"{machine()}\n\n" + markdown_table(["claim", "measured (3 seeds)", "check", "holds"], rows)


def main() -> None:
    """Run what is missing and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--camvid", type=Path)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="those to run; the table needs all three")
    parser.add_argument("--write", action="store_true", help="write the table to the docs page")
    options = parser.parse_args()
    out = Series(options.out)
    train = subset(options.data, options.out / f"cifar_train_{PER_CLASS}", PER_CLASS, seed=0)
    test = subset(options.test, options.out / f"cifar_test_{TEST_PER_CLASS}", TEST_PER_CLASS, seed=0)
    xrays = write_set(options.out / "findings")
    for seed in options.seeds:
        untrained(out, seed, train, test)
        for variant in VARIANTS:
            pretrain(out, variant, seed, train, test)
            if options.camvid is not None and variant in ("base", "no_ibot"):
                segmentation(out, f"dinov2_{variant}_{seed}", options.camvid)
        for kind in ("continued", "fresh"):
            pretrain_on_findings(out, kind, seed, xrays)
            findings(out, f"dinov2_{kind}_{seed}", xrays)
    if not set(SEEDS) <= set(options.seeds):
        return
    text = table(out, options.camvid is not None)
    print(text)
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
