"""How often 95 % intervals hold the true value: simulated test sets whose true scores are known.

    python -m benchmarks.coverage --write

Classes are unequal (shares such as 0.9 and 0.1), right answers of each class are as likely as the setting says, and
scores of a finding are normal, or normal for a part of the images that have it. The true value of a score is that of
the probabilities themselves; of retrieval values and of areas it is known from their distributions.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import markdown_table, rewrite
from patchloom.segment.overlap import mean_iou_score
from patchloom.statistics.intervals import bootstrap_interval, paired_bootstrap
from patchloom.statistics.metrics import (
    SCORES,
    Score,
    accuracy,
    auroc,
    balanced_accuracy,
    kappa,
    macro_f1,
    mean_auroc,
    mean_value,
)

Array = np.ndarray
PAGE = Path(__file__).parents[1] / "docs" / "evaluate.md"
SIZES = (20, 50, 200, 2000)
# Shares of the classes, and of each class the probability of every answer.
CLASSIFIERS: dict[str, tuple[list[float], list[list[float]]]] = {
    "0.7 and 0.3, right for 90 and 60 %": ([0.7, 0.3], [[0.9, 0.1], [0.4, 0.6]]),
    "0.8 and 0.2, right for 98 and 10 %": ([0.8, 0.2], [[0.98, 0.02], [0.9, 0.1]]),
    "0.75 and 0.25, right for 98 and 97 %": ([0.75, 0.25], [[0.98, 0.02], [0.03, 0.97]]),
    "0.97 and 0.03, right for 99 and 60 %": ([0.97, 0.03], [[0.99, 0.01], [0.4, 0.6]]),
    "five, 0.4 to 0.1, right for 90 to 50 %": (
        [0.4, 0.2, 0.15, 0.15, 0.1],
        [
            [0.9, 0.07, 0.03, 0, 0],
            [0.15, 0.7, 0.15, 0, 0],
            [0.05, 0.15, 0.6, 0.15, 0.05],
            [0, 0.1, 0.2, 0.6, 0.1],
            [0, 0.1, 0.2, 0.2, 0.5],
        ],
    ),
}
# Share of images with the finding; by how much it shifts a normal score; share of them in which it shows.
FINDINGS = {
    "finding in half, AUROC 0.70": (0.5, 0.70, 1.0),
    "finding in a fifth, AUROC 0.90": (0.2, 0.90, 1.0),
    "finding in a fifth, AUROC 0.98": (0.2, 0.98, 1.0),
    "finding in a tenth, AUROC 0.85": (0.1, 0.85, 1.0),
    "finding in a fifth, to be seen in 70 % of them": (0.2, 0.9999, 0.7),
}


class Simulated(NamedTuple):
    """What an interval is held against."""

    name: str
    score: Score
    true: float
    draw: Callable[[int, np.random.Generator], tuple[Array, Array]]
    """Takes a number of images, returns predictions and targets."""
    classes: int = 0
    """All of which a set must have to count: no interval allows for a class without images."""


def simulations() -> Iterator[Simulated]:
    """Yield every score in every setting."""
    for name, (shares, answers) in CLASSIFIERS.items():
        for score in (accuracy, balanced_accuracy, macro_f1, kappa):
            if score is not kappa or len(shares) > 2:
                yield classifier(name, score, np.array(shares), np.array(answers))
    for name, finding in FINDINGS.items():
        yield found_by_score(name, *finding)
    yield three_ways()
    yield Simulated("values: 1 for 90 %, else Beta(2, 2)", mean_value, 0.95, _precisions)
    yield Simulated("values: Beta(20, 2)", mean_value, 20 / 22, lambda n, rng: (rng.beta(20, 2, n), np.zeros(n)))
    yield Simulated("values: found or not, 95 %", mean_value, 0.95, lambda n, rng: (rng.random(n) < 0.95, np.zeros(n)))
    yield Simulated("two classes, IoU 0.9 and 0.43 (areas unequal)", mean_iou_score, (0.9 + 3 / 7) / 2, _areas)


def classifier(name: str, score: Score, shares: Array, answers: Array) -> Simulated:
    """Return a simulated classifier; its true score is that of its probabilities."""
    kinds = np.indices(answers.shape).reshape(2, -1)
    joint = (shares[:, None] * answers).ravel()

    def draw(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        truth, predicted = kinds[:, rng.choice(len(joint), n, p=joint)]
        return predicted, truth

    whole = np.round(joint[None] * 1e6).astype(np.int64)
    true = float(score.weighted(kinds[1], kinds[0], whole)[0])
    return Simulated(f"classes {name}", score, true, draw, classes=0 if score is accuracy else len(shares))


def found_by_score(name: str, share: float, area: float, seen: float) -> Simulated:
    """Return a finding whose score is normal, shifted where it is there and shows."""
    shift = np.sqrt(2) * NormalDist().inv_cdf(area)

    def draw(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        truth = (rng.random(n) < share).astype(np.float64)
        return rng.normal(size=n) + shift * truth * (rng.random(n) < seen), truth

    return Simulated(name, auroc, seen * area + (1 - seen) / 2, draw)


def three_ways() -> Simulated:
    """Return three unequal classes with scores that are normal, higher by one for the true class."""

    def draw(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        truth = rng.choice(3, n, p=[0.6, 0.25, 0.15])
        return rng.normal(size=(n, 3)) + (truth[:, None] == np.arange(3)), truth

    return Simulated("three classes 0.6 to 0.15", mean_auroc, NormalDist().cdf(1 / np.sqrt(2)), draw)


def _precisions(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    return np.where(rng.random(n) < 0.9, 1.0, rng.beta(2, 2, n)), np.zeros(n)


def _areas(n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return areas of a large class well met and of a small one that varies: intersection, said, true."""
    large, small = 1000 * rng.gamma(4, 0.25, n), 100 * rng.gamma(1, 1, n)
    met = rng.beta(18, 2, n), rng.beta(3, 2, n)
    both = np.stack([large * met[0] * 2 / 1.9, small * met[1]], 1)
    sizes = np.stack([large, small], 1)
    both[:, 0] = sizes[:, 0] * (18 / 19) * (met[0] / 0.9)
    return np.stack([both, sizes, sizes], 1), np.zeros(n)


