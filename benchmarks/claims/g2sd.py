"""G2SD's small-scale claims on CIFAR-10 (arXiv 2302.14771): is a student better off with a teacher?

    python -m benchmarks.claims.g2sd --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --write

Folders hold one sub-folder of JPEGs per class. The teacher (width 192, 8 blocks, decoder 128 x 4) is pre-trained by MAE
once and fine-tuned once; students (width 96, 6 blocks, decoder 64 x 2) are trained with every seed. Patches of 8 pixels
rather than 4, so that the teacher can be trained for longer. Figures are kept in `--out`, so an
interrupted series goes on where it stopped. `--steps` scales all lengths; 1 is about 40 minutes of one
core.
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
from benchmarks.claims.ccvit import Series, pixels, subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.io import read_config
from patchloom.models.bundle import save_bundle
from patchloom.models.parts import load_masked_model, save_parts
from patchloom.report import image_grid
from patchloom.systems.g2sd.generic_method import G2SDGenericConfig, G2SDGenericMethod
from patchloom.training.config import config_from_mapping
from patchloom.training.metrics import read_metrics

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "g2sd.md"
SEEDS = (0, 1, 2)
TEACHER, STUDENT = "g2sd_teacher_patch8_32", "g2sd_student_patch8_32"
# Optimiser steps at --steps 1, each of 64 images.
TEACHER_STEPS, TUNING_STEPS, GENERIC_STEPS, SPECIFIC_STEPS = 1200, 300, 300, 150
COMMON: dict[str, Any] = {
    "batch_size": 64,
    "lr": 1e-3,
    "lr_base_batch": None,
    "warmup_epochs": 1.0,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "log_every": 5,
    "precision": "32-true",
    "accelerator": "cpu",
}
TASK: dict[str, Any] = {
    "auto_augment": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "crop_scale": (0.4, 1.0),
    "init_scale": 1.0,
    "drop_path": 0.0,
    "layer_decay": 1.0,
}
SMALL = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 2}


@register_model
def g2sd_teacher_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The teacher's encoder: width 192, 8 blocks, three heads, patches of 8 pixels."""
    return _vit({"embed_dim": 192, "depth": 8, "num_heads": 3, **kwargs})


@register_model
def g2sd_student_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The student's encoder: width 96, 6 blocks, three heads, patches of 8 pixels."""
    return _vit({"embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs})


def _vit(arguments: dict[str, Any]) -> Any:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(name, None)
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, "patch_size": 8, **arguments})


