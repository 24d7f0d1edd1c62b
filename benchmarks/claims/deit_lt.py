"""DeiT-LT's small-scale claims on a long-tailed part of CIFAR-10 (arXiv 2404.02900).

    python -m benchmarks.claims.deit_lt --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

1000 images of the most frequent class, 20 of the rarest; measured on a balanced test set. For every seed: a CNN
teacher trained on weak views (crop and flip) by LDAM with deferred re-weighting, one trained by the same recipe on
its student's strong views, a student of each, and the same ViT trained with cross-entropy alone for as many epochs.
Small where time asks for it: patches of 8 pixels, a ResNet of 8 layers, no SAM.
Figures are kept in `--out`, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import register_model

import patchloom as pl
from benchmarks.claims.ccvit import Series, subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.encoders.cifar_resnet import CIFARResNet
from patchloom.encoders.cifar_resnet import cifar_resnet20 as resnet
from patchloom.encoders.micro import deit_micro_distilled_patch4_32
from patchloom.report import curves
from patchloom.systems.deit_lt.model import DistillationTokenLoss
from patchloom.training.long_tail import effective_number_weights

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "deit_lt.md"
SEEDS = (0, 1, 2)
ENGINE: dict[str, Any] = {
    "imbalance": 50,
    "image_size": 32,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 20,
    "precision": "32-true",
    "accelerator": "cpu",
}
LATE = {"reweight_from": 0.6}
STRONG = {"crop_padding": None, "auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "crop_scale": (0.3, 1.0)}
TEACHER: dict[str, Any] = {
    "preset": "ldam_sam",
    "encoder": "cifar_resnet8_claims",
    "sam_rho": 0.0,
    "sam_rho_late": 0.0,
    "batch_size": 64,
    "warmup_epochs": 2,
    **LATE,
    # Of a short run: the drops of 200 epochs would leave the re-weighted stage no time to learn.
    "lr_drops": (0.6, 0.85),
    "lr_drop": 0.2,
}
STUDENT: dict[str, Any] = {
    **STRONG,
    "encoder": "deit_claims_distilled_patch8_32",
    "batch_size": 64,
    "lr": 1e-3,
    "lr_base_batch": None,
    "warmup_epochs": 2,
    "drop_path": 0.0,
    "repeated_augmentation": 1,
}
KEPT = ("accuracy", "balanced_accuracy", "accuracy_head", "accuracy_mid", "accuracy_tail", "per_class_accuracy")
ANSWERS = {"class token": "cls_", "distillation token": "dist_", "mean of both": ""}


@register_model
def deit_claims_distilled_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The student the claims were measured with: width 128, 6 blocks, patches of 8 pixels."""
    return deit_micro_distilled_patch4_32(pretrained, **{"patch_size": 8, **kwargs})