def coverage(one: Simulated, n: int, tries: int, draws: int, seed: int = 0, **settings: Any) -> tuple[float, float]:
    """Return how often the interval holds the true value, and its mean width; sets without a score do not count."""
    rng = np.random.default_rng(seed)
    held, widths = [], []
    for number in range(tries):
        predictions, truth = one.draw(n, rng)
        if len(np.unique(truth)) < one.classes:
            continue
        found = bootstrap_interval(one.score, predictions, truth, draws=draws, seed=number, **settings)
        if not np.isnan(found.low):
            held.append(found.low - 1e-9 <= one.true <= found.high + 1e-9)
            widths.append(found.high - found.low)
    return float(np.mean(held)), float(np.mean(widths))


def coverage_of_difference(score: Score, n: int, tries: int, draws: int, seed: int = 0) -> float:
    """Return how often the interval of a difference holds it: two classifiers, the second right more often."""
    rng = np.random.default_rng(seed)
    held = []
    # Right of both, of the first only, of the second only, of none; by class.
    joint = np.array([[0.85, 0.03, 0.07, 0.05], [0.5, 0.05, 0.2, 0.25]])
    shares = np.array([0.7, 0.3])
    kinds = np.array(
        [(c, c if k in (0, 1) else 1 - c, c if k in (0, 2) else 1 - c) for c in (0, 1) for k in range(4)]
    ).T
    chances = (shares[:, None] * joint).ravel()
    whole = np.round(chances[None] * 1e6).astype(np.int64)
    true = float(score.weighted(kinds[2], kinds[0], whole)[0] - score.weighted(kinds[1], kinds[0], whole)[0])
    for number in range(tries):
        truth, first, second = kinds[:, rng.choice(8, n, p=chances)]
        found = paired_bootstrap(score, first, second, truth, draws=draws, seed=number)
        held.append(found.low - 1e-9 <= true <= found.high + 1e-9)
    return float(np.mean(held))


def main() -> None:
    """Simulate, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000, help="simulated test sets of each size; a quarter above 500")
    parser.add_argument("--draws", type=int, default=500, help="bootstrap draws of each interval")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--only", choices=[*sorted(SCORES), "miou", "differences"])
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/{PAGE.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tries = {n: options.tries if n <= 500 else options.tries // 4 for n in options.sizes}
    rows = []
    for one in simulations():
        if options.only in (None, one.score.name):
            found = [coverage(one, n, tries[n], options.draws) for n in options.sizes]
            plain = coverage(one, options.sizes[0], options.tries, options.draws, kind="percentile")[0]
            shown = [f"{share:.3f} ({width:.2f})" for share, width in found]
            rows.append([one.score.name, one.name, *shown, f"{plain:.3f}"])
            print(rows[-1], flush=True)
    if options.only in (None, "differences"):
        for score in (accuracy, balanced_accuracy, macro_f1):
            held = [coverage_of_difference(score, n, tries[n], options.draws) for n in options.sizes]
            rows.append([f"difference in {score.name}", "two classifiers", *(f"{share:.3f}" for share in held), ""])
            print(rows[-1], flush=True)
    header = ["score", "simulated", *(f"n = {n}" for n in options.sizes), f"plain bootstrap, n = {options.sizes[0]}"]
    errors = [np.sqrt(0.95 * 0.05 / count) for count in (options.tries, max(1, options.tries // 4))]
    made = (
        f"{date.today()}, {options.tries:,} test sets each ({options.tries // 4:,} above 500 images), {options.draws} "
        f"draws; the standard error of a coverage of 0.95 is {errors[0]:.3f} ({errors[1]:.3f})"
    )
    text = f"{made}\n\n{markdown_table(header, rows)}"
    print(text)
    if options.write:
        rewrite(PAGE, "coverage", text)


if __name__ == "__main__":
    main()
