"""ScaleKD's small-scale claims on CIFAR-10 (arXiv 2411.06786): does a ViT teach students of other kinds?

    python -m benchmarks.claims.scalekd --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

The teacher, a ViT of width 128 and depth 6, learns from 2000 images of each class; students see 120 of each, as is the
case of a large model and a small labelled set. Students are a ResNet of 8 layers and a ViT of width 64, each trained
alone, and taught in several ways, for as many steps by the same recipe. Small where
time asks for it: patches of 8 pixels, few images; `--per_class 1000 --epochs 8` is 10 000 images. Figures are kept in
`--out`, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model

import patchloom as pl
from benchmarks.claims.ccvit import Series, subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.encoders.micro import vit_micro_patch4_32
from patchloom.io import read_config
from patchloom.report import image_grid
from patchloom.systems.scalekd.method import ScaleKDConfig, ScaleKDMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.report import held_out_images

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "scalekd.md"
PICTURE = PAGE.parents[1] / "pictures" / "scalekd.png"
SEEDS = (0, 1, 2)
ENGINE: dict[str, Any] = {
    "image_size": 32,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 20,
    "precision": "32-true",
}
RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "batch_size": 64,
    "lr": 1e-3,
    "lr_base_batch": None,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "warmup_epochs": 1,
    "clip_grad": 5.0,
    "crop_padding": 4,
    "auto_augment": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "pool": "avg",
}
ALONE = {"repeated_augmentation": 1}
TAUGHT: dict[str, Any] = {"lr_drops": ()}
FEATURES_ONLY = {**TAUGHT, "kd": False, "tpp": False, "dfm": False}
# Name of a run: the student, the verb, the method and what is set.
RUNS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "cnn alone": ("cifar_resnet8", "adapt", "scratch", ALONE),
    "cnn kd": ("cifar_resnet8", "distill", "logits", {}),
    "cnn scalekd": ("cifar_resnet8", "distill", "scalekd", TAUGHT),
    "cnn scalekd, one view": ("cifar_resnet8", "distill", "scalekd", {**TAUGHT, "dfm": False}),
    "cnn cross-attention": ("cifar_resnet8", "distill", "scalekd", FEATURES_ONLY),
    "cnn 1x1 convolution": ("cifar_resnet8", "distill", "scalekd", {**FEATURES_ONLY, "cap": False}),
    "vit alone": ("vit_claims_student_patch8_32", "adapt", "scratch", ALONE),
    "vit scalekd": ("vit_claims_student_patch8_32", "distill", "scalekd", TAUGHT),
}
KEPT = ("accuracy", "seconds", "teacher_accuracy", "agreement", "spatial_distance", "frequency_distance", "parameters")


@register_model
def vit_claims_teacher_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The teacher: width 128, 6 blocks, patches of 8 pixels."""
    return vit_micro_patch4_32(pretrained, **{"patch_size": 8, **kwargs})


