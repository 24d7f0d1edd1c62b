"""What an attack on an early block costs: steps that stop at block l of the encoder against steps through all of it.

    python -m benchmarks.dta_step [--encoder vit_small_patch16_224] [--batch 8] [--rounds 5] [--write]

Crafting the same images with early stop at block l of 12 should cost at most (l + 2) / 12 of full depth. Timed in turn;
processor time where there is no GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.encoders import create_encoder, depth, image_size
from patchloom.systems.dta.attacks import FeatureAttack

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "dta.md"
BLOCKS = (1, 3, 6, 9)


def main() -> None:
    """Time in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/dta.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = create_encoder(options.encoder).to(device).eval()
    images = torch.rand(options.batch, 3, *image_size(encoder), device=device)
    deep = depth(encoder)

    def crafting(block: int) -> None:
        FeatureAttack(encoder, layers=[block - 1], steps=options.steps)(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    numbers = [block for block in BLOCKS if block < deep] + [deep]
    calls = {str(block): (lambda block=block: crafting(block)) for block in numbers}
    clock = time.perf_counter if images.is_cuda else time.process_time
    seconds = alternate(calls, rounds=options.rounds, warmup=1, clock=clock)
    rows = [
        [block, f"{paired_ratio(seconds[str(block)], seconds[str(deep)]):.2f}", f"{(block + 2) / deep:.2f}"]
        for block in numbers[:-1]
    ]
    table = markdown_table([f"stop after block (of {deep})", "cost, of full depth", "at most"], rows)
    text = (
        f"`python -m benchmarks.dta_step --encoder {options.encoder} --batch {options.batch}`, {options.steps} steps; "
        f"{machine()}.\n\n{table}"
    )
    print(text)
    if options.write:
        rewrite(PAGE, "dta_step", text)


if __name__ == "__main__":
    main()
