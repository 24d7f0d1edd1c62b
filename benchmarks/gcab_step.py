"""What a step of GCAB costs: gates, old tasks, teacher and projector against fine-tuning of the same network.

    python -m benchmarks.gcab_step [--encoder gcab_convit_small_patch4_32] [--batch 32] [--rounds 5] [--write]

A step is forward, backward, what is done to gradients, AdamW, and what is put back. It should cost at most 1.6 steps of
fine-tuning. Timed in turn; processor time where there is no GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.encoders import create_encoder, image_size
from patchloom.systems.gcab.model import GCAB

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "gcab.md"
TASKS = (2, 5, 10)
CLASSES, STEEPNESS = 10, 100.0


def stepper(encoder: str, tasks: int, gated: bool, batch: int, device: str) -> Callable[[], None]:
    """Return what takes one step in the last of so many tasks."""
    torch.manual_seed(0)
    model = GCAB(create_encoder(encoder), max(TASKS), gated=gated, compensate=gated)
    for _ in range(tasks):
        model.add_task(CLASSES)
    model.to(device).train()
    images = torch.randn(batch, 3, *image_size(model.trunk.encoder), device=device)
    targets = torch.randint((tasks - 1) * CLASSES, tasks * CLASSES, (batch,), device=device)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=1e-6, fused=True)

    def step() -> None:
        model.training_losses(images, targets, STEEPNESS)["loss"].backward()
        model.correct_gradients_(STEEPNESS)
        torch.nn.utils.clip_grad_norm_(learning, 10_000.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step_()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Time in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="gcab_convit_small_patch4_32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/gcab.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    rows = []
    for tasks in TASKS:
        calls = {
            name: stepper(options.encoder, tasks, gated, options.batch, device)
            for name, gated in (("gcab", True), ("fine-tuning", False))
        }
        seconds = alternate(calls, rounds=options.rounds, warmup=1, clock=clock)
        rows.append([tasks, f"{paired_ratio(seconds['gcab'], seconds['fine-tuning']):.2f}", "1.60"])
    table = markdown_table(["in task", "cost, of fine-tuning the same network", "at most"], rows)
    text = (
        f"`python -m benchmarks.gcab_step --encoder {options.encoder} --batch {options.batch}`; {machine()}.\n\n{table}"
    )
    print(text)
    if options.write:
        rewrite(PAGE, "gcab_step", text)


if __name__ == "__main__":
    main()
