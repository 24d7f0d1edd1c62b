"""DVPT's small-scale claims on CIFAR-10 (arXiv 2307.09787): does the method do what its paper says?

    python -m benchmarks.claims.dvpt --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

The encoder knows five classes and learns the other five from 500 images of each, see `benchmarks.claims.transfer`.
Every run leaves its figures in `--out`, so an interrupted series goes on where it stopped; `--write` puts the table
into docs/systems/dvpt.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.adaptformer import finished, yes
from benchmarks.claims.ccvit import Series
from benchmarks.claims.transfer import SEEDS, adapted, data, pretrained
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import EvalTransform, open_source
from patchloom.report import curves, image_grid
from patchloom.systems.dvpt.method import GradingTransform

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "dvpt.md"
SMALL = {"num_prompts": 8, "rank": 4, "augment": "crop"}
SHARES = (1, 2, 4)
FRACTIONS = (0.1, 0.2, 0.4)
FEW = FRACTIONS[0]
# Prompts of a shallow VPT with as many parameters as DVPT has with share_every 2.
MATCHED = {"num_prompts": 34, "depth": "shallow"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "full": ("finetune", {}),
    "vpt_matched": ("vpt", MATCHED),
    **{f"dvpt_share_{share}": ("dvpt", {**SMALL, "share_every": share}) for share in SHARES},
    "dvpt_static": ("dvpt", {**SMALL, "share_every": 2, "dynamic": False}),
    **{f"dvpt_{f}": ("dvpt", {**SMALL, "share_every": 2, "label_fraction": f}) for f in FRACTIONS},
    "linear_few": ("linear", {"label_fraction": FEW}),
    "vpt_few": ("vpt", {**MATCHED, "label_fraction": FEW}),
    "adaptformer_few": ("adaptformer", {"bottleneck": 4, "label_fraction": FEW}),
}


def table(series: Series) -> str:
    """Return the claims with what was measured."""
    seeds = finished(series, RUNS)
    runs = {name: [series.known(f"{name}_{seed}") or {} for seed in seeds] for name in RUNS}
    score = {name: [100 * figures["balanced_accuracy"] for figures in found] for name, found in runs.items()}
    text = {name: mean_and_deviation(values, 1) for name, values in score.items()}
    mean = {name: sum(values) / len(values) for name, values in score.items()}
    own, size = "dvpt_share_2", {name: added(found[0]) for name, found in runs.items()}
    shares = [mean[f"dvpt_share_{share}"] for share in SHARES]
    pairs = [a - b for a, b in zip(score[own], score["dvpt_static"], strict=True)]
    curve = ", ".join(f"{f}: {text[f'dvpt_{f}']}" for f in FRACTIONS)
    others = {"linear_few": "linear", "vpt_few": "VPT-shallow", "adaptformer_few": "AdaptFormer (4)"}
    rows = [
        [
            "1a beats the linear probe",
            f"{text[own]} against {text['linear']} %",
            "≥ +3 points",
            yes(mean[own] - mean["linear"] >= 3),
        ],
        [
            "1b beats VPT-shallow at equal parameters",
            f"{text[own]} ({size[own]:,}) against {text['vpt_matched']} % ({size['vpt_matched']:,})",
            "≥ +0.5 point",
            yes(mean[own] - mean["vpt_matched"] >= 0.5),
        ],
        [
            "2 label efficiency",
            f"share of labels {curve}, 1: {text[own]}; full tuning with all {text['full']} %",
            "at 0.4 within 1 point of full tuning with all",
            yes(mean["dvpt_0.4"] >= mean["full"] - 1),
        ],
        [
            "3 sharing costs little",
            ", ".join(f"every {s}: {text[f'dvpt_share_{s}']} ({size[f'dvpt_share_{s}']:,})" for s in SHARES),
            "≤ 1 point between them",
            yes(max(shares) - min(shares) <= 1),
        ],
        [
            "4 prompts that read the image",
            f"dynamic {text[own]}, static {text['dvpt_static']} %: {mean_and_deviation(pairs, 1)} points, paired",
            "positive",
            yes(sum(pairs) > 0),
        ],
        [
            f"beyond the paper: above the others with {FEW:.0%} of the labels",
            ", ".join([f"DVPT {text[f'dvpt_{FEW}']}", *(f"{words} {text[name]}" for name, words in others.items())]),
            "above each",
            yes(all(mean[f"dvpt_{FEW}"] > mean[name] for name in others)),
        ],
    ]
    return f"{machine()}\n\n" + markdown_table(
        ["claim", f"measured ({len(seeds)} of {len(SEEDS)} seeds)", "check", "holds"], rows
    )


def picture(series: Series) -> bytes:
    """Return the balanced accuracy against the share of labels, beside full tuning with all of them, as a PNG."""
    names = [*(f"dvpt_{fraction}" for fraction in FRACTIONS), "dvpt_share_2"]
    seeds = finished(series, RUNS)
    means = {
        name: sum(100 * (series.known(f"{name}_{seed}") or {})["balanced_accuracy"] for seed in seeds) / len(seeds)
        for name in (*names, "full", "linear")
    }
    shares = [*FRACTIONS, 1.0]
    lines = {"DVPT": (shares, [means[name] for name in names])}
    lines |= {f"{name}, all labels": (shares, [means[name]] * len(shares)) for name in ("full", "linear")}
    return curves(lines, x_label="share of the labels", y_label="balanced accuracy, %", title="Five new classes").png


def views() -> bytes:
    """Return what the paper's augmentation makes of a few photographs, as a PNG."""
    source = open_source("photos", crop_size=96)
    images = [source.read(index).image for index in (0, 40, 80, 120)]
    transform = GradingTransform(96)
    rows = {"photograph": torch.stack([transform_none(image) for image in images])}
    for turn in range(2):
        seeds = [torch.Generator().manual_seed(10 * turn + number) for number in range(len(images))]
        drawn = [transform(image, seed)["image"] for image, seed in zip(images, seeds, strict=True)]
        rows[f"as trained on, {turn + 1}"] = torch.stack(drawn).float() / 255
    return image_grid(rows, tile=96).png


def transform_none(image: Tensor) -> Tensor:
    """Return the image at the size of the views, in [0, 1]."""
    return EvalTransform(96)(image, torch.Generator())["image"].float() / 255


def added(figures: dict[str, Any]) -> int:
    """Return what trains besides the head."""
    return int(figures["trained_parameters"] - figures.get("head_parameters", 0))


def main() -> None:
    """Run what is not there yet and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 training folder, one sub-folder per class")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test folder")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/adapt"), help="where figures are kept")
    parser.add_argument("--table", action="store_true", help="run nothing; take the seeds that are complete")
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/dvpt.md")
    options = parser.parse_args()
    series = Series(options.out)
    folders = data(series, options.data, options.test)
    bundle = pretrained(series, folders)
    for seed in () if options.table else SEEDS:
        for name, (method, settings) in RUNS.items():
            adapted(series, f"{name}_{seed}", method, bundle, folders, seed, **settings)
    text = table(series)
    print(f"\n{text}")
    if options.write:
        rewrite(PAGE, "claims", text)
        (PAGE.parents[1] / "pictures" / "dvpt.png").write_bytes(picture(series))
        (PAGE.parents[1] / "pictures" / "dvpt_views.png").write_bytes(views())


if __name__ == "__main__":
    main()
