"""Batch size by `--batch_size auto` beside a sweep by hand: images per second of whole steps of the engine.

    python -m benchmarks.auto_batch --data digits --encoder test_vit --image_size 64 --sizes 8 32 128

Each size trains a MAE with a small decoder for as many images; the figure is the best of `--repeats` runs, loading
included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from typing import Any

import yaml

import patchloom as pl
from benchmarks.harness import machine


def images_per_second(size: int | str, images: int, settings: dict[str, Any]) -> tuple[float, int]:
    """Return images per second between the first steps of a run and its end, and its batch size."""
    from patchloom.systems.mae.method import MAEMethod

    marks: list[float] = []
    loss = MAEMethod.training_loss

    def marked(self: MAEMethod, batch: dict[str, Any]) -> Any:
        marks.append(time.perf_counter())
        return loss(self, batch)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        if size == "auto":
            settled = pl.pretrain("mae", out=f"{folder}/a", batch_size="auto", max_steps=1, **settings)
            size = int(yaml.safe_load((settled.path / "config.yaml").read_text())["batch_size"])
        MAEMethod.training_loss = marked  # type: ignore[method-assign]
        try:
            steps = max(4, images // int(size)) + 2
            pl.pretrain("mae", out=f"{folder}/r", batch_size=size, max_steps=steps, **settings)
        finally:
            MAEMethod.training_loss = loss  # type: ignore[method-assign]
    return int(size) * (len(marks) - 2) / (marks[-1] - marks[1]), int(size)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--encoder", default="vit_tiny_patch16_224")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    settings = {"data": arguments.data, "encoder": arguments.encoder, "image_size": arguments.image_size}
    settings |= {"probe_every": 0, "health_every": 0, "report": False, "epochs": 10_000}
    settings |= {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2}
    _, chosen = images_per_second("auto", arguments.images, settings)
    found = {
        size: max(images_per_second(size, arguments.images, settings)[0] for _ in range(arguments.repeats))
        for size in sorted({*arguments.sizes, chosen})
    }
    best = max(found.values())
    print(machine())
    print("| batch size | images/s | of the best |\n| --- | --- | --- |")
    for size, speed in found.items():
        print(f"| {size}{' (auto)' if size == chosen else ''} | {speed:.1f} | {speed / best:.2f} |")


if __name__ == "__main__":
    main()
