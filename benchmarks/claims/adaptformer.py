"""AdaptFormer's small-scale claims on CIFAR-10 (arXiv 2205.13535): does the method do what its paper says?

    python -m benchmarks.claims.adaptformer --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

The encoder knows five classes and learns the other five from 500 images of each, see `benchmarks.claims.transfer`.
Every run leaves its figures in `--out`, so an interrupted series goes on where it stopped; `--write` puts the table
into docs/systems/adaptformer.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.ccvit import Series
from benchmarks.claims.transfer import SEEDS, adapted, data, pretrained
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.encoders.insertion import insert, remove
from patchloom.models.bundle import load
from patchloom.report import curves
from patchloom.systems.adaptformer.model import AdaptFormer

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "adaptformer.md"
WIDTHS = (1, 4, 16, 64)
PROMPTS = (1, 16, 64)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "full": ("finetune", {}),
    **{f"adaptformer_{m}": ("adaptformer", {"bottleneck": m}) for m in WIDTHS},
    **{f"vpt_{n}": ("vpt", {"num_prompts": n}) for n in PROMPTS},
}


def exact_start(bundle: Path) -> bool:
    """Return whether a fresh adapter leaves the encoder's output as it is to the bit, and so does its removal."""
    encoder = load(bundle).requires_grad_(False)
    images = torch.randn(4, 3, 32, 32)
    plain = encoder.forward_features(images)
    insert(encoder, AdaptFormer(encoder, 16))
    same = torch.equal(encoder.forward_features(images), plain)
    remove(encoder)
    return same and torch.equal(encoder.forward_features(images), plain)


def table(series: Series, bundle: Path) -> str:
    """Return the claims with what was measured."""
    seeds = finished(series, RUNS)
    runs = {name: [series.known(f"{name}_{seed}") or {} for seed in seeds] for name in RUNS}
    score = {name: [100 * figures["accuracy"] for figures in found] for name, found in runs.items()}
    text = {name: mean_and_deviation(values, 1) for name, values in score.items()}
    mean = {name: sum(values) / len(values) for name, values in score.items()}
    gain = [a - b for a, b in zip(score["adaptformer_16"], score["linear"], strict=True)]
    small = runs["adaptformer_4"][0]
    added = small["trained_parameters"] - small["head_parameters"]
    gap = (mean["full"] - mean["adaptformer_4"]) / (mean["full"] - mean["linear"])
    falls = [mean[f"adaptformer_{a}"] - mean[f"adaptformer_{b}"] for a, b in itertools.pairwise(WIDTHS)]
    grown = mean["adaptformer_64"] - mean["adaptformer_1"]
    best_vpt = max(mean[f"vpt_{n}"] for n in PROMPTS)
    prompts = mean[f"vpt_{PROMPTS[-1]}"] - mean[f"vpt_{PROMPTS[0]}"]
    rows = [
        [
            "1 beats the linear probe (m 16)",
            f"{text['adaptformer_16']} against {text['linear']} %: {mean_and_deviation(gain, 1)} points",
            "≥ +3 points",
            yes(sum(gain) / len(gain) >= 3),
        ],
        [
            "2a more with m",
            ", ".join(f"m {m}: {text[f'adaptformer_{m}']}" for m in WIDTHS),
            "never falls by more than 0.5 point",
            yes(max(falls) <= 0.5),
        ],
        [
            "2b VPT gains less from more prompts",
            ", ".join(f"n {n}: {text[f'vpt_{n}']}" for n in PROMPTS)
            + f"; from least to most AdaptFormer {grown:+.1f}, VPT {prompts:+.1f}",
            "VPT gains less; AdaptFormer (m 64) ≥ VPT (any n)",
            yes(prompts < grown and mean["adaptformer_64"] >= best_vpt),
        ],
        [
            "3 few weights recover most of full tuning (m 4)",
            f"{added:,} of {small['parameters']:,} weights ({added / small['parameters']:.1%}); full {text['full']} %, "
            f"m 4 {text['adaptformer_4']} %: {gap:.0%} of the gap left",
            "< 2 % of the weights; ≤ 30 % of the gap",
            yes(gap <= 0.3 and added / small["parameters"] < 0.02),
        ],
        ["4 exact start and removal", "equal to the bit" if exact_start(bundle) else "differs", "equal to the bit",
         yes(exact_start(bundle))],
    ]  # fmt: skip
    return f"{machine()}\n\n" + markdown_table(
        ["claim", f"measured ({len(seeds)} of {len(SEEDS)} seeds)", "check", "holds"], rows
    )


def finished(series: Series, runs: Iterable[str]) -> list[int]:
    """Return the seeds whose runs are all done.

    Raises:
        ValueError: There is none.
    """
    seeds = [seed for seed in SEEDS if all(series.known(f"{name}_{seed}") for name in runs)]
    if not seeds:
        raise ValueError("no seed is complete yet; start the series again without --table")
    return seeds


def picture(series: Series) -> bytes:
    """Return the accuracy of every method against what it trains, as a PNG."""
    points, seeds = {}, finished(series, RUNS)
    for name, key in {"AdaptFormer": "adaptformer_", "VPT": "vpt_", "linear": "linear", "full": "full"}.items():
        runs = [[series.known(f"{run}_{seed}") or {} for seed in seeds] for run in RUNS if run.startswith(key)]
        trained = [found[0]["trained_parameters"] for found in runs]
        points[name] = (trained, [100 * sum(f["accuracy"] for f in found) / len(found) for found in runs])
    return curves(points, x_label="trained parameters", y_label="accuracy, %", title="Five new classes", log_x=True).png


def so_far(series: Series) -> str:
    """Return the runs that are done, while no seed is complete: too little to judge a claim by."""
    rows = []
    for name in RUNS:
        found = [figures for seed in SEEDS if (figures := series.known(f"{name}_{seed}"))]
        if found:
            scores = mean_and_deviation([100 * figures["accuracy"] for figures in found], 1)
            rows.append([name.replace("_", " "), f"{found[0]['trained_parameters']:,}", scores])
    return f"{machine()}\n\n{markdown_table(['run', 'trained parameters', 'accuracy, %'], rows)}"


def yes(holds: bool) -> str:
    """Return yes, or a no to be seen."""
    return "yes" if holds else "**no**"


def main() -> None:
    """Run what is not there yet and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 training folder, one sub-folder per class")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test folder")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/adapt"), help="where figures are kept")
    parser.add_argument("--table", action="store_true", help="run nothing; take the seeds that are complete")
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/adaptformer.md")
    options = parser.parse_args()
    series = Series(options.out)
    folders = data(series, options.data, options.test)
    bundle = pretrained(series, folders)
    for seed in () if options.table else SEEDS:
        for name, (method, settings) in RUNS.items():
            adapted(series, f"{name}_{seed}", method, bundle, folders, seed, **settings)
    complete = any(all(series.known(f"{name}_{seed}") for name in RUNS) for seed in SEEDS)
    text = table(series, bundle) if complete else so_far(series)
    print(f"\n{text}")
    if options.write:
        rewrite(PAGE, "claims", text)
    if options.write and complete:
        (PAGE.parents[1] / "pictures" / "adaptformer.png").write_bytes(picture(series))


if __name__ == "__main__":
    main()
