"""EAR's claims on photographs of surfaces with defects drawn in (arXiv 2310.04010).

    python -m benchmarks.claims.ear --out scratch/claims/ear [--write]   # for a GPU
    python -m benchmarks.claims.ear … --surfaces brick --steps 200 --width 8 --batch_size 4 [--write]   # for a core

Surfaces are brick, grass and gravel as they ship with scikit-image, in crops of 128 pixels; defects are scratches,
stains and patches of another surface. For each seed and surface the same network is trained four times: with a mosaic
in what is excised, with nothing in it, without excision, and under random masks. Every run leaves its figures in
`--out`, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage import data

import patchloom as pl
from benchmarks.claims.ccvit import Series
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data.defects import open_tested
from patchloom.evaluate.anomaly.measure import score_images
from patchloom.evaluate.anomaly.random_masks import RandomMasks
from patchloom.systems.ear.data import good_views
from patchloom.systems.ear.losses import squared_error
from patchloom.systems.ear.saved import load_ear

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "ear.md"
SEEDS = (0, 1, 2)
SURFACES = {"brick": data.brick, "grass": data.grass, "gravel": data.gravel}
SIDE, TRAIN, TEST = 128, 120, 24
WAYS: dict[str, dict[str, Any]] = {
    "mosaic": {"hint": "mosaic", "mosaic_scale": 8},
    "empty": {"hint": "empty"},
    "no excision": {"masking": "none"},
    "random masks": {"masking": "random"},
}


def surface(name: str, root: Path) -> Path:
    """Write good and defect crops of a surface (once), those to test on from its last third, and return the folder."""
    folder = root / name
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    picture = np.asarray(SURFACES[name]())
    other = np.asarray(SURFACES[next(each for each in SURFACES if each != name)]())
    edge = 2 * picture.shape[1] // 3

    def crop(held_out: bool) -> Image.Image:
        part = picture[:, edge - SIDE // 2 :] if held_out else picture[:, : edge + SIDE // 2]
        top, left = (int(rng.integers(0, side - SIDE + 1)) for side in part.shape)
        return Image.fromarray(part[top : top + SIDE, left : left + SIDE])

    for split, count in (("train/good", TRAIN), ("test/good", TEST)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            crop(split != "train/good").save(folder / split / f"{number:03}.png")
    for kind in ("scratch", "stain", "patch"):
        (folder / "test" / kind).mkdir(parents=True)
        (folder / "ground_truth" / kind).mkdir(parents=True)
        for number in range(TEST // 3):
            image, mask = with_defect(crop(True), kind, other, rng)
            image.save(folder / "test" / kind / f"{number:03}.png")
            mask.save(folder / "ground_truth" / kind / f"{number:03}_mask.png")
    return folder


def with_defect(
    image: Image.Image, kind: str, other: np.ndarray, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Return an image with a defect drawn in, and its mask."""
    mask = Image.new("L", image.size)
    x, y = (int(value) for value in rng.integers(24, SIDE - 24, 2))
    if kind == "scratch":
        ends = [x, y, x + int(rng.integers(-40, 41)), y + int(rng.integers(-40, 41))]
        ImageDraw.Draw(mask).line(ends, fill=255, width=int(rng.integers(2, 5)))
        ink = Image.new("L", image.size, int(rng.integers(200, 256)))
    else:
        radius = int(rng.integers(6, 14))
        ImageDraw.Draw(mask).ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
        if kind == "stain":
            ink = Image.fromarray((np.asarray(image) * 0.4).astype(np.uint8))
        else:
            ink = Image.fromarray(other[:SIDE, :SIDE])
    return Image.composite(ink, image, mask), mask


