"""Classes learnt task after task at small scale (arXiv 2211.12292): what gates and drift compensation are worth.

    python -m benchmarks.claims.gcab --data CIFAR10_TRAIN --test CIFAR10_TEST --write   # for a GPU
    python -m benchmarks.claims.gcab … --per_class 200 --epochs 6 --batch_size 32 --lr 8e-3 --plain   # for a core

Ten classes in five tasks of two, a ConViT of width 96 from fresh weights, parts of the method left out one after the
other. Runs are kept in `--out`, so an interrupted series goes on where it stopped. `--smoke` takes digits and an epoch
for each task: it shows that the script works, and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

import patchloom as pl
from benchmarks.claims.ccvit import subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "gcab.md"
ENCODER = "gcab_convit_micro_patch4_32"
VARIANTS: dict[str, dict[str, Any]] = {
    "fine-tuning": {"learner": "finetune"},
    "gates": {"compensate": False},
    "gates, drift loss": {"cascade": False},
    "gates, drift loss, cascade": {},
}
FULL, PLAIN, FREE = "gates, drift loss, cascade", "fine-tuning", "full, λ of gates 0"
TASKS = 5
DRIFT = 0.001
"""Weight of the drift for a batch of 128; the norm grows with the square root of the batch."""
SHARED: dict[str, Any] = {"num_workers": 1, "probe_every": 0, "health_every": 0, "resume": True, "report": False}
PLAIN_IMAGES: dict[str, Any] = {"auto_augment": None, "crop_scale": (0.6, 1.0), "color_jitter": 0.0}
"""In place of RandAugment: little is learnt from such images in few steps."""
SMOKE: dict[str, Any] = {"shots": 16, "batch_size": 16, "flip": 0.0}


def measured(options: argparse.Namespace, seed: int, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a run."""
    run = pl.adapt(
        "gcab",
        data=options.data,
        test=options.test,
        encoder=ENCODER,
        image_size=32,
        tasks=TASKS,
        class_order="seed",
        epochs=options.epochs,
        out=options.out / str(seed) / name.replace(", ", "_").replace(" ", "_"),
        seed=seed,
        **SHARED,
        **(SMOKE if options.smoke else {"batch_size": options.batch_size, "lr": options.lr}),
        **(PLAIN_IMAGES if options.plain else {}),
        **({} if "learner" in settings else {"lambda_drift": DRIFT * (128 / options.batch_size) ** 0.5}),
        **settings,
    )
    return run.summary


def main() -> None:
    """Compute what is missing and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labelled training images, any source")
    parser.add_argument("--test", help="labelled test images")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/gcab"))
    parser.add_argument("--epochs", type=int, default=10, help="of each task")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4, help="for a batch of 512, as published")
    parser.add_argument("--per_class", type=int, default=0, help="images of each class of --data; 0 for all")
    parser.add_argument("--plain", action="store_true", help="crops and mirrors alone, without RandAugment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="digits, one epoch, one seed: does the script run?")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/systems/{PAGE.name}")
    options = parser.parse_args()
    if options.smoke:
        options.data, options.test, options.epochs, options.seeds = "digits", "digits:test", 1, 1
    if options.data is None or options.test is None:
        parser.error("give --data and --test, or --smoke")
    if options.per_class and not options.smoke:
        options.data = str(subset(Path(options.data), options.out / "images", options.per_class, seed=0))
    variants = {**VARIANTS, FREE: {"lambda_gate": 0.0}}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in range(options.seeds):
        for name, settings in variants.items():
            runs[name].append(measured(options, seed, name, settings))

    def values(name: str, figure: str) -> np.ndarray:
        return 100 * np.array([run[figure] for run in runs[name]])

    average, last, lost = "average_incremental_accuracy", "last_accuracy", "forgetting"
    shown = [average, last, lost, f"task_aware_{average}", f"task_aware_{last}"]
    rows = [[name, *(mean_and_deviation(values(name, figure).tolist(), 1) for figure in shown)] for name in variants]
    gain = values(FULL, average) - values(PLAIN, average)
    aware_gain = values(FULL, f"task_aware_{average}") - values(PLAIN, f"task_aware_{average}")
    less_lost = 100 * (1 - values(FULL, lost) / np.maximum(values(PLAIN, lost), 1e-9))
    order = [values(name, average) for name in VARIANTS]
    steps = np.min([after - before for before, after in itertools.pairwise(order)], axis=0)
    taken, taken_freely = (100 * np.array([1 - run["free"][-1] for run in runs[name]]) for name in (FULL, FREE))
    rising = all(all(np.diff(run["free"]) <= 0) for run in runs[FULL])
    claims = [
        ["full method over fine-tuning, average accuracy", gain, "≥ 5", gain.mean() >= 5],
        ["less forgetting than fine-tuning, in percent", less_lost, "≥ 20", less_lost.mean() >= 20],
        ["least step of the order of the table", steps, "≥ −0.5", steps.mean() >= -0.5],
        ["gain where the task is known over gain where not", aware_gain - gain, "> 0", (aware_gain - gain).mean() > 0],
        ["reserved after five tasks, in percent", taken, "< 100, rising", rising and taken.max() < 100],
        ["and with λ of gates 0", taken_freely, "≥ that", taken_freely.mean() >= taken.mean()],
    ]
    said = f"{options.seeds} seeds, {options.epochs} epochs of each of {TASKS} tasks, "
    said += f"{options.per_class or 'all'} images of each class, batches of {options.batch_size}"
    header = ["learner", "average", "at the end", "forgetting", "average, task known", "at the end, task known"]
    text = f"{machine()}\n\n{said}. In percent.\n\n{markdown_table(header, rows)}\n\n" + markdown_table(
        ["claim, points", "measured", "check", "holds"],
        [[name, mean_and_deviation(v.tolist(), 1), gate, "yes" if h else "**no**"] for name, v, gate, h in claims],
    )
    print(text)
    if options.write and not options.smoke:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
