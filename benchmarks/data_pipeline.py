"""Images per second from a folder of 500-pixel JPEGs to crops of 224 pixels, against torchvision with Pillow.

    python -m benchmarks.data_pipeline

Both sides read the same files with two workers, flip, draw a random-resized crop and hand over uint8 batches. With
one view the crop is resized once; with two, the same box also gives a second view of 112 pixels.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.data.folder import FolderSource
from patchloom.data.loader import make_loader
from patchloom.data.transforms import PairedViews

SIZE, SECOND_SIZE, BATCH = 224, 112, 64
TARGET = 1.3


class PillowViews:
    """The same views from torchvision's transforms on Pillow images."""

    def __init__(self, second_size: int | None) -> None:
        self.second_size = second_size

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        if random.random() < 0.5:
            image = F.hflip(image)
        box = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        crop = F.crop(image, *box)
        sizes = (SIZE,) if self.second_size is None else (SIZE, self.second_size)
        return tuple(F.pil_to_tensor(F.resize(crop, [size, size], InterpolationMode.BICUBIC)) for size in sizes)


def write_photographs(folder: Path, count: int) -> None:
    """Write `count` JPEGs of 500 × 375 pixels, cut at random from scikit-image's photographs, in two classes."""
    from skimage import data

    photographs = [Image.fromarray(load()) for load in (data.astronaut, data.chelsea, data.coffee, data.rocket)]
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        share = rng.uniform(0.6, 1.0)
        height = round(share * min(photograph.height, photograph.width * 3 / 4))
        width = round(height * 4 / 3)
        left, top = rng.integers(photograph.width - width + 1), rng.integers(photograph.height - height + 1)
        cut = photograph.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        path = folder / f"class{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.save(path, quality=90)


def ours(folder: Path, second_size: int | None, workers: int) -> Callable[[], int]:
    """Return a call that goes through an epoch with this library and counts the images."""
    views = PairedViews(SIZE, second_size)
    loader = make_loader(FolderSource(folder), views, BATCH, shuffle=True, num_workers=workers)
    return lambda: sum(len(batch["image"]) for batch in loader)


def theirs(folder: Path, second_size: int | None, workers: int) -> Callable[[], int]:
    """Return the same for torchvision's ImageFolder with Pillow."""
    loader = DataLoader(
        ImageFolder(str(folder), PillowViews(second_size)),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: sum(len(labels) for _, labels in loader)


def main() -> None:
    """Time both, print the table and write it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, options.images)
        for label, second_size in (
            (f"one view, {SIZE} px", None),
            (f"two views, {SIZE} and {SECOND_SIZE} px", SECOND_SIZE),
        ):
            calls = {
                "patchloom": ours(folder, second_size, options.workers),
                "pillow": theirs(folder, second_size, options.workers),
            }
            if any(call() != options.images for call in calls.values()):
                raise RuntimeError("an epoch does not hold every image")
            seconds = alternate(calls, rounds=options.rounds)
            rates = {side: [options.images / one for one in taken] for side, taken in seconds.items()}
            ratio = paired_ratio(rates["patchloom"], rates["pillow"])
            spread = sorted(a / b for a, b in zip(rates["patchloom"], rates["pillow"], strict=True))
            rows.append(
                [
                    label,
                    mean_and_deviation(rates["patchloom"], 0),
                    mean_and_deviation(rates["pillow"], 0),
                    f"{ratio:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})",
                    "yes" if ratio >= TARGET else "no",
                ]
            )
    header = ["From a folder", "Patchloom, images/s", "torchvision with Pillow", "Ratio", f"≥ {TARGET}"]
    text = (
        f"{markdown_table(header, rows)}\n\n{options.images} JPEGs of 500 × 375 pixels in the page cache, "
        f"{options.workers} workers, {options.rounds} rounds in alternation; median ratio (lowest to highest).\n"
        f"{machine()}."
    )
    print(text)
    page = Path(__file__).parents[1] / "docs" / "performance.md"
    if page.exists() and "<!-- data_pipeline -->" in page.read_text():
        rewrite(page, "data_pipeline", text)


if __name__ == "__main__":
    main()
