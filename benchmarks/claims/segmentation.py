"""Segmentation claims on CamVid: does pre-training help a frozen encoder, and does the decoder matter?

    python -m benchmarks.claims.segmentation --camvid CAMVID_FOLDER --out scratch/claims/segmentation --write

CamVid's folder holds train, val and test of SegNet's split. A CCViT encoder is pre-trained on 32-pixel tiles of the
training images alone (made smaller to 96 pixels), without labels; decoders are then trained on it, frozen, and on the
same architecture with fresh weights. Figures are kept per run in `--out`, so an interrupted series goes on where it
stopped; `--write` puts the tables into docs/systems/segmentation_heads.md, `--picture` draws docs/pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchvision.io import write_png

import patchloom as pl
from benchmarks.claims.ccvit import ENCODER, SEEDS, Series
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.data.pixels import resize

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "systems" / "segmentation_heads.md"
SHORT_SIDE, TILE = 96, 32
PRETRAIN: dict[str, Any] = {
    "encoder": ENCODER,
    "batch_size": 64,
    "lr": 1.5e-3,
    "max_steps": 250,
    "epochs": 6,
    "early_layers": 4,
    "head_layers": 1,
    "k": 512,
    "codebook_images": 3000,
    "mask_ratio": 25 / 64,
    "replace_ratio": 6 / 64,
    "num_workers": 1,
    "probe_every": 0,
    "precision": "32-true",
}
PROBE: dict[str, Any] = {
    "augment": False,
    "short_side": SHORT_SIDE,
    "stride": (TILE, TILE),
    "steps": 400,
    "batch_size": 16,
    "lr": 2e-3,
    "warmup": 40,
    "num_workers": 1,
}
DECODERS = {"linear": "linear", "bn": "BatchNorm-linear", "multilayer": "four blocks", "unet": "U-Net-like"}
COMPARED = ("bn",)


def tiles(camvid: Path, out: Path) -> Path:
    """Cut the training images, made smaller, into tiles (once) and return their folder."""
    if not out.exists():
        images = open_source(str(camvid / "train" / "images"), labels="none")
        temporary = out.with_name(f".{out.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        for index in range(len(images)):
            image = images.read(index).image
            height, width = image.shape[-2:]
            small = resize(image, (SHORT_SIDE, round(width * SHORT_SIDE / height)), "bilinear")
            for top in range(0, small.shape[1] - TILE + 1, TILE):
                for left in range(0, small.shape[2] - TILE + 1, TILE):
                    tile = small[:, top : top + TILE, left : left + TILE].contiguous()
                    write_png(tile, str(temporary / f"{index:03d}-{top}-{left}.png"))
        temporary.rename(out)
    return out


def pretrained(series: Series, folder: Path, seed: int) -> str:
    """Pre-train an encoder (once) and return its bundle."""
    out = series.out / "runs" / f"ccvit_{seed}"

    def compute() -> dict[str, Any]:
        return pl.pretrain("ccvit", data=str(folder), out=str(out), seed=seed, overwrite=True, **PRETRAIN).summary

    series.get(f"pretrain_{seed}", compute)
    return str(out / "model")


def probe(series: Series, camvid: Path, encoder: str, head: str, seed: int, untrained: bool) -> dict[str, Any]:
    """Return the figures of a decoder on a frozen encoder."""

    def compute() -> dict[str, Any]:
        return pl.evaluate(
            "segmentation",
            encoder=encoder,
            train=f"camvid:{camvid}:train",
            test=f"camvid:{camvid}:test",
            head=head,
            seed=seed,
            untrained=untrained,
            **PROBE,
        )

    return series.get(f"{head}_{'untrained' if untrained else 'trained'}_{seed}", compute)


def percent(runs: list[dict[str, Any]], name: str = "miou") -> list[float]:
    """Return a figure of each run in percent."""
    return [100 * run[name] for run in runs]


def claims_table(series: Series) -> str:
    """Return the claims with what was measured."""

    def runs(head: str, kind: str) -> list[dict[str, Any]]:
        found = [series.known(f"{head}_{kind}_{seed}") for seed in SEEDS]
        return [run for run in found if run is not None]

    rows: list[list[str]] = []
    for head in COMPARED:
        trained, fresh = percent(runs(head, "trained")), percent(runs(head, "untrained"))
        gain = [a - b for a, b in zip(trained, fresh, strict=True)]
        rows.append(
            [
                f"a pre-trained encoder beats an untrained one ({DECODERS[head]} decoder)",
                f"{mean_and_deviation(trained, 1)} against {mean_and_deviation(fresh, 1)}: "
                f"{mean_and_deviation(gain, 1)} points",
                "above 0 with every seed",
                "yes" if len(gain) == len(SEEDS) and min(gain) > 0 else "**no**",
            ]
        )
    unet, linear = percent(runs("unet", "trained")), percent(runs("linear", "trained"))
    gain = [a - b for a, b in zip(unet, linear, strict=True)]
    rows.append(
        [
            "the U-Net-like decoder beats the linear one",
            f"{mean_and_deviation(unet, 1)} against {mean_and_deviation(linear, 1)}: "
            f"{mean_and_deviation(gain, 1)} points",
            "≥ +3 points",
            "yes" if sum(gain) / len(gain) >= 3 else "**no**",
        ]
    )
    table = markdown_table(["claim", f"mIoU on CamVid's test images, % ({len(SEEDS)} seeds)", "check", "holds"], rows)
    heads = []
    for head, words in DECODERS.items():
        found = runs(head, "trained")
        low, high = (100 * end for end in found[0]["interval"])
        heads.append(
            [
                words,
                f"{found[0]['decoder_parameters']:,}",
                mean_and_deviation(percent(found), 1),
                f"{low:.1f} – {high:.1f}",
                mean_and_deviation(percent(found, "pixel_accuracy"), 1),
                mean_and_deviation([run["seconds_training"] for run in found], 0),
            ]
        )
    header = ["decoder", "parameters", "mIoU, %", "95 % interval over images (seed 0)", "pixel accuracy, %", "seconds"]
    return f"{machine()}\n\n{table}\n\n{markdown_table(header, heads)}"


def draw(series: Series, camvid: Path, encoder: str) -> None:
    """Draw test images with truth and prediction for the docs."""
    picture = DOCS / "pictures" / "segmentation.png"
    picture.unlink(missing_ok=True)
    pl.evaluate(
        "segmentation",
        encoder=encoder,
        train=f"camvid:{camvid}:train",
        test=f"camvid:{camvid}:test",
        head="unet",
        picture=str(picture),
        **PROBE,
    )


def main() -> None:
    """Run the series, then write its tables if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", action="store_true")
    arguments = parser.parse_args()
    series = Series(arguments.out)
    folder = tiles(arguments.camvid, arguments.out / "tiles")
    encoders = {}
    for seed in SEEDS:
        encoders[seed] = pretrained(series, folder, seed)
        for head in DECODERS:
            for untrained in (False, True) if head in COMPARED else (False,):
                figures = probe(series, arguments.camvid, encoders[seed], head, seed, untrained)
                print(seed, head, "untrained" if untrained else "trained", f"{figures['miou']:.4f}", flush=True)
    if arguments.picture:
        draw(series, arguments.camvid, encoders[SEEDS[0]])
    table = claims_table(series)
    print(table)
    if arguments.write:
        rewrite(PAGE, "claims", table)


if __name__ == "__main__":
    main()
