"""What the claims about adapters share: an encoder that knows five classes of CIFAR-10, and the other five to learn.

The encoder is a small timm ViT (width 64, depth 4, patches of 4 pixels) trained from scratch by `patchloom adapt
finetune` on the first five classes. Every run leaves its figures, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import patchloom as pl
from benchmarks.claims.ccvit import Series, subset
from patchloom.encoders import create_encoder
from patchloom.models.adapters import encoder_hash
from patchloom.models.bundle import load, save_bundle

KNOWN = ("airplane", "automobile", "bird", "cat", "deer")
SEEDS = (0, 1, 2)
LABELS = 500  # images of each new class
ENGINE = {"num_workers": 0, "probe_every": 0, "log_every": 20, "precision": "32-true", "accelerator": "cpu"}
PRETRAIN = {"epochs": 6, "batch_size": 64, "lr": 1e-3, "lr_base_batch": None, "warmup_epochs": 1, "layer_decay": 1.0}
GENTLE = {"auto_augment": None, "color_jitter": 0.2, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}
CROP = {"crop_scale": (0.5, 1.0)}
# What each method trains with; learning rates were chosen on held-out training images of a
# small pilot (seed 100), which are among those the claims train on.
RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {**GENTLE, "lr": 5e-4, "lr_base_batch": None, "layer_decay": 0.8, "init_scale": 1.0, "pool": "cls"},
    "linear": {"lr": 1.0},
    "vpt": {"lr": 2.0},
    "adaptformer": {"lr": 2.0},
    "dvpt": {"lr": 3e-2},
}


def classes(folder: Path, out: Path, known: bool) -> Path:
    """Copy the classes the encoder knows, or the others, to `out` (once) and return it."""
    if not out.exists():
        for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
            if (class_folder.name in KNOWN) == known:
                shutil.copytree(class_folder, out / class_folder.name)
    return out


def data(series: Series, train: Path, test: Path) -> dict[str, Path]:
    """Return the folders: what the encoder is trained on, what adapters learn from, what they are measured on."""
    made = series.out / "data"
    small = subset(train, made / "transfer_train", 2400, seed=11)
    other = subset(test, made / "transfer_test", 300, seed=12)
    return {
        "known": classes(small, made / "known", True),
        "new": subset(classes(small, made / "new_all", False), made / f"new_{LABELS}", LABELS, seed=13),
        "test": classes(other, made / "new_test", False),
    }


def pretrained(series: Series, folders: dict[str, Path]) -> Path:
    """Return the bundle of the encoder, training it once."""
    bundle, run = series.out / "transfer_encoder", series.out / "transfer_pretraining"
    if not bundle.exists():
        torch.manual_seed(0)
        size = {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
        start = series.out / "transfer_fresh"
        save_bundle(create_encoder("vit_tiny_patch16_224", **size), start, overwrite=True)
        made = pl.adapt(
            "finetune",
            data=str(folders["known"]),
            encoder=str(start),
            out=str(run),
            pool="cls",
            init_scale=1.0,
            resume=True,
            **ENGINE,
            **GENTLE,
            **CROP,
            **PRETRAIN,
        )
        encoder = load(made.model)
        encoder.reset_classifier(0)
        save_bundle(encoder, bundle)
        series.get("transfer_pretraining_figures", lambda: made.summary)
    return bundle


def adapted(
    series: Series, name: str, method: str, bundle: Path, folders: dict[str, Path], seed: int, **settings: Any
) -> dict[str, Any]:
    """Return the figures of one run of a method on the new classes, run once."""

    def compute() -> dict[str, Any]:
        out = series.out / f"run_{name}"
        recipe = {"epochs": 10, "batch_size": 32, **ENGINE, **CROP, **RECIPES.get(method, {}), **settings}
        run = pl.adapt(
            method,
            data=str(folders["new"]),
            test=str(folders["test"]),
            encoder=str(bundle),
            out=str(out),
            seed=seed,
            overwrite=out.exists(),
            **recipe,
        )
        keep = ("accuracy", "balanced_accuracy", "trained_parameters", "parameters", "head_parameters", "seconds")
        figures = {key: run.summary[key] for key in keep if key in run.summary}
        figures["encoder"] = encoder_hash(load(bundle))
        shutil.rmtree(out)
        return figures

    return series.get(name, compute)
