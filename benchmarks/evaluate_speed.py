"""k-NN beside scikit-learn, extraction beside a bare timm loop, the cache, and the grid of linear heads.

    python -m benchmarks.evaluate_speed            # about five minutes on two cores
    python -m benchmarks.evaluate_speed --small    # a few seconds, to see that it runs

k-NN: 50,000 training features, 10,000 test features, 384 wide, 200 neighbours, against scikit-learn's brute force with
the same kernel, by cosine and by its faster Euclidean path on features of unit length. Extraction: images decoded
beforehand, against a loop over timm's forward pass. The grid: 13 learning rates x 2 choices of blocks x 2 poolings
against its widest head alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.data import MemorySource, Sample
from patchloom.encoders import create_encoder, normalize
from patchloom.evaluate.grid import fit_heads
from patchloom.evaluate.linear_grid_config import LRS
from patchloom.features.cache import cached_features
from patchloom.features.extract import extract
from patchloom.features.knn import knn_votes

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NAME = "vit_small_patch16_224"
TEMPERATURE = 0.07


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="few features and images; the page is left alone")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each, in turn")
    parser.add_argument("--queries", type=int, default=10_000, help="test features of the k-NN comparison")
    parser.add_argument("--images", type=int, default=256, help="images of the extraction comparison")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.rounds, arguments.queries, arguments.images = 1, 200, 16
    tables = [
        _knn(2000 if arguments.small else 50_000, arguments.queries, arguments.rounds),
        _extraction(arguments.images, arguments.rounds),
        _grid(50 if arguments.small else 400, arguments.rounds),
    ]
    command = f"`python -m benchmarks.evaluate_speed --queries {arguments.queries}`, {arguments.rounds} rounds in turn"
    text = "\n\n".join([f"{machine()}; {command}", *tables])
    print(text)
    if not arguments.small and PAGE.exists() and "<!-- evaluate_speed -->" in PAGE.read_text():
        rewrite(PAGE, "evaluate_speed", text)


def _table(what: str, seconds: dict[str, list[float]], ours: str, each: str) -> str:
    rows = [
        [name, mean_and_deviation(values, 3), f"{paired_ratio(seconds[ours], values):.3f}"]
        for name, values in seconds.items()
    ]
    return markdown_table([what, f"seconds, {each}", "ours / this"], rows)


def _knn(train: int, queries: int, rounds: int) -> str:
    generator = torch.Generator().manual_seed(0)
    x, q = torch.randn(train, 384, generator=generator), torch.randn(queries, 384, generator=generator)
    y = torch.arange(train) % 10
    unit = torch.nn.functional.normalize

    def scikit(metric: str, weigh: Callable[[Any], Any], memory: Tensor, asked: Tensor) -> Callable[[], np.ndarray]:
        model = KNeighborsClassifier(200, metric=metric, algorithm="brute", weights=weigh).fit(
            memory.numpy(), y.numpy()
        )
        return lambda: model.predict(asked.numpy())

    by_cosine = scikit("cosine", lambda apart: np.exp((1 - apart) / TEMPERATURE), x, q)
    by_length = scikit("euclidean", lambda apart: np.exp((1 - apart**2 / 2) / TEMPERATURE), unit(x), unit(q))

    def ours() -> Tensor:
        return knn_votes(x, y, q, ks=(10, 20, 100, 200), temperature=TEMPERATURE)[200].argmax(1)

    candidates: dict[str, Callable[[], Any]] = {
        "ours, 4 values of k": ours,
        "scikit-learn, brute force, cosine": by_cosine,
        "scikit-learn, brute force, Euclidean on unit length": by_length,
    }
    seconds = alternate(candidates, rounds=rounds, warmup=0)
    same = float((ours().numpy() == by_cosine()).mean())
    table = _table("k-NN", seconds, "ours, 4 values of k", f"{train:,} × {queries:,} × 384, k = 200")
    return f"{table}\n\nPredictions equal to scikit-learn's: {same:.2%}."


def _extraction(count: int, rounds: int) -> str:
    torch.manual_seed(0)
    encoder = create_encoder(NAME).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 224, 224), generator=generator, dtype=torch.uint8)
    source = MemorySource("images", [Sample(image, 0, str(number)) for number, image in enumerate(images)])
    bare = timm.create_model(NAME, num_classes=0).eval()
    settings: dict[str, Any] = {"num_workers": 0, "batch_size": 32, "device": "cpu", "progress": False}

    @torch.no_grad()
    def loop() -> Tensor:
        return torch.cat([bare(normalize(part.float() / 255, encoder)) for part in images.split(32)])

    with tempfile.TemporaryDirectory() as cache:
        cached_features(encoder, source, cache=cache, **settings)
        candidates: dict[str, Callable[[], Any]] = {
            "ours": lambda: extract(encoder, source, **settings),
            "loop over timm's forward pass": loop,
            "ours, from the cache": lambda: cached_features(encoder, source, cache=cache, **settings),
        }
        seconds = alternate(candidates, rounds=rounds)
    table = _table(f"features of {NAME}", seconds, "ours", f"{count} images")
    faster = statistics.median(seconds["ours"]) / statistics.median(seconds["ours, from the cache"])
    return f"{table}\n\nFrom the cache: {faster:.0f} times as fast as extracting."


def _grid(steps: int, rounds: int) -> str:
    width = 384
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20_000, 5 * width, generator=generator), torch.arange(20_000) % 10
    inputs = [slice(start * width, stop * width) for start in (3, 0) for stop in (4, 5)]
    shared: dict[str, Any] = {"num_classes": 10, "steps": steps, "batch_size": 128}
    candidates: dict[str, Callable[[], Any]] = {
        "the grid of 52 heads": lambda: fit_heads(x, y, inputs=inputs, lrs=LRS, **shared),
        "its widest head alone": lambda: fit_heads(x, y, inputs=inputs[-1:], lrs=LRS[-1:], **shared),
        "52 heads one after the other": lambda: [
            fit_heads(x, y, inputs=[columns], lrs=[lr], **shared) for columns in inputs for lr in LRS
        ],
    }
    seconds = alternate(candidates, rounds=rounds)
    return _table("linear heads", seconds, "the grid of 52 heads", f"{steps} steps of 128 images, 10 classes")


if __name__ == "__main__":
    main()
