"""The thorax recipe's small-scale claims on generated images with findings (arXiv 2210.12843).

    python -m benchmarks.claims.thorax_mae --out scratch/claims/thorax_mae

No chest X-rays can be shipped. The images are grey, 64 pixels, of smooth noise, each with any subset of five small
patterns, written in CheXpert's layout and read by its loader. Every run leaves its figures in `--out`, so an
interrupted series goes on where it stopped; `--write` puts the table into docs/systems/thorax_mae.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from timm.models import register_model
from torch import Tensor

import patchloom as pl
from benchmarks.claims.ccvit import Series
from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import EvalTransform, make_loader, open_source
from patchloom.data.medical import CHEXPERT
from patchloom.encoders import normalize
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.systems.mae.method import MAEMethod
from patchloom.training.config import config_from_mapping

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "thorax_mae.md"
ENCODER = "thorax_claims_patch8_64"
SEEDS = (0, 1, 2)
SIDE, TRAIN, FEW, TEST, STEPS = 64, 5000, 500, 1000, 500
ENGINE: dict[str, Any] = {"num_workers": 0, "probe_every": 0, "log_every": 20, "precision": "32-true"}
RECIPE: dict[str, Any] = {
    "encoder": ENCODER,
    "preset": "thorax",
    "batch_size": 64,
    "lr": 1e-3,
    "lr_base_batch": None,
    "max_steps": STEPS,
    "warmup_epochs": 1.0,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 4,
    **ENGINE,
}


@register_model
def thorax_claims_patch8_64(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder the claims were measured with: width 128, depth 6, four heads, patches of 8 pixels."""
    arguments = {"img_size": SIDE, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **arguments)


