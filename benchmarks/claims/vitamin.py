"""ViTamin's small-scale claims on CIFAR-10 (arXiv 2404.02132): does the method do what its paper says?

    python -m benchmarks.claims.vitamin --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --out scratch/claims/x

Folders hold one sub-folder of images per class. Images are enlarged to 64 pixels, captions are made of the names of
classes. Every run leaves its figures in `--out`, so an interrupted series goes on where it stopped; `--write` puts the
table into docs/systems/vitamin.md.
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

import patchloom as pl
from benchmarks.claims.ccvit import Series, subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.systems.vitamin.model import SlidingWindowFeatures, stage_maps

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "vitamin.md"
SEEDS = (0, 1, 2)
STEPS, PER_CLASS, FEW, TEST = 400, 1000, 50, 100
HYBRID, PLAIN = "vitamin_tiny_64", "vit_claims_patch16_64"
RECIPE: dict[str, Any] = {
    "captions": "labels",
    "text_width": 64,
    "text_heads": 2,
    "text_layers": 2,
    "context_length": 16,
    "batch_size": 32,
    "max_steps": STEPS,
    "lr": 1e-3,
    "warmup_epochs": 0.2,
    "drop_path": 0.0,
    "flip": 0.5,
    "crop_scale": (0.5, 1.0),
    "val_fraction": 0.0,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 50,
    "report": False,
    "precision": "32-true",
    "accelerator": "cpu",
}
SINGLE = ("a photo of a {}.",)


@register_model
def vit_claims_patch16_64(pretrained: bool = False, **kwargs: Any) -> Any:
    """A plain ViT of as many parameters and tokens as `vitamin_tiny_64`: width 84, depth 3."""
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 84, "depth": 3, "num_heads": 3, "global_pool": "avg"}
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=pretrained, **{**arguments, "class_token": False, **kwargs}
    )


def trained(series: Series, name: str, **changes: Any) -> Path:
    """Train (once) and return the run."""
    out = series.out / "runs" / name

    def compute() -> dict[str, Any]:
        return pl.align("clip", out=out, **{**RECIPE, "overwrite": out.exists(), **changes}).summary

    series.get(name, compute)
    return out


def accuracy(series: Series, name: str, run: Path, test: Path, **changes: Any) -> float:
    """Return the zero-shot accuracy of a run, per cent."""

    def compute() -> dict[str, Any]:
        return pl.evaluate("zero_shot", encoder=run, test=test, num_workers=0, device="cpu", draws=10, **changes)

    return 100 * float(series.get(f"zero_shot_{name}", compute)["accuracy"])


@torch.no_grad()
def windows() -> dict[str, float]:
    """Claim 4: largest difference between windows and what they stand for."""
    torch.manual_seed(0)
    trunk = timm.create_model(HYBRID, num_classes=0).eval()
    images = torch.randn(1, 3, 64, 128)
    maps = SlidingWindowFeatures(trunk, stride=32)(images)["tokens"]
    first = stage_maps(trunk, images[..., :64])["tokens"]
    alone = float((maps[..., :2] - first[..., :2]).abs().max())
    total, count = torch.zeros_like(maps), torch.zeros(8)
    for left in (64, 0, 32):
        total[..., left // 16 : left // 16 + 4] += stage_maps(trunk, images[..., left : left + 64])["tokens"]
        count[left // 16 : left // 16 + 4] += 1
    return {"alone": alone, "order": float((maps - total / count).abs().max())}


def seed_of_claims(series: Series, train: Path, few: Path, test: Path, seed: int) -> None:
    """Train and measure all runs of a seed."""
    hybrid = trained(series, f"hybrid_{seed}", encoder=HYBRID, data=str(train), seed=seed)
    plain = trained(series, f"plain_{seed}", encoder=PLAIN, data=str(train), seed=seed)
    accuracy(series, f"hybrid_{seed}", hybrid, test)
    accuracy(series, f"single_{seed}", hybrid, test, templates=SINGLE)
    accuracy(series, f"plain_{seed}", plain, test)
    locked = {"encoder": PLAIN, "lock": "text", "text_from": str(hybrid), "seed": seed}
    for name, changes in (
        (f"few_joint_{seed}", {"encoder": PLAIN, "data": str(few), "seed": seed}),
        (f"few_locked_{seed}", {**locked, "data": str(few)}),
        (f"locked_{seed}", {**locked, "data": str(train)}),
    ):
        accuracy(series, name, trained(series, name, **changes), test)


def table(series: Series) -> str:
    """Return the claims with what was measured and whether the check holds."""
    seeds = [seed for seed in SEEDS if series.known(f"zero_shot_locked_{seed}")]  # the last of each seed's figures

    def scores(prefix: str) -> list[float]:
        return [100 * (series.known(f"zero_shot_{prefix}_{seed}") or {})["accuracy"] for seed in seeds]

    def gain(a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(scores(a), scores(b), strict=True)]

    def against(a: str, b: str) -> str:
        return (
            f"{mean_and_deviation(scores(a), 1)} % against {mean_and_deviation(scores(b), 1)} %: "
            f"{mean_and_deviation(gain(a, b), 1)} points"
        )

    exact = series.known("windows") or {}
    hybrid, few, full = gain("hybrid", "plain"), gain("few_locked", "few_joint"), gain("locked", "plain")
    rows = [
        [
            f"1 hybrid beats plain ViT of as many parameters ({STEPS} steps, {10 * PER_CLASS:,} pairs)",
            against("hybrid", "plain"),
            "≥ +3 points (margin 1.5)",
            statistics.mean(hybrid) >= 1.5,
        ],
        [
            f"2 a locked text tower helps where pairs are few ({10 * FEW:,} pairs)",
            against("few_locked", "few_joint"),
            "≥ +1 point",
            statistics.mean(few) >= 1,
        ],
        [
            f"2 and less where they are many ({10 * PER_CLASS:,} pairs)",
            against("locked", "plain"),
            "less than with few",
            statistics.mean(full) < statistics.mean(few),
        ],
        [
            "3 several sentences ≥ one",
            against("hybrid", "single"),
            "≥ −0.5 points",
            statistics.mean(gain("hybrid", "single")) >= -0.5,
        ],
        [
            "4 one window is itself; overlaps are means in any order",
            f"largest differences {exact.get('alone', float('nan')):.1g} and {exact.get('order', float('nan')):.1g}",
            "≤ 1e-5",
            max(exact.values(), default=1) <= 1e-5,
        ],
    ]
    marked = [[*row[:3], "yes" if row[3] else "**no**"] for row in rows]
    return f"{machine()}\n\n" + markdown_table(["claim", f"measured (seeds: {len(seeds)})", "check", "holds"], marked)


def main() -> None:
    """Run what is missing, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/vitamin"))
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/vitamin.md")
    options = parser.parse_args()
    series, start = Series(options.out), time.monotonic()
    train = subset(options.data, options.out / "data" / "train", PER_CLASS, seed=0)
    few = subset(train, options.out / "data" / "few", FEW, seed=1)
    test = subset(options.test, options.out / "data" / "test", TEST, seed=2)
    series.get("windows", windows)
    for seed in SEEDS:
        seed_of_claims(series, train, few, test, seed)
        print(table(series), flush=True)
    text = table(series)
    print(f"{text}\n\n{time.monotonic() - start:.0f} s")
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