class Claims:
    """The runs of the series, each computed once.

    Args:
        series: Where figures are kept; runs lie in `runs` beside them.
        folders: `images` without labels to learn from, labelled `train` and `test`, and `probe`.
        scale: Factor on the lengths of all runs.
    """

    def __init__(self, series: Series, folders: dict[str, Path], scale: float) -> None:
        self.series, self.folders, self.scale = series, folders, scale

    def run(self, name: str, verb: str, method: str, steps: int, **settings: Any) -> dict[str, Any]:
        """Return the figures of a run; its model is in `runs/name`."""
        data = self.folders["images"] if verb == "pretrain" or method == "g2sd_generic" else self.folders["train"]
        fixed = {"data": str(data), "out": self.path(name), "max_steps": max(2, round(steps * self.scale))}

        def compute() -> dict[str, Any]:
            command = getattr(pl, verb)
            summary: dict[str, Any] = command(method, **{**COMMON, **fixed, "overwrite": True, **settings}).summary
            return summary

        return self.series.get(name, compute)

    def path(self, name: str) -> str:
        """Return the folder of a run."""
        return str(self.series.out / "runs" / name)

    def teacher(self) -> None:
        """Pre-train the teacher, fine-tune it, and put another decoder beside its encoder, a random one."""
        wide = {"decoder_dim": 128, "decoder_depth": 4, "decoder_heads": 4}
        self.run("teacher", "pretrain", "mae", TEACHER_STEPS, encoder=TEACHER, **wide)
        tuning = {"encoder": f"{self.path('teacher')}/model", "test": str(self.folders["test"]), "pool": "avg"}
        self.run("tuned", "adapt", "finetune", TUNING_STEPS, **TASK, **tuning)
        broken = Path(self.path("random_decoder"))
        if not broken.exists():
            trained = load_masked_model(self.path("teacher"))
            torch.manual_seed(0)
            save_bundle(trained.encoder, broken)
            save_parts(MaskedAutoencoder(trained.encoder, 128, 4, 4), broken)

    def students(self, seed: int) -> None:
        """Run all that one seed needs."""
        teacher = self.path("teacher")
        generic: dict[str, Any] = {"encoder": STUDENT, "seed": seed, "teacher": teacher, **SMALL}
        self.run(f"mae_{seed}", "pretrain", "mae", GENERIC_STEPS, encoder=STUDENT, seed=seed, **SMALL)
        self.run(f"generic_{seed}", "distill", "g2sd_generic", GENERIC_STEPS, **generic)
        self.run(f"masked_{seed}", "distill", "g2sd_generic", GENERIC_STEPS, **{**generic, "target": "masked"})
        broken = {**generic, "teacher": self.path("random_decoder")}
        self.run(f"random_{seed}", "distill", "g2sd_generic", GENERIC_STEPS, **broken)
        for name in ("mae", "generic", "masked", "random"):
            self.probe(f"{name}_{seed}")
        task: dict[str, Any] = {**TASK, "test": str(self.folders["test"]), "seed": seed}
        taught = {**task, "teacher": self.path("tuned")}
        student = f"{self.path(f'generic_{seed}')}/model"
        self.run(f"both_{seed}", "distill", "g2sd_specific", SPECIFIC_STEPS, **taught, encoder=student)
        self.run(f"specific_{seed}", "distill", "g2sd_specific", SPECIFIC_STEPS, **taught, encoder=STUDENT)
        alone = {**task, "encoder": STUDENT, "pool": "cls"}
        self.run(f"alone_{seed}", "adapt", "finetune", SPECIFIC_STEPS + GENERIC_STEPS, **alone)

    def probe(self, name: str) -> None:
        """Fit a linear classifier to the frozen features of a run's model."""
        settings = {"train": str(self.folders["probe"]), "test": str(self.folders["test"]), "pool": "avg"}
        model = f"{self.path(name)}/model"
        self.series.get(f"probe_{name}", lambda: pl.evaluate("linear", encoder=model, num_workers=0, **settings))

    def picture(self, seed: int) -> bytes:
        """Return what teacher and student of the first stage hold of eight test images, as a PNG."""
        out = Path(self.path(f"generic_{seed}"))
        config = config_from_mapping(G2SDGenericConfig, read_config(out / "config.yaml"))
        method = G2SDGenericMethod(config, open_source(config.data))
        checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
        method.on_load_checkpoint(checkpoint)
        method.load_state_dict(checkpoint["state_dict"])
        images = pixels(self.folders["test"])
        with torch.no_grad():
            rows = method.pictures(images[:: len(images) // 8][:8])
        return image_grid(rows).png

    def fall(self, seed: int) -> float:
        """Return the loss of the last tenth of the first stage over that of its first epoch."""
        rows = read_metrics(Path(self.path(f"generic_{seed}")) / "metrics.csv")
        losses = [(row.get("epoch", 0.0), row["loss"]) for row in rows if "loss" in row]
        first = [loss for epoch, loss in losses if epoch <= 1.0] or [losses[0][1]]
        last = [loss for _, loss in losses[-max(1, len(losses) // 10) :]]
        return statistics.mean(last) / statistics.mean(first)

    def table(self) -> str:
        """Return what was measured, and the claims with whether their checks hold; of seeds that are complete."""
        seeds = [seed for seed in SEEDS if self.series.known(f"alone_{seed}")]

        def scores(prefix: str) -> list[float]:
            return [100 * (self.series.known(f"{prefix}_{seed}") or {})["accuracy"] for seed in seeds]

        def beyond(one: str, other: str) -> list[float]:
            return [a - b for a, b in zip(scores(one), scores(other), strict=True)]

        named = {
            "first stage, then linear probe": "probe_generic",
            "the same, hidden patches only": "probe_masked",
            "the same, teacher with a random decoder": "probe_random",
            "MAE of the student, then linear probe": "probe_mae",
            "both stages": "both",
            "second stage from scratch": "specific",
            "student alone, labels only, as many steps as both stages": "alone",
        }
        rows = [[name, mean_and_deviation(scores(key), 1)] for name, key in named.items()]
        tuned = 100 * (self.series.known("tuned") or {})["accuracy"]
        rows.append(["the teacher, fine-tuned", f"{tuned:.1f}"])
        falls = [100 * self.fall(seed) for seed in seeds]
        checks: list[tuple[str, list[float], str, bool]] = []
        for claim, values, check, least in (
            ("1 the first stage against MAE, points", beyond("probe_generic", "probe_mae"), "≥ +0.5", 0.5),
            ("2 both stages against the second alone, points", beyond("both", "specific"), "> 0 (expected +3)", 1e-9),
            ("2 both stages against the student alone, points", beyond("both", "alone"), "> 0", 1e-9),
            ("3 all tokens against hidden ones, points", beyond("probe_generic", "probe_masked"), "≥ −1", -1.0),
            ("4 against a teacher with a random decoder, points", beyond("probe_generic", "probe_random"), "> 0", 1e-9),
        ):
            checks.append((claim, values, check, statistics.mean(values) >= least))
        lowest = ("4 loss at the end, % of the first epoch's", falls, "< 60", statistics.mean(falls) < 60)
        claims = [
            [claim, mean_and_deviation(values, 1), check, "yes" if holds else "**no**"]
            for claim, values, check, holds in [*checks, lowest]
        ]
        return (
            f"{machine()}\n\n{markdown_table([f'{len(seeds)} seeds', 'test accuracy, %'], rows)}\n\n"
            f"{markdown_table(['claim', 'measured', 'check', 'holds'], claims)}"
        )


def main() -> None:
    """Run what is missing, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/g2sd"))
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the lengths of all runs")
    parser.add_argument("--table", action="store_true", help="run nothing; take the seeds that are complete")
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/systems/{PAGE.name}")
    options = parser.parse_args()
    start = time.monotonic()
    folders = {
        "images": subset(options.data, options.out / "data" / "images", 1000, seed=0),
        "train": subset(options.data, options.out / "data" / "train", 200, seed=1),
        "probe": subset(options.data, options.out / "data" / "probe", 200, seed=2),
        "test": subset(options.test, options.out / "data" / "test", 150, seed=3),
    }
    claims = Claims(Series(options.out), folders, options.steps)
    if not options.table:
        claims.teacher()
        for seed in SEEDS:
            claims.students(seed)
    text = claims.table()
    print(f"{text}\n\n{time.monotonic() - start:.0f} s")
    if options.write:
        rewrite(PAGE, "claims", text)
        (PAGE.parents[1] / "pictures" / "g2sd.png").write_bytes(claims.picture(SEEDS[0]))


if __name__ == "__main__":
    main()