def train(series: Series, name: str, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way, and return its figures on the test images."""
    folder = surface(name, series.out / "surfaces")
    masked = WAYS[way].get("masking", "saliency") == "saliency"
    run = pl.anomaly(
        "ear",
        data=str(folder),
        encoder=options.encoder if masked else "none",
        out=str(series.out / "runs" / f"{name}_{way.replace(' ', '_')}_{seed}"),
        image_size=SIDE,
        width=options.width,
        batch_size=options.batch_size,
        max_steps=options.steps,
        num_workers=1,
        seed=seed,
        report=False,
        overwrite=True,
        **WAYS[way],
    )
    saved = load_ear(run.path)
    good = [
        view for view, _, label in good_views(open_tested(str(folder / "test")), (SIDE, SIDE), 1, 0) if label == [0]
    ]
    with torch.no_grad():
        errors = [float(squared_error(view, saved.model(view)["recovered"])) for view in good]
    found = {name: run.summary[name] for name in ("image_auroc", "pixel_auroc", "aupro")}
    found["l2_good"] = float(np.mean(errors))
    if way == "random masks":
        test = open_tested(str(folder / "test"))
        scored = score_images(RandomMasks(saved.model.unet), test, (SIDE, SIDE))
        labels, scores = np.array(scored.labels), np.array(scored.scores)
        pairs = scores[labels == 1][:, None] - scores[labels == 0]
        found["image_auroc"] = float((pairs > 0).mean() + (pairs == 0).mean() / 2)
        again = [
            [float(RandomMasks(saved.model.unet, seed=None)(view)["pred_score"]) for view in good[:4]] for _ in range(5)
        ]
        found["deviation"] = float(np.std(again, axis=0).mean())
    if way == "mosaic":
        twice = [[float(saved.model(view)["pred_score"]) for view in good[:4]] for _ in range(2)]
        found["deviation"] = float(np.std(twice, axis=0).max())
        found |= latency(saved.model, saved.model.unet, good[0])
    return found


@torch.no_grad()
def latency(model: torch.nn.Module, network: torch.nn.Module, view: torch.Tensor) -> dict[str, float]:
    """Return milliseconds of scoring an image with the one mask and with twelve, in turn, the median of nine."""
    many = RandomMasks(network).eval()
    times: dict[str, list[float]] = {"one": [], "twelve": []}
    for _ in range(10):
        for name, detector in (("one", model), ("twelve", many)):
            begun = time.perf_counter()
            detector(view)
            times[name].append(time.perf_counter() - begun)
    return {f"ms_{name}": 1000 * float(np.median(values[1:])) for name, values in times.items()}


def tables(series: Series, options: argparse.Namespace) -> str:
    """Return the claims with whether they hold, and the figures of every way."""

    seeds, surfaces = options.seeds, options.surfaces

    def over(way: str, key: str) -> list[float]:
        """Return a figure of every seed, the mean over surfaces."""
        found = [[series.known(f"{name}_{way}_{seed}") for name in surfaces] for seed in seeds]
        return [float(np.mean([each[key] for each in row if each])) for row in found if all(row)]

    def less(first: list[float], second: list[float]) -> list[float]:
        return [100 * (a - b) for a, b in zip(first, second, strict=True)]

    auroc = {way: over(way, "image_auroc") for way in WAYS}
    hint, excision = less(auroc["mosaic"], auroc["empty"]), less(auroc["mosaic"], auroc["no excision"])
    saved = [100 * (1 - a / b) for a, b in zip(over("mosaic", "l2_good"), over("empty", "l2_good"), strict=True)]
    ratio = [a / b for a, b in zip(over("mosaic", "ms_one"), over("mosaic", "ms_twelve"), strict=True)]
    fixed, drawn = over("mosaic", "deviation"), over("random masks", "deviation")
    rows = [
        ("1 image AUROC, mosaic over empty", "≥ 1 point", mean_and_deviation(hint, 1), np.mean(hint) >= 1),
        (
            "1 error on good images, lower with a mosaic by",
            "≥ 20 %",
            f"{mean_and_deviation(saved, 1)} %",
            np.mean(saved) >= 20,
        ),
        ("2 image AUROC, over no excision", "≥ 5 points", mean_and_deviation(excision, 1), np.mean(excision) >= 5),
        (
            "3 deviation of scores of one image, twice and under random masks",
            "0, and > 0",
            f"{max(fixed):.1g} and {np.mean(drawn):.2g}",
            max(fixed) == 0 < min(drawn),
        ),
        ("4 time of one mask, of twelve passes", "≤ 1/5", mean_and_deviation(ratio, 3), np.mean(ratio) <= 0.2),
    ]
    claims = [[name, check, told, "yes" if holds else "**no**"] for name, check, told, holds in rows]
    figures = [
        [
            way,
            *(
                mean_and_deviation([100 * x for x in over(way, key)], 1)
                for key in ("image_auroc", "pixel_auroc", "aupro")
            ),
        ]
        for way in WAYS
    ]
    parts = [machine(), markdown_table(["claim", "check", "measured", "holds"], claims)]
    header = ["way", "image AUROC, %", "pixel AUROC, %", "AUPRO, %"]
    steps = f"{options.steps} steps of {options.batch_size} images, width {options.width}"
    of = f"{len(seeds)} seeds, {', '.join(surfaces)}; {steps}"
    return "\n\n".join([*parts, f"{of}:", markdown_table(header, figures)])


def main() -> None:
    """Run what was not run yet, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/ear"))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--surfaces", nargs="*", choices=list(SURFACES), default=list(SURFACES))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--encoder", default="none", help="what sees what stands out: a bundle, or edges (none)")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/ear.md")
    options = parser.parse_args()
    series = Series(options.out)
    for seed in options.seeds:
        for name in options.surfaces:
            for way in WAYS:
                call = partial(train, series, name, way, seed, options)
                series.get(f"{name}_{way}_{seed}", call)
    text = tables(series, options)
    print(text)
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
