"""ViT-P's claims on CamVid: points tell classes, balanced sampling and weak labels, fusion, and what masks allow.

    python -m benchmarks.claims.vit_p --camvid CAMVID_FOLDER --out scratch/claims/vit_p --write

CamVid's folder holds train, val and test of SegNet's split. Images are made smaller once; a small ViT learns from fresh
weights, a run for each way of sampling and labelling and each seed; masks are superpixels. The default takes 20 to 30
minutes of one core. `--side 240 --encoder RUN --steps 3000` is a larger setting. Figures are kept per run in `--out`,
so an interrupted series goes on where it stopped; `--write` puts the table into docs/systems/vit_p.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from benchmarks.claims.ccvit import SEEDS, Series
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data.pixels import resize, unit
from patchloom.data.segmentation import MaskSource, open_segmentation
from patchloom.encoders import create_encoder
from patchloom.models.bundle import save_bundle
from patchloom.segment.saved import load_segmenter
from patchloom.systems.vit_p.inference import fuse_mask_scores
from patchloom.systems.vit_p.measure import measure
from patchloom.systems.vit_p.sampling import PointSampler

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "systems" / "vit_p.md"
RUNS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "uniform": {"sampling": "uniform"},
    "boxes": {"labels": "boxes"},
}
POINTS = 200


def smaller(camvid: Path, split: str, side: int, out: Path, count: int | None = None) -> Path:
    """Write a split's images (the first `count`) and masks with a shorter side of so many pixels (once)."""
    if not out.exists():
        source = open_segmentation(f"camvid:{camvid}:{split}")
        temporary = out.with_name(f".{out.name}")
        for folder in ("images", "masks"):
            (temporary / folder).mkdir(parents=True, exist_ok=True)
        for index in range(len(source))[:count]:
            sample = source.read(index)
            image, mask = sample.image, torch.as_tensor(sample.named["mask"])
            size = (side, round(image.shape[-1] * side / image.shape[-2]))
            pixels = resize(image, size, "bilinear").permute(1, 2, 0).numpy()
            labels = F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0].numpy()
            name = f"{Path(sample.key).stem}.png"
            Image.fromarray(pixels).save(temporary / "images" / name)
            Image.fromarray(labels).save(temporary / "masks" / name)
        (temporary / "classes.txt").write_text("\n".join(source.class_names))
        temporary.rename(out)
    return out


