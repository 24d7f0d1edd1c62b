"""What bfloat16 and torch.compile make of a training step: processor seconds of one thread, all four taking turns.

    python -m benchmarks.precision [--rounds 5] [--write]

Forward, backward and fused AdamW of three encoders. Processor seconds are not added to by whatever else runs on the
machine; on a GPU they are seconds of the clock. Compiling itself, half a minute a model, is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.encoders import create_encoder, image_size

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
ENCODERS = {"ccvit_tiny_patch8_64": 32, "vit_tiny_patch16_224": 16, "vit_small_patch16_224": 8}
"""Images per step."""


def stepper(name: str, batch: int, device: str, bf16: bool, compiled: bool) -> Callable[[], None]:
    """Return one training step of an encoder."""
    torch.manual_seed(0)
    encoder = create_encoder(name).to(device).train()
    if compiled:
        for block in encoder.blocks:
            block.compile()
    images = torch.randn(batch, 3, *image_size(encoder), device=device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = encoder(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for name, batch in ENCODERS.items():
        candidates = {
            ("bf16" if bf16 else "fp32") + (", compiled" if compiled else ""): stepper(
                name, batch, device, bf16, compiled
            )
            for bf16, compiled in itertools.product((False, True), repeat=2)
        }
        clock = time.process_time if device == "cpu" else time.perf_counter
        seconds = alternate(candidates, rounds=options.rounds, warmup=2, clock=clock)
        for how, values in seconds.items():
            faster = f"{paired_ratio(seconds['fp32'], values):.2f} ×"
            rows.append([f"{name}, batch {batch}", how, mean_and_deviation(values), faster])
    table = markdown_table(["step", "arithmetic", "seconds", "faster than fp32"], rows)
    text = f"{machine()}\n\n{table}"
    print(text)
    if options.write:
        rewrite(PAGE, "precision", text)


if __name__ == "__main__":
    main()
