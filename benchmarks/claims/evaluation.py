"""What the evaluation harness claims of itself, on CIFAR-10.

    python -m benchmarks.claims.evaluation --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

1. k-NN and the linear probe rank encoders alike: Spearman's correlation, with a bootstrap interval over encoders, of
   both accuracies over encoders pre-trained by CCViT for six different lengths, three seeds each.
2. The interval of few-shot accuracy shrinks as one over the square root of the number of episodes.

Figures are kept in `--out`, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import patchloom as pl
from benchmarks.claims.ccvit import ENCODER, RECIPE, Series, subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
LENGTHS = (0, 10, 30, 80, 160, 300)
SEEDS = (0, 1, 2)
EPISODES = (25, 100, 400, 1600)


def measure(steps: int, seed: int, folders: dict[str, Path], runs: Path) -> dict[str, Any]:
    """Return k-NN and linear-probe accuracy of an encoder pre-trained for some steps."""
    settings: dict[str, Any] = {"train": str(folders["train"]), "test": str(folders["test"]), "num_workers": 1}
    if steps:
        recipe = {**RECIPE, "batch_size": 64, "max_steps": steps, "num_workers": 0}
        out = runs / f"ccvit-{steps}-{seed}"
        run = pl.pretrain("ccvit", data=str(folders["images"]), out=str(out), seed=seed, resume=True, **recipe)
        settings["encoder"] = str(run.model)
    else:
        settings |= {"encoder": ENCODER, "untrained": True, "seed": seed}
    return {name: pl.evaluate(name, **settings)["accuracy"] for name in ("knn", "linear")}


def rank_agreement(pairs: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Return Spearman's correlation of (n, 2) scores and its 95 % bootstrap interval over the n encoders."""
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = pairs[generator.integers(len(pairs), size=len(pairs))]
        value = spearmanr(drawn[:, 0], drawn[:, 1]).statistic
        if math.isfinite(value):
            values.append(value)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic), float(low), float(high)


def few_shot_widths(model: str, seed: int, folders: dict[str, Path]) -> dict[str, Any]:
    """Return the width of the 95 % interval of few-shot accuracy by the number of episodes, of a seed."""
    settings: dict[str, Any] = {"train": str(folders["train"]), "test": str(folders["test"]), "num_workers": 1}
    settings["seed"] = seed
    widths = {}
    for episodes in EPISODES:
        low, high = pl.evaluate("few_shot", encoder=model, episodes=episodes, **settings)["interval"]
        widths[str(episodes)] = high - low
    return widths


def main() -> None:
    """Compute what is missing and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims"))
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE.name}")
    parser.add_argument("--only", choices=["ranks", "few_shot"])
    options = parser.parse_args()
    series = Series(options.out / "evaluation")
    runs = options.out / "runs"
    folders = {
        "images": subset(options.data, options.out / "cifar-pretrain", 900, seed=0),
        "train": subset(options.data, options.out / "cifar-labelled", 300, seed=1),
        "test": subset(options.test, options.out / "cifar-test", 200, seed=0),
    }
    text = machine()
    if options.only != "few_shot":
        scores = {
            (steps, seed): series.get(f"ranks-{steps}-{seed}", lambda s=steps, k=seed: measure(s, k, folders, runs))
            for seed in SEEDS
            for steps in LENGTHS
        }
        rows = [
            [str(steps), *(_mean([scores[steps, seed][name] for seed in SEEDS]) for name in ("knn", "linear"))]
            for steps in LENGTHS
        ]
        pairs = np.array([[figures["knn"], figures["linear"]] for figures in scores.values()])
        agreement, low, high = rank_agreement(pairs)
        text += (
            f"\n\n{markdown_table(['steps of pre-training', 'k-NN, %', 'linear probe, %'], rows)}\n\n"
            f"Spearman's correlation over the {len(pairs)} encoders: {agreement:.2f} "
            f"(95 % interval {low:.2f} to {high:.2f})."
        )
    if options.only != "ranks":
        model = str(runs / f"ccvit-{LENGTHS[-1]}-0" / "model")
        drawn = [series.get(f"few-shot-{s}", lambda k=s: few_shot_widths(model, k, folders)) for s in SEEDS]
        widths = {n: [100 * widths[str(n)] for widths in drawn] for n in EPISODES}
        # From the last, since the spread of few episodes is itself poorly known.
        last = float(np.mean(widths[EPISODES[-1]]))
        rows = [[str(n), mean_and_deviation(widths[n]), f"{last * math.sqrt(EPISODES[-1] / n):.2f}"] for n in EPISODES]
        header = ["episodes", "width of the interval, points", "as 1/√episodes from the last"]
        text += f"\n\n{markdown_table(header, rows)}"
    print(text)
    if options.write:
        rewrite(PAGE, "evaluation_claims", text)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values) * 100:.1f} ± {np.std(values, ddof=1) * 100:.1f}"


if __name__ == "__main__":
    main()