def fresh(out: Path, side: int, seed: int) -> str:
    """Write an untrained small ViT (once) and return its bundle."""
    if not out.exists():
        torch.manual_seed(seed)
        small = {"patch_size": 8, "image_size": (side, 4 * side // 3), "embed_dim": 96, "depth": 4, "num_heads": 3}
        save_bundle(create_encoder("vit_tiny_patch16_224", **small), out)
    return str(out)


def learnt(
    series: Series, kind: str, seed: int, train: Path, test: Path, encoder: str, settings: Any
) -> dict[str, Any]:
    """Return the figures of a run: at points, of segmentations, and of these with the true class of each mask."""

    def compute() -> dict[str, Any]:
        out = series.out / "runs" / f"{kind}_{seed}"
        pl.segment("point", data=train, encoder=encoder, out=out, seed=seed, overwrite=True, **settings, **RUNS[kind])
        model, source = load_points_of(out), open_segmentation(str(test))
        figures = measure(model, source, seed)
        return figures | at_points(lambda image, points: model.point_logits(image, points), source, seed)

    return series.get(f"{kind}_{seed}", compute)


def load_points_of(run: Path) -> Any:
    """Return the point segmenter of a run."""
    return pl.load(run)


def linear(
    series: Series, seed: int, train: Path, test: Path, encoder: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what a linear classifier of patch tokens says at points, the encoder trained along for as long."""

    def compute() -> dict[str, Any]:
        out = series.out / "runs" / f"linear_{seed}"
        shared = ("max_steps", "epochs", "batch_size", "num_workers", "accelerator", "probe_every", "report", "lr")
        pl.segment(
            "linear",
            data=train,
            encoder=encoder,
            out=out,
            seed=seed,
            overwrite=True,
            train_encoder=True,
            image_size=settings["image_size"],
            colours=False,
            scale=(1.0, 1.5),
            max_share=1.0,
            **{name: settings[name] for name in shared},
        )
        model, source = load_segmenter(out), open_segmentation(str(test))

        def logits(image: Tensor, points: Tensor) -> Tensor:
            labels = model.segment(image)
            places = ((points + 1) / 2 * torch.tensor(labels.shape)).round().long()
            return F.one_hot(labels[places[:, 0], places[:, 1]].long(), len(model.class_names)).float()

        return at_points(logits, source, seed)

    return series.get(f"linear_{seed}", compute)


@torch.no_grad()
def at_points(logits: Any, source: MaskSource, seed: int) -> dict[str, Any]:
    """Return accuracy at random known pixels, its mean over classes, and the share of the most frequent class there."""
    count = len(source.class_names)
    table = torch.zeros(count, count)
    for index in range(len(source)):
        sample = source.read(index)
        generator = torch.Generator().manual_seed(seed * 10_000 + index)
        mask = torch.as_tensor(sample.named["mask"])
        points, classes = PointSampler(POINTS, class_balanced=False).from_mask(mask, generator)
        said = logits(unit(sample.image), points).argmax(1)
        table += F.one_hot(classes * count + said, count * count).sum(0).reshape(count, count)
    by_class = table.diag() / table.sum(1)
    return {
        "accuracy_at_points": float(table.diag().sum() / table.sum()),
        "class_accuracy_at_points": float(by_class.nanmean()),
        "majority_at_points": float(table.sum(1).max() / table.sum()),
    }


def fusion(seed: int, count: int = 4000, classes: int = 10) -> dict[str, float]:
    """Return the accuracy of two experts, one good at either half of the classes, fused with several weights."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (count,), generator=generator)
    first_half = truth < classes // 2

    def expert(good: Tensor) -> Tensor:
        strength = torch.where(good, 3.0, 1.0)[:, None]
        return F.one_hot(truth, classes) * strength + torch.randn(count, classes, generator=generator)

    query = F.pad(expert(first_half), (0, 1), value=-5.0)
    point = expert(~first_half)
    return {
        f"{alpha:g}": float((fuse_mask_scores(query, point, alpha)[:, :-1].argmax(1) == truth).float().mean())
        for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    }


def points_of(values: list[float]) -> str:
    """Return shares as percent."""
    return mean_and_deviation([100 * value for value in values], 1)


def row(claim: str, found: str, check: str, holds: bool) -> list[str]:
    """Return a row of the table."""
    return [claim, found, check, "yes" if holds else "**no**"]


def table(series: Series, seeds: tuple[int, ...]) -> str:
    """Return the claims with what was measured."""

    def of(kind: str, name: str) -> list[float]:
        return [float(series.get(f"{kind}_{seed}", dict)[name]) for seed in seeds]

    def gap(a: list[float], b: list[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    oracle, said = of("balanced", "oracle_miou"), of("balanced", "miou")
    accuracy, majority = of("uniform", "accuracy_at_points"), of("uniform", "majority_at_points")
    patch = of("linear", "accuracy_at_points")
    balanced, uniform = (of(kind, "class_accuracy_at_points") for kind in ("balanced", "uniform"))
    full, boxes = (of(kind, "accuracy_at_points") for kind in ("balanced", "boxes"))
    fused = [fusion(seed) for seed in seeds]
    best = [max(one[alpha] for alpha in ("0.2", "0.4", "0.6", "0.8")) for one in fused]
    ends = [sorted((one["0"], one["1"])) for one in fused]
    share = [100 * b / f for b, f in zip(boxes, full, strict=True)]
    rows = [
        row(
            "true classes of the same masks: what classifying them better could give",
            f"mIoU {points_of(oracle)} against {points_of(said)}",
            "≥ +10 points",
            min(gap(oracle, said)) >= 0.10,
        ),
        row(
            "points are told apart, against the most frequent class",
            f"{points_of(accuracy)} against {points_of(majority)}",
            "≥ +15 points",
            float(np.mean(gap(accuracy, majority))) >= 0.15,
        ),
        row(
            "points, against a linear classifier of the patch under them",
            f"{points_of(accuracy)} against {points_of(patch)}",
            "≥ −2 points",
            float(np.mean(gap(accuracy, patch))) >= -0.02,
        ),
        row(
            "balanced sampling, mean accuracy of classes, against uniform",
            f"{points_of(balanced)} against {points_of(uniform)}",
            "≥ +2 points",
            float(np.mean(gap(balanced, uniform))) >= 0.02,
        ),
        row(
            "boxes of parts, against full masks, at points",
            f"{points_of(boxes)} against {points_of(full)}: {mean_and_deviation(share, 0)} % of it",
            "≥ 70 %",
            float(np.mean(share)) >= 70,
        ),
        row(
            "two experts fused (generated), the best α between 0 and 1",
            f"{points_of(best)} against {points_of([end[1] for end in ends])} and {points_of([e[0] for e in ends])}",
            "≥ better −0.5, ≥ worse +1",
            all(b >= end[1] - 0.005 and b >= end[0] + 0.01 for b, end in zip(best, ends, strict=True)),
        ),
    ]
    header = ["claim", f"% ({len(seeds)} seeds)", "check", "holds"]
    return f"{machine()}\n\n{markdown_table(header, rows)}"


def main() -> None:
    """Run the series, then write its table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", help="bundle or run to start from; default: a small ViT with fresh weights")
    parser.add_argument("--side", type=int, default=72, help="shorter side of the images, a multiple of 24")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    series, side, seeds = Series(arguments.out), arguments.side, tuple(SEEDS[: arguments.seeds])
    train, test = (
        smaller(arguments.camvid, split, side, arguments.out / f"{split}_{side}") for split in ("train", "val")
    )
    settings: dict[str, Any] = {
        "image_size": (side, 4 * side // 3),
        "batch_size": 8,
        "max_steps": arguments.steps,
        "epochs": 1000,
        "warmup_epochs": 1.0,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "num_points": 60,
        "rotate": 0.0,
        "num_workers": 0,
        "accelerator": "cpu",
        "probe_every": 0,
        "report": False,
    }
    for seed in seeds:
        encoder = arguments.encoder or fresh(arguments.out / f"fresh_{seed}", side, seed)
        for kind in RUNS:
            found = learnt(series, kind, seed, train, test, encoder, settings)
            print(seed, kind, {name: round(found[name], 3) for name in found if "at_points" in name or "miou" in name})
        print(seed, "linear", linear(series, seed, train, test, encoder, settings), flush=True)
    text = table(series, seeds)
    print(text)
    if arguments.write:
        how = (
            f"`python -m benchmarks.claims.vit_p --camvid camvid --out scratch/claims/vit_p --write`: images of {side} "
            f"pixels, {arguments.encoder or 'a ViT of 0.5 M parameters with fresh weights'}, {arguments.steps} steps "
            f"of 8 images, `point_start patch`, superpixels; CamVid's validation images."
        )
        rewrite(PAGE, "claims", f"{how} {text}")


if __name__ == "__main__":
    main()
