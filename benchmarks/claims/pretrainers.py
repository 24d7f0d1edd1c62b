"""Ways to pre-train under one budget, on CIFAR-10: the table of docs/pretrain.md.

    python -m benchmarks.claims.pretrainers --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

Every method gives the same small encoder the same number of optimiser steps on the same images, with its own recipe;
k-NN and a linear probe then learn from the labels of all of them, and fine-tuning from a fifth. It is
`patchloom pretrain compare`, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims.ccvit import subset
from benchmarks.claims.ewa import RECIPE as SUPERVISED
from benchmarks.claims.ewa import vit_claims_patch8_32
from benchmarks.harness import machine, markdown_table, rewrite
from patchloom.sweep.pretrain import compare

PAGE = Path(__file__).parents[2] / "docs" / "pretrain.md"
ENCODER = vit_claims_patch8_32.__name__
SEEDS = (0, 1, 2)
SHORT: dict[str, Any] = {"lr": 1.5e-3, "lr_base_batch": None, "warmup_epochs": 1}
LABELS = {
    key: value
    for key, value in SUPERVISED.items()
    if key not in ("encoder", "batch_size", "num_workers", "probe_every")
}
TUNING: dict[str, Any] = {**LABELS, "batch_size": 64, "epochs": 10, "label_fraction": 0.2}


def recipe(folders: dict[str, Path], steps: int) -> dict[str, Any]:
    """Return the comparison as `patchloom pretrain compare` reads it."""
    methods: dict[str, Any] = {
        "untrained": {},
        "ccvit": {**SHORT, "k": 256, "codebook_images": 2000, "early_layers": 4, "head_layers": 1},
        "mae": {**SHORT, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4},
        "dinov2": {
            **SHORT,
            "lr": 1e-3,
            "out_dim": 1024,
            "head_hidden_dim": 256,
            "bottleneck_dim": 64,
            "drop_path": 0.0,
            "local_crops": 4,
            "local_size": 16,
            "layer_decay": 1.0,
        },
    }
    for share in (0.01, 0.1, 1.0):
        methods[f"supervised, {share:.0%} of labels"] = {"method": "adapt finetune", "label_fraction": share, **LABELS}
    return {
        "data": str(folders["train"]),
        "test": str(folders["test"]),
        "encoder": ENCODER,
        "steps": steps,
        "seeds": list(SEEDS),
        "defaults": {"batch_size": 64, "num_workers": 0},
        "methods": methods,
        "evaluate": {
            "knn": {"num_workers": 0},
            "linear": {"num_workers": 0},
            "finetune": {"num_workers": 0, "settings": TUNING},
        },
    }


def main() -> None:
    """Compute what is missing and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/{PAGE.name}")
    options = parser.parse_args()
    folders = {
        "train": subset(options.data, options.out / "cifar-ewa", 500, seed=3),
        "test": subset(options.test, options.out / "cifar-test", 200, seed=0),
    }
    study = options.out / "pretrainers"
    study.mkdir(parents=True, exist_ok=True)
    file = options.out / "pretrainers.yaml"
    file.write_text(yaml.safe_dump(recipe(folders, options.steps), sort_keys=False))
    (study / "cells").mkdir(exist_ok=True)
    compare(str(file), str(study))
    with (study / "compare.csv").open() as opened:
        found = list(csv.DictReader(opened))
    rows = [
        [
            row["method"],
            *(_interval(row, protocol) for protocol in ("knn", "linear", "finetune")),
            f"{float(row['training seconds']):.0f}" if row.get("training seconds") else "–",
        ]
        for row in found
    ]
    header = [
        f"{options.steps} steps of 64 images, {len(SEEDS)} seeds",
        "k-NN, %",
        "linear probe, %",
        "fine-tuned, %",
        "seconds",
    ]
    text = f"{machine()}\n\n{markdown_table(header, rows)}"
    print(text)
    if options.write:
        rewrite(PAGE, "pretrainers", text)


def _interval(row: dict[str, str], protocol: str) -> str:
    if not row.get(f"{protocol} mean"):
        return "failed"
    mean, low, high = (float(row[f"{protocol} {end}"]) * 100 for end in ("mean", "low", "high"))
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


if __name__ == "__main__":
    main()