@register_model
def cifar_resnet8_claims(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """The teacher: 8 layers."""
    kwargs = {name: value for name, value in kwargs.items() if name in ("num_classes", "in_chans", "cosine_head")}
    model = CIFARResNet(8, **kwargs)
    model.pretrained_cfg = {**resnet().pretrained_cfg, "architecture": "cifar_resnet8_claims"}
    return model


def trained(
    series: Series,
    name: str,
    verb: Any,
    method: str,
    folders: dict[str, Path],
    keep_model: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Return the figures of one run, made once; of a teacher the bundle stays."""

    def compute() -> dict[str, Any]:
        out = series.out / f"run_{name}"
        data = {"data": str(folders["train"]), "test": str(folders["test"]), "out": str(out)}
        run = verb(method, **data, **{**ENGINE, **settings}, overwrite=out.exists())
        figures = {
            key: value
            for key, value in run.summary.items()
            if key in ("seconds", "test_feature_cosine", "class_counts")
            or key.removeprefix("cls_").removeprefix("dist_") in KEPT
        }
        if keep_model:
            shutil.rmtree(series.out / f"model_{name}", ignore_errors=True)
            run.model.replace(series.out / f"model_{name}")
        shutil.rmtree(out)
        return figures

    return series.get(name, compute)


def seed_runs(series: Series, folders: dict[str, Path], seed: int, epochs: int) -> None:
    """Train the five models of a seed."""
    common = {"seed": seed, "epochs": epochs}
    for views, change in (("weak", {}), ("strong", STRONG)):
        name = f"teacher_{views}_{seed}"
        trained(series, name, pl.adapt, "scratch", folders, keep_model=True, **common, **{**TEACHER, **change})
        teacher = {"teacher": str(series.out / f"model_{name}"), **LATE}
        trained(series, f"student_{views}_{seed}", pl.distill, "deit_lt", folders, **common, **STUDENT, **teacher)
    trained(series, f"alone_{seed}", pl.adapt, "scratch", folders, **common, **STUDENT)


def identity() -> float:
    """Return how far weighted and unweighted distillation are apart where all classes have as many images."""
    torch.manual_seed(0)
    cls, dist, teacher = (torch.randn(64, 10) for _ in range(3))
    loss = DistillationTokenLoss(class_weights=effective_number_weights([100] * 10))
    labels = torch.arange(64) % 10
    plain, weighted = (loss(cls, dist, labels, teacher, weighted=w)["loss"] for w in (False, True))
    return abs(float(plain - weighted))


def table(series: Series, seeds: list[int], epochs: int) -> str:
    """Return what was measured, and the claims."""
    runs = {
        kind: [series.known(f"{kind}_{seed}") or {} for seed in seeds]
        for kind in ("teacher_weak", "teacher_strong", "alone", "student_weak", "student_strong")
    }

    def percent(kind: str, key: str) -> np.ndarray:
        return np.array([100 * figures[key] for figures in runs[kind]])

    shown = [("teacher, weak views", "teacher_weak", ""), ("teacher, strong views", "teacher_strong", "")]
    shown += [("the ViT alone, cross-entropy", "alone", "")]
    shown += [(f"DeiT-LT, {name}", "student_weak", prefix) for name, prefix in ANSWERS.items()]
    shown += [("DeiT-LT of the strong views' teacher, mean of both", "student_strong", "")]
    rows = [
        [name, *(mean_and_deviation(percent(kind, prefix + key), 1) for key in KEPT[1:5])]
        for name, kind, prefix in shown
    ]
    tail = percent("student_weak", "dist_accuracy_tail") - percent("student_weak", "cls_accuracy_tail")
    head = percent("student_weak", "cls_accuracy_head") - percent("student_weak", "dist_accuracy_head")
    mean = percent("student_weak", "balanced_accuracy")
    single = np.maximum(
        percent("student_weak", "cls_balanced_accuracy"), percent("student_weak", "dist_balanced_accuracy")
    )
    gain = mean - percent("alone", "balanced_accuracy")
    weak, strong = (percent(f"student_{views}", "test_feature_cosine") / 100 for views in ("weak", "strong"))
    apart = identity()
    claims = [
        ["1a distillation token over class token on tail classes, points", tail, "≥ 8", tail.mean() >= 8],
        ["1b class token over distillation token on head classes, points", head, "≥ 0", head.mean() >= 0],
        ["2a mean of both over the better head, balanced, points", mean - single, "≥ -0.5",
         (mean - single).mean() >= -0.5],
        ["2b mean of both over the ViT alone, balanced, points", gain, "≥ 5", gain.mean() >= 5],
        ["3 cosine of the features: strong views' teacher minus weak views'", strong - weak, "≥ 0.05",
         (strong - weak).mean() >= 0.05],
    ]  # fmt: skip
    measured = [
        [name, f"{mean_and_deviation(values)} ({values.min():.2f} to {values.max():.2f})", check, _yes(holds)]
        for name, values, check, holds in claims
    ]
    measured.append(["4 equal counts: weighted minus unweighted loss", f"{apart:.1e}", "≤ 1e-6", _yes(apart <= 1e-6)])
    counts = ", ".join(str(count) for count in runs["alone"][0]["class_counts"].values())
    head_row = [f"{len(seeds)} of {len(SEEDS)} seeds, {epochs} epochs", "balanced, %", "head", "mid", "tail"]
    return "\n\n".join(
        [
            f"{machine()}; training images of each class: {counts}",
            markdown_table(head_row, rows),
            markdown_table(["claim", "measured (range)", "check", "holds"], measured),
        ]
    )


def picture(series: Series, seeds: list[int]) -> bytes:
    """Return the accuracy of each class, from the most frequent to the rarest, by each head, as a PNG."""
    lines = {}
    for name, prefix in ANSWERS.items():
        shares = [list(series.known(f"student_weak_{s}")[f"{prefix}per_class_accuracy"].values()) for s in seeds]  # type: ignore[index]
        lines[name] = (list(range(10)), [100 * float(value) for value in np.mean(shares, axis=0)])
    x_label = "class, from the most frequent to the rarest"
    return curves(lines, x_label=x_label, y_label="accuracy, %", title="Each head's accuracy").png


def _yes(holds: Any) -> str:
    return "yes" if holds else "**no**"


def main() -> None:
    """Run what is not there yet and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 training folder, one sub-folder per class")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test folder")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/deit_lt"), help="where figures are kept")
    parser.add_argument("--epochs", type=int, default=12, help="of every model")
    parser.add_argument("--images", type=int, default=1000, help="of the most frequent class")
    parser.add_argument("--test-images", type=int, default=150, help="of each class")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/deit_lt.md")
    options = parser.parse_args()
    series = Series(options.out / f"{options.images}-{options.epochs}")
    folders = {
        "train": subset(options.data, options.out / f"train-{options.images}", options.images, seed=3),
        "test": subset(options.test, options.out / f"test-{options.test_images}", options.test_images, seed=0),
    }
    for number, seed in enumerate(SEEDS):
        seed_runs(series, folders, seed, options.epochs)
        text = table(series, list(SEEDS[: number + 1]), options.epochs)
        print(f"\n{text}", flush=True)
        if options.write:
            rewrite(PAGE, "claims", f"{text}\n\n![Accuracy of each class by each head](../pictures/deit_lt.png)")
            (PAGE.parents[1] / "pictures" / "deit_lt.png").write_bytes(picture(series, list(SEEDS[: number + 1])))


if __name__ == "__main__":
    main()