@register_model
def vit_claims_student_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The student: width 64, 4 blocks, 2 heads."""
    return vit_micro_patch4_32(pretrained, **{"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, **kwargs})


def trained(series: Series, name: str, folders: dict[str, Path], keep: str | None = None, **how: Any) -> dict[str, Any]:
    """Return the figures of one run, made once; `keep` is a part of its folder that stays, under its own name."""
    encoder, verb, method, settings = how.pop("run")

    def compute() -> dict[str, Any]:
        out = series.out / f"run_{name.replace(' ', '_')}"
        data = {"data": str(folders["train"]), "test": str(folders["test"]), "out": str(out), "encoder": encoder}
        run = getattr(pl, verb)(method, **data, **{**ENGINE, **RECIPE, **settings, **how}, overwrite=out.exists())
        figures = {key: run.summary[key] for key in KEPT if key in run.summary}
        if keep == "model":
            shutil.rmtree(series.out / "teacher", ignore_errors=True)
            run.model.replace(series.out / "teacher")
        elif keep == "picture":
            (series.out / "features.png").write_bytes(picture(out, folders["test"]))
        shutil.rmtree(out)
        return figures

    return series.get(name.replace(" ", "_"), compute)


def picture(run: Path, test: Path) -> bytes:
    """Return the features of teacher and student of a finished run on test images, as a PNG."""
    config = config_from_mapping(ScaleKDConfig, read_config(run / "config.yaml"))
    method = ScaleKDMethod(config, open_source(config.data))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    method.on_load_checkpoint(state)
    method.load_state_dict(state["state_dict"])
    return image_grid(method.pictures(held_out_images(open_source(str(test)), 32, 8))).png


def table(series: Series, seeds: list[int]) -> str:
    """Return the claims with what was measured."""
    found = {name: [series.known(f"{name.replace(' ', '_')}_{seed}") or {} for seed in seeds] for name in RUNS}
    score = {name: [100 * figures["accuracy"] for figures in runs] for name, runs in found.items()}

    def versus(name: str, other: str) -> tuple[str, float]:
        gains = [a - b for a, b in zip(score[name], score[other], strict=True)]
        said = f"{mean_and_deviation(score[name], 1)} against {mean_and_deviation(score[other], 1)} %: "
        return said + f"{mean_and_deviation(gains, 1)} points", sum(gains) / len(gains)

    cnn, cnn_gain = versus("cnn scalekd", "cnn alone")
    vit, vit_gain = versus("vit scalekd", "vit alone")
    answers, answers_gain = versus("cnn scalekd", "cnn kd")
    cross, cross_gain = versus("cnn cross-attention", "cnn 1x1 convolution")
    both, one = (
        {key: [figures[f"{key}_distance"] for figures in found[name]] for key in ("spatial", "frequency")}
        for name in ("cnn scalekd", "cnn scalekd, one view")
    )
    lower = 1 - sum(both["frequency"]) / sum(one["frequency"])
    distances = "; ".join(
        f"{key} {mean_and_deviation(both[key], 3)} against {mean_and_deviation(one[key], 3)}" for key in both
    )
    rows = [
        ["1a a CNN gains over training alone", cnn, "≥ +1.5 points", yes(cnn_gain >= 1.5)],
        ["1b a ViT gains over training alone", vit, "≥ +2 points", yes(vit_gain >= 2)],
        ["2 features add to answers (CNN)", answers, "≥ +0.5 points", yes(answers_gain >= 0.5)],
        ["3 cross-attention against a 1x1 convolution, features only", cross, "≥ +0.3 points", yes(cross_gain >= 0.3)],
        [
            "4 the second view brings features without their mean nearer",
            f"{distances}: frequency {lower:.0%} lower",
            "≥ 15 % lower",
            yes(lower >= 0.15),
        ],
    ]
    teacher = 100 * found["cnn scalekd"][0]["teacher_accuracy"]
    step = [a["seconds"] / b["seconds"] for a, b in zip(found["cnn scalekd"], found["cnn alone"], strict=True)]
    header = ["claim", f"measured ({len(seeds)} of {len(SEEDS)} seeds)", "check", "holds"]
    about = f"The teacher is right for {teacher:.1f} %. A run by ScaleKD took {mean_and_deviation(step, 1)} × as long."
    return f"{machine()}\n\n{about}\n\n{markdown_table(header, rows)}"


def yes(holds: bool) -> str:
    """Return yes, or a no to be seen."""
    return "yes" if holds else "**no**"


def main() -> None:
    """Run what is not there yet and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 training folder, one sub-folder per class")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test folder")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/scalekd"), help="where figures are kept")
    parser.add_argument("--per_class", type=int, default=120, help="images of each class a student sees")
    parser.add_argument("--epochs", type=int, default=8, help="passes of a student over them")
    parser.add_argument("--teacher_per_class", type=int, default=2000)
    parser.add_argument("--teacher_epochs", type=int, default=4)
    parser.add_argument("--test_per_class", type=int, default=150)
    parser.add_argument("--table", action="store_true", help="run nothing; take the seeds that are complete")
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/scalekd.md")
    options = parser.parse_args()
    series = Series(options.out)
    made = series.out / "data"
    test = subset(options.test, made / "test", options.test_per_class, seed=22)
    large = {"train": subset(options.data, made / "teacher_train", options.teacher_per_class, seed=20), "test": test}
    small = {"train": subset(large["train"], made / "train", options.per_class, seed=21), "test": test}
    if not options.table:
        taught = ("vit_claims_teacher_patch8_32", "adapt", "scratch", ALONE)
        trained(series, "teacher_figures", large, "model", run=taught, epochs=options.teacher_epochs, seed=100)
    for seed in () if options.table else SEEDS:
        for name, run in RUNS.items():
            more = {"teacher": str(series.out / "teacher")} if run[1] == "distill" else {}
            keep = "picture" if (name, seed) == ("cnn scalekd", SEEDS[0]) else None
            trained(series, f"{name} {seed}", small, keep, run=run, epochs=options.epochs, seed=seed, **more)
    seeds = [seed for seed in SEEDS if all(series.known(f"{name.replace(' ', '_')}_{seed}") for name in RUNS)]
    if not seeds:
        raise ValueError("no seed is complete yet; start the series again without --table")
    text = table(series, seeds)
    print(f"\n{text}")
    if options.write:
        shown = (
            "Test images, the teacher's last features in colours, and what the projector makes of the ResNet's, in the "
            "same colours (seed 0):\n\n![features of both](../pictures/scalekd.png)"
        )
        rewrite(PAGE, "claims", f"{text}\n\n{shown}")
        PICTURE.write_bytes((series.out / "features.png").read_bytes())


if __name__ == "__main__":
    main()