def image_with(findings: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return (64, 64) uint8: smooth noise with the patterns of the findings that are true, at random places."""
    picture = (
        110 + 220 * gaussian_filter(generator.normal(0, 1, (SIDE, SIDE)), 6) + generator.normal(0, 6, (SIDE, SIDE))
    )
    rows, columns = np.mgrid[-5:6, -5:6]
    distance = np.hypot(rows, columns)
    patterns = (
        36.0 * (distance < 4),  # disc
        36.0 * (np.abs(distance - 4) < 1),  # ring
        36.0 * (np.abs(rows - columns) < 2),  # line
        36.0 * ((np.abs(rows) < 1) | (np.abs(columns) < 1)),  # cross
        -36.0 * ((rows // 2 + columns // 2) % 2),  # chequers
    )
    for pattern in (p for p, there in zip(patterns, findings, strict=True) if there):
        top, left = generator.integers(0, SIDE - 11, 2)
        picture[top : top + 11, left : left + 11] += pattern
    return picture.clip(0, 255).astype(np.uint8)


def write_set(root: Path) -> Path:
    """Write the generated images in CheXpert's layout (once): train.csv, few.csv in `few`, valid.csv."""
    for folder, table, count, seed in (
        (root, "train", TRAIN, 0),
        (root / "few", "train", FEW, 1),
        (root, "valid", TEST, 2),
    ):
        path = folder / f"{table}.csv"
        if path.exists():
            continue
        generator, rows = np.random.default_rng(seed), []
        (folder / table).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            findings = generator.random(len(CHEXPERT)) < 0.5
            name = f"{table}/patient{number:05d}.png"
            Image.fromarray(image_with(findings, generator)).save(folder / name)
            labels = dict(zip(CHEXPERT, findings.astype(float), strict=True))
            rows.append({"Path": f"CheXpert-v1.0-small/{name}", "Frontal/Lateral": "Frontal", **labels})
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return root


def pretrain(series: Series, name: str, root: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Pre-train (once) and return the figures of the run; its model is in `runs/name`."""
    settings = {**RECIPE, "data": f"chexpert:{root}", "out": str(series.out / "runs" / name), "seed": seed, **changes}
    return series.get(name, lambda: pl.pretrain("mae", overwrite=True, **settings).summary)


@torch.no_grad()
def held_out_loss(series: Series, name: str, root: Path) -> float:
    """Claim 4: reconstruction error on centre crops of held-out images, with the same masks for every run."""

    def compute() -> dict[str, Any]:
        out = series.out / "runs" / name
        settings = {**RECIPE, "data": f"chexpert:{root}", "out": str(out)}
        config: Any = config_from_mapping(MAEMethod.config_class, settings)
        method = MAEMethod(config, open_source(config.data))
        method.load_state_dict(torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        model, generator = method.model.eval(), torch.Generator().manual_seed(0)
        source = open_source(f"chexpert:{root}:val")
        losses = []
        for batch in make_loader(source, EvalTransform(SIDE), 100, shuffle=False, num_workers=0):
            images = normalize(batch["image"].float() / 255, method.encoder)
            losses.append(float(model.loss(images, noise=torch.rand(len(images), 64, generator=generator))))
        return {"loss": statistics.mean(losses)}

    return float(series.get(f"held_out_{name}", compute)["loss"])


def finetune(series: Series, name: str, root: Path, encoder: str, seed: int, layer_decay: float) -> float:
    """Return the mean AUROC on the test images after 12 epochs on 500 labelled images."""
    settings: dict[str, Any] = {
        "preset": "thorax",
        "data": f"chexpert:{root / 'few'}",
        "test": f"chexpert:{root}:val",
        "encoder": encoder,
        "out": str(series.out / "runs" / f"finetune_{name}"),
        "epochs": 12,
        "batch_size": 50,
        "lr": 2e-3,
        "lr_base_batch": None,
        "warmup_epochs": 1.0,
        "layer_decay": layer_decay,
        "drop_path": 0.0,
        "crop_scale": (0.5, 1.0),
        "auto_augment": None,
        "color_jitter": 0.0,
        "seed": seed,
        **ENGINE,
    }
    return float(
        series.get(f"finetune_{name}", lambda: pl.adapt("finetune", overwrite=True, **settings).summary)["auroc"]
    )


def cost() -> dict[str, Any]:
    """Claim 3: seconds of a pre-training step with 90 % and with 75 % hidden, decoder of one block."""
    images = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    model = MaskedAutoencoder(encoder, 64, 1, 4, norm_pix_loss=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    calls = {f"{ratio}": lambda ratio=ratio: step(model.loss(images, ratio)) for ratio in (0.9, 0.75)}
    return {name: statistics.median(values) for name, values in alternate(calls, rounds=15, warmup=2).items()}


def table(series: Series) -> str:
    """Return the claims with what was measured and whether the check holds."""

    def scores(prefix: str, key: str, factor: float = 1.0) -> list[float]:
        return [factor * (series.known(f"{prefix}_{seed}") or {})[key] for seed in SEEDS]

    def points(values: list[float]) -> str:
        return f"{mean_and_deviation(values, 1)} points"

    tuned, scratch, flat = (scores(f"finetune_{kind}", "auroc", 100) for kind in ("mae", "scratch", "flat"))
    gain, decay = ([a - b for a, b in zip(tuned, other, strict=True)] for other in (scratch, flat))
    near, far = (scores(f"held_out_{kind}", "loss") for kind in ("near", "far"))
    lower = [100 * (1 - a / b) for a, b in zip(near, far, strict=True)]
    seconds = series.known("cost") or {}
    faster = seconds["0.75"] / seconds["0.9"]
    rows = [
        [
            f"1 pre-training in the domain beats scratch ({FEW} labelled images, 12 epochs, mean AUROC)",
            f"{mean_and_deviation(tuned, 1)} against {mean_and_deviation(scratch, 1)}: {points(gain)}",
            "≥ +2 points",
            statistics.mean(gain) >= 2,
        ],
        [
            "2 layer decay 0.55 against 1.0",
            f"{mean_and_deviation(tuned, 1)} against {mean_and_deviation(flat, 1)}: {points(decay)}",
            "not worse; +0.5 expected",
            statistics.mean(decay) >= 0,
        ],
        [
            "3 mask 90 % is faster than 75 % (ViT-Ti/16, decoder of one block, median of 15 steps)",
            f"{1000 * seconds['0.9']:.0f} ms against {1000 * seconds['0.75']:.0f} ms: {faster:.2f} ×",
            "≥ 1.3 ×",
            faster >= 1.3,
        ],
        [
            f"4 crops of 0.5–1.0 against 0.2–1.0: error on held-out centre crops ({STEPS} steps)",
            f"{mean_and_deviation(near, 3)} against {mean_and_deviation(far, 3)}: "
            f"{mean_and_deviation(lower, 1)} % lower",
            "≥ 3 % lower",
            statistics.mean(lower) >= 3,
        ],
    ]
    marked = [[*row[:3], "yes" if row[3] else "**no**"] for row in rows]
    return f"{machine()}\n\n" + markdown_table(["claim", "measured (3 seeds where ±)", "check", "holds"], marked)


def main() -> None:
    """Run what is missing, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/thorax_mae"))
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/thorax_mae.md")
    options = parser.parse_args()
    series, start = Series(options.out), time.monotonic()
    root = write_set(options.out / "data")
    series.get("cost", cost)
    for seed in SEEDS:
        for kind, scale in (("near", (0.5, 1.0)), ("far", (0.2, 1.0))):
            pretrain(series, f"{kind}_{seed}", root, seed, crop_scale=scale)
            held_out_loss(series, f"{kind}_{seed}", root)
        model = str(series.out / "runs" / f"near_{seed}" / "model")
        for kind, encoder, decay in (("mae", model, 0.55), ("flat", model, 1.0), ("scratch", ENCODER, 1.0)):
            finetune(series, f"{kind}_{seed}", root, encoder, seed, decay)
    text = table(series)
    print(f"{text}\n\n{time.monotonic() - start:.0f} s")
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
