"""The pictures of docs/slides.md: two cohorts of small slides made of real photographs, cut, embedded and learnt from.

    python -m benchmarks.slides --out runs/slides

Every slide is glass with a piece of stained tissue; in positive ones a few spots of it are another texture, a retina.
The encoder has fresh weights: it knows colours and edges, no more.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from skimage import data

import patchloom as pl
from patchloom.evaluate.slides.bags import read_cohort
from patchloom.evaluate.slides.embed import embed_tiles
from patchloom.evaluate.slides.figures import side_by_side
from patchloom.evaluate.slides.protocol import Answers
from patchloom.evaluate.slides.result_page import heat_map_sections
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.validate import MILEnsemble
from patchloom.report.page import Figure

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH, HEIGHT, TILE, MPP = 1280, 960, 64, 0.5
GLASS, TINT = 238, np.array([1.0, 0.84, 0.92])


def main() -> None:
    """Make the cohorts, run the commands on them and write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for slides, features and the report")
    out = parser.parse_args().out
    for name, slides, seed in (("home", 30, 0), ("away", 16, 1)):
        make_cohort(out / name, slides, seed)
        embed_tiles(
            "ccvit_tiny_patch8_64",
            str(out / name),
            str(out / f"features-{name}"),
            untrained=True,
            pool="avg",
            image_size=32,
            tile_size=TILE,
            tissue_threshold=0.08,
        )
    figures = pl.evaluate(
        "slides",
        train=str(out / "features-home"),
        train_labels=str(out / "home.csv"),
        test=str(out / "features-away"),
        test_labels=str(out / "away.csv"),
        head="chowder",
        head_args={"n_top": 3, "n_bottom": 3},
        lr=[1e-3],
        weight_decay=[0.0],
        repeats=1,
        out=str(out / "report"),
    )
    print({name: figures[name] for name in ("score", "interval", "one_model")})
    write_pictures(out)


def make_cohort(folder: Path, slides: int, seed: int) -> None:
    """Write slides as pyramidal TIFFs, and their labels beside the folder; every second slide is positive."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tissue, spot = data.immunohistochemistry(), data.retina()[350:1050, 350:1050]
    rows = []
    for number in range(slides):
        pixels = np.clip(GLASS + generator.integers(-3, 4, (HEIGHT, WIDTH, 1)), 0, 255).repeat(3, 2)
        inside = outline(generator)
        pixels[inside] = (mosaic(tissue, 128, generator) * TINT)[inside]
        if number % 2:
            for _ in range(3):
                top, left = (
                    int(generator.integers(side // 4, side * 3 // 4)) // TILE * TILE for side in (HEIGHT, WIDTH)
                )
                place, where = generator.integers(0, 700 - TILE, 2), np.s_[top : top + TILE, left : left + TILE]
                piece = spot[place[0] : place[0] + TILE, place[1] : place[1] + TILE]
                pixels[where] = np.where(inside[where][..., None], piece, pixels[where])
        name = f"{folder.name}-{number:02d}"
        write_pyramid(folder / f"{name}.tif", pixels.astype(np.uint8))
        rows.append([name, ("negative", "positive")[number % 2]])
    with (folder.parent / f"{folder.name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide", "label"], *rows])


def outline(generator: np.random.Generator) -> np.ndarray:
    """Return where a piece of tissue lies, (HEIGHT, WIDTH) bool."""
    down, across = np.mgrid[:HEIGHT, :WIDTH] - np.array([HEIGHT, WIDTH]).reshape(2, 1, 1) / 2
    angle = np.arctan2(down, across)
    radius = np.hypot(down / (0.4 * HEIGHT), across / (0.4 * WIDTH))
    waves = sum(0.08 * np.sin(count * angle + generator.uniform(0, 2 * np.pi)) for count in (2, 3, 5))
    inside: np.ndarray = radius < 1 + waves
    return inside


def mosaic(photo: np.ndarray, side: int, generator: np.random.Generator) -> np.ndarray:
    """Return pieces of a photograph side by side, (HEIGHT, WIDTH, 3)."""
    canvas = np.zeros((HEIGHT + side, WIDTH + side, 3))
    for top in range(0, HEIGHT, side):
        for left in range(0, WIDTH, side):
            i, j = generator.integers(0, np.array(photo.shape[:2]) - side)
            canvas[top : top + side, left : left + side] = photo[i : i + side, j : j + side]
    return canvas[:HEIGHT, :WIDTH]


def write_pyramid(path: Path, pixels: np.ndarray) -> None:
    """Write a tiled TIFF with two smaller levels that says its scale."""
    with tifffile.TiffWriter(path) as file:
        for level in range(3):
            per_centimetre = 1e4 / (MPP * 2**level)
            file.write(
                np.ascontiguousarray(pixels[:: 2**level, :: 2**level]),
                tile=(256, 256),
                photometric="rgb",
                compression="deflate",
                metadata=None,
                subfiletype=1 if level else 0,
                resolution=(per_centimetre, per_centimetre),
                resolutionunit="CENTIMETER",
            )


def write_pictures(out: Path) -> None:
    """Write an overview of a slide, and where the models look on the slide with the highest score."""
    store = TileStore(out / "features-away")
    ensemble = MILEnsemble.load(out / "report" / "ensemble")
    cohort = read_cohort(store.path, out / "away.csv")
    answers = Answers(cohort, ensemble.predict(cohort.bags))
    best = cohort.names[int(np.argmax(answers.scores))]
    overview = store.path / best / "overview.png"
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "slide_tiles.png").write_bytes(overview.read_bytes())
    heat, tiles = heat_map_sections(ensemble, answers, store)[0].figures[:2]
    slide = Figure((store.path / best / "thumbnail.png").read_bytes(), "the slide")
    both = side_by_side([heat, slide], "A slide and where the models look on it")
    (PICTURES / "slide_attention.png").write_bytes(below(both, tiles))


def below(first: Figure, second: Figure) -> bytes:
    """Return two pictures one below the other, as a PNG."""
    images = [Image.open(io.BytesIO(figure.png)).convert("RGBA") for figure in (first, second)]
    canvas = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images) + 12), "white")
    canvas.paste(images[0], (0, 0), images[0])
    canvas.paste(images[1], (0, images[0].height + 12), images[1])
    buffer = io.BytesIO()
    canvas.quantize(160).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
