"""Experts weights averaging at small scale (arXiv 2308.06093): CIFAR-10 from scratch.

    python -m benchmarks.claims.ewa --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

A ViT of width 96, depth 6 and patches of 8 is trained from scratch by the same recipe three ways: as it is, with four
experts that are only averaged at the end (β = 0), and with experts weights averaging (β up to 0.3). Accuracy is that
of the shipped, plain model. Figures are kept in `--out`, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import patchloom as pl
from benchmarks.claims.ccvit import Series, subset
from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.encoders import create_encoder
from patchloom.training.ewa import average_experts_, average_ffn, expand_ffn, experts_of

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "ewa.md"
SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts, averaged at the end (β = 0)": {"experts": 4, "share_rate": 0.0},
    "experts weights averaging (β to 0.3)": {"experts": 4, "share_rate": 0.3},
}
RECIPE: dict[str, Any] = {
    "encoder": "vit_claims_patch8_32",
    "batch_size": 128,
    "lr": 1e-3,
    "lr_base_batch": None,
    "layer_decay": 1.0,
    "warmup_epochs": 2,
    "auto_augment": None,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "crop_scale": (0.6, 1.0),
    "color_jitter": 0.0,
    "init_scale": 1.0,
    "num_workers": 1,
    "probe_every": 0,
}


@register_model
def vit_claims_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The encoder the claims were measured with: width 96, depth 6, three heads, patches of 8 pixels."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs}
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        settings.pop(name, None)
    model = VisionTransformer(**settings)
    model.pretrained_cfg = {
        "mean": (0.49, 0.48, 0.45),
        "std": (0.25, 0.24, 0.26),
        "architecture": "vit_claims_patch8_32",
    }
    return model


def train(way: dict[str, Any], seed: int, epochs: int, folders: dict[str, Path], out: Path) -> dict[str, Any]:
    """Return the test accuracy of the shipped model."""
    data = {"data": str(folders["train"]), "test": str(folders["test"]), "out": str(out), "seed": seed}
    run = pl.adapt("finetune", **data, **RECIPE, epochs=epochs, **way, resume=True)
    return {"accuracy": run.summary["accuracy"], "seconds": run.summary["seconds"]}


def step_cost(batch: int, rounds: int) -> float:
    """Return the time of a training step with four experts over that of the plain one."""
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def stepper(experts: int) -> Any:
        model = create_encoder("vit_claims_patch8_32").train()
        if experts:
            expand_ffn(model, experts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images)[:, :10], labels).backward()
            optimizer.step()
            average_experts_(experts_of(model), 0.1)

        return step

    seconds = alternate({"plain": stepper(0), "experts": stepper(4)}, rounds=rounds, warmup=2)
    return 1 / paired_ratio(seconds["plain"], seconds["experts"])


def folding_error() -> float:
    """Return the largest difference between the averaging and the folded model, of outputs near 1."""
    model = expand_ffn(create_encoder("vit_tiny_patch16_224"), 4)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        return float((average_ffn(copy.deepcopy(model).eval())(images) - model.eval()(images)).abs().max())


def main() -> None:
    """Compute what is missing and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/systems/{PAGE.name}")
    options = parser.parse_args()
    series = Series(options.out / "ewa")
    folders = {
        "train": subset(options.data, options.out / "cifar-ewa", 500, seed=3),
        "test": subset(options.test, options.out / "cifar-test", 200, seed=0),
    }
    accuracy: dict[str, list[float]] = {}
    for seed in SEEDS:
        for number, (name, way) in enumerate(WAYS.items()):
            out = options.out / "runs" / f"ewa-{number}-{seed}"
            figures = series.get(
                f"{number}-{seed}-{options.epochs}",
                lambda w=way, s=seed, o=out: train(w, s, options.epochs, folders, o),
            )
            accuracy.setdefault(name, []).append(figures["accuracy"])
    cost = series.get("step", lambda: {"ratio": step_cost(128, 15), "error": folding_error(), "time": time.time()})
    plain, spread, averaged = (np.array(values) for values in accuracy.values())
    rows = [[name, mean_and_deviation([100 * value for value in values])] for name, values in accuracy.items()]
    claims = [
        ["folded = averaged, largest difference", f"{cost['error']:.1e}", "≤ 1e-5", cost["error"] <= 1e-5],
        ["gain over the plain model, points", mean_and_deviation(100 * (averaged - plain)), "mean > 0",
         (averaged - plain).mean() > 0],
        ["β = 0 below averaging, points", mean_and_deviation(100 * (averaged - spread)), "≥ 10",
         100 * (averaged - spread).mean() >= 10],
        ["time of a step over the plain one, N = 4", f"{cost['ratio']:.2f}", "≤ 1.25", cost["ratio"] <= 1.25],
    ]  # fmt: skip
    images = f"{len(SEEDS)} seeds, {options.epochs} epochs on 5 000 images"
    text = f"{machine()}\n\n{markdown_table([images, 'test accuracy, %'], rows)}\n\n" + markdown_table(
        ["claim", "measured", "check", "holds"],
        [[*row[:3], "yes" if row[3] else "**no**"] for row in claims],
    )
    print(text)
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
