"""Finding near-duplicates among 100,000 vectors, and writing shards beside a plain tar of the same files.

    python -m benchmarks.curation            # some minutes on two cores
    python -m benchmarks.curation --small    # a few seconds, to see that it runs

Peers: faiss' exact range search for the pairs where it is installed, and the standard library's tar of the files for
the shards, both in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from benchmarks.photographs import images
from patchloom.curation.config import ShardsConfig
from patchloom.curation.pairs import groups_of
from patchloom.curation.shards import run_shards

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="few vectors and files; the page is left alone")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each, in turn")
    arguments = parser.parse_args()
    count, files = (5_000, 200) if arguments.small else (100_000, 4_000)

    vectors = F.normalize(torch.randn(count, 384, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[: count // 10] = vectors[count // 10 : 2 * (count // 10)] + 0.01 * vectors[-(count // 10) :]
    candidates: dict[str, Callable[[], Any]] = {"ours": lambda: groups_of(vectors, 0.95)}
    with contextlib.suppress(ImportError):
        import faiss

        def by_faiss() -> Any:
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors.numpy())
            return [index.range_search(part.numpy(), 0.95) for part in vectors.split(4096)]

        candidates["faiss, range search"] = by_faiss
    rows = _rows(alternate(candidates, rounds=1 if not arguments.small else arguments.rounds, warmup=0), "ours")

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        for number, pixels in enumerate(images(files)):
            path = folder / str(number % 10) / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)
        out = Path(place) / "shards"

        def shards() -> None:
            shutil.rmtree(out, ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):
                run_shards(ShardsConfig(data=str(folder), out=str(out)))

        def plain() -> None:
            with tarfile.open(Path(place) / "plain.tar", "w") as archive:
                archive.add(folder)

        seconds = alternate({"ours": shards, "tar": plain}, rounds=arguments.rounds)
        rows_of_shards = _rows(seconds, "ours")
    text = f"{machine()}; `python -m benchmarks.curation`\n\nGroups among {count:,} vectors of 384:\n\n"
    text += markdown_table(["", "seconds", "ours is faster by"], rows)
    text += f"\n\n{files:,} images of 224 px with their classes as shards:\n\n"
    text += markdown_table(["", "seconds", "ours is faster by"], rows_of_shards)
    print(text)
    if not arguments.small and PAGE.exists() and "<!-- curation -->" in PAGE.read_text():
        rewrite(PAGE, "curation", text)


def _rows(seconds: dict[str, list[float]], ours: str) -> list[list[str]]:
    return [
        [
            name,
            mean_and_deviation(values, 2) if len(values) > 1 else f"{statistics.median(values):.2f}",
            f"{paired_ratio(values, seconds[ours]):.2f}",
        ]
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    main()
