"""Scoring defects: one mask against twelve passes and a memory of patches; choosing the memory.

    python -m benchmarks.anomaly_speed [--write]

The coreset is compared with anomalib's where that is installed (`pip install anomalib`), else with the same choice by
differences in full width, one centre after the other, which is what it computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.evaluate.anomaly.patchcore import PatchCore, PatchFeatures, k_centres
from patchloom.evaluate.anomaly.random_masks import RandomMasks
from patchloom.systems.ear.model import EAR, AttentionSaliency, RecoveryUNet

CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time
"""On a CPU the processor's time, which others on the machine do not add to."""
PAGE = Path(__file__).parents[1] / "docs" / "systems" / "ear.md"


@torch.no_grad()
def scoring(rounds: int) -> list[list[str]]:
    """Time an image of 256 pixels by EAR, by random masks with the same network, and by a memory of 4096 patches."""
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    network, view = RecoveryUNet().eval(), torch.rand(1, 3, 256, 256)
    detectors: dict[str, Callable[[], Any]] = {}
    memory = torch.randn(4096, 768)
    for name, detector in {
        "EAR": EAR(AttentionSaliency(encoder), network),
        "random masks, 12 passes": RandomMasks(network),
        "memory of 4096 patches": PatchCore(PatchFeatures(encoder), memory),
    }.items():
        detectors[name] = partial(detector.eval(), view)
    seconds = alternate(detectors, rounds=rounds, clock=CLOCK)
    return [
        [name, f"{1000 * sorted(each)[len(each) // 2]:.0f}", f"{paired_ratio(each, seconds['EAR']):.2f} ×"]
        for name, each in seconds.items()
    ]


def coreset(rounds: int, points: int, centres: int) -> list[list[str]]:
    """Time the choice of centres among points of 384 numbers."""
    patches = torch.randn(points, 384)
    candidates = {"ours": lambda: k_centres(patches, centres), peer_name(): peer(patches, centres)}
    seconds = alternate(candidates, rounds=rounds, warmup=0, clock=CLOCK)
    return [
        [name, f"{sorted(each)[len(each) // 2]:.1f}", f"{paired_ratio(each, seconds['ours']):.2f} ×"]
        for name, each in seconds.items()
    ]


def peer_name() -> str:
    """Return what the coreset is compared with."""
    try:
        import anomalib
    except ImportError:
        return "one centre after the other, by differences"
    return f"anomalib {anomalib.__version__}"


def peer(patches: torch.Tensor, centres: int) -> Callable[[], Any]:
    """Return anomalib's choice, or what it computes."""
    try:
        from anomalib.models.components.sampling import KCenterGreedy
    except ImportError:

        def by_differences() -> torch.Tensor:
            nearest = torch.full((len(patches),), float("inf"))
            number = 0
            for _ in range(centres):
                nearest = torch.minimum(nearest, torch.linalg.norm(patches - patches[number], dim=1))
                number = int(nearest.argmax())
            return nearest

        return by_differences
    return lambda: KCenterGreedy(patches, sampling_ratio=centres / len(patches)).sample_coreset()


def main() -> None:
    """Time, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--centres", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/ear.md")
    options = parser.parse_args()
    text = "\n\n".join(
        [
            machine(),
            markdown_table(["an image of 256 pixels", "ms", "of EAR"], scoring(options.rounds)),
            f"{options.centres} centres among {options.points:,} points of 384 numbers:",
            markdown_table(
                ["coreset", "seconds", "of ours"], coreset(max(1, options.rounds // 2), options.points, options.centres)
            ),
        ]
    )
    print(text)
    if options.write:
        rewrite(PAGE, "speed", text)


if __name__ == "__main__":
    main()
